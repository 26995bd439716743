"""Compile the launches that the real launchers make, with no GPU.

Import this before anything that imports mflow_kernels. The package must see TRITON_INTERPRET=1, so
that launchers take CPU tensors, but Triton must not interpret, so that kernels can be compiled.

`capture` replaces `JITFunction.run` by a function that records the launch and does nothing.
`compile_for` then compiles a recorded launch through Triton's own launch path (argument names,
specialization on alignment, divisibility by 16 and 1, options) up to machine code, with a driver
that only names the GPU to compile for.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

triton.knobs.runtime.interpret = False
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import mflow_kernels.ops  # noqa: E402, F401 - registers the launchers for the CPU
from benchmarks.reports.ptx import access_bytes  # noqa: E402

_run = JITFunction.run


@dataclass(frozen=True)
class Arch:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, table "Technical Specifications per
    Compute Capability"). Warps get registers in units of 256."""

    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared: int = 228 * 1024
    shared_of_block: int = 227 * 1024
    shared_reserved: int = 1024  # CUDA reserves this in each block

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Return the number of blocks that fit at once."""
        if shared > self.shared_of_block:
            return 0
        registers_of_warp = -(-registers * 32 // 256) * 256
        # Each of 4 schedulers takes a quarter of the warps.
        by_registers = self.registers // max(registers_of_warp, 1) // 4 * 4 // warps
        by_shared = self.shared // (shared + self.shared_reserved)
        return min(self.blocks, by_registers, by_shared, self.threads // (32 * warps))


ARCHS = {
    # A block of sm_80 may take 163 KB, one of sm_86 and sm_89 only 99 KB. Kernels take the same on
    # all three, so the report allows 99 KB.
    "sm_80": Arch(shared=164 * 1024, shared_of_block=99 * 1024),
    "sm_89": Arch(threads=1536, blocks=24, shared=100 * 1024, shared_of_block=99 * 1024),
    "sm_90": Arch(),
    "sm_100": Arch(),
    "sm_120": Arch(threads=1536, blocks=24, shared=100 * 1024, shared_of_block=99 * 1024),
}
# No launch may spill on these. Networks were compiled for sm_89 and sm_120 too, without a spill.
TARGETS = ("sm_80", "sm_90", "sm_100")


class _CompileOnly:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.target  # Triton caches compiled kernels by device

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass
class Launch:
    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def bound(self) -> dict[str, Any]:
        """Arguments by name. A state from `strided` is its tensor here, or None."""
        tensors = [
            arg[0]
            if isinstance(arg, tuple) and (arg[0] is None or isinstance(arg[0], Tensor))
            else arg
            for arg in self.args
        ]
        return dict(zip(self.kernel.arg_names, tensors, strict=False)) | self.kwargs

    @property
    def key(self) -> str:
        """A text that is the same for launches that Triton compiles to one kernel."""
        driver.set_active(_CompileOnly("sm_90"))  # specialization is the same for all targets
        *_, binder = self.kernel.device_caches["sm_90"]
        try:
            _, specialization, options = binder(*self.args, **self.kwargs)
        except Exception:  # compiling raises it again, and the table shows it
            given = [(type(arg), getattr(arg, "dtype", None)) for arg in self.args]
            return f"{self.kernel.__name__} {given} {self.kwargs}"
        return f"{self.kernel.__name__} {specialization} {options}"


def choose_tiles_of(target: str) -> None:
    """Let launchers choose the tiles of an architecture from now on."""
    driver.set_active(_CompileOnly(target))


@contextmanager
def noting(note: Callable[[Launch], object]) -> Iterator[None]:
    """Within this context, call `note` with each launch, and compute nothing."""

    def run(
        self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any
    ) -> None:
        note(Launch(self, args, kwargs, grid))

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = _run


def capture(function: Callable[[], object]) -> list[Launch]:
    """Run `function` and return the launches that it would have made. No kernel runs."""
    launches: list[Launch] = []

    def note(launch: Launch) -> None:
        launches.append(replace(launch, args=tuple(map(_untouched, launch.args))))

    with noting(note):
        function()
    return launches


_room = torch.empty(2**28, dtype=torch.uint8)  # its pages are never written and take no memory


def _untouched(argument: Any) -> Any:
    """A tensor in `_room` of the same shape, strides and alignment. A new allocation could reuse a
    freed block, whose pages take memory."""
    global _room
    if isinstance(argument, tuple):
        return tuple(map(_untouched, argument))
    if not isinstance(argument, Tensor) or not argument.numel():
        return argument
    steps = (
        (size - 1) * step for size, step in zip(argument.shape, argument.stride(), strict=True)
    )
    offset = argument.data_ptr() % 16 // argument.element_size()
    needed = (offset + sum(steps) + 1) * argument.element_size()
    if needed > len(_room):
        _room = torch.empty(2 * needed, dtype=torch.uint8)
    room = torch.empty(0, dtype=argument.dtype)
    return room.set_(_room.untyped_storage(), offset, argument.shape, argument.stride())


@dataclass
class Compiled:
    registers: int = 0
    spilled: int = 0  # bytes of a lane's stack; Triton's kernels use it only to spill
    shared: int = 0
    warps: int = 0
    access: dict[str, list[int]] = field(default_factory=dict)  # bytes per lane, by argument
    ttir: str = ""  # Triton's program before layouts are chosen
    ttgir: str = ""  # and after
    error: str = ""


def compile_for(launch: Launch, target: str) -> Compiled:
    driver.set_active(_CompileOnly(target))
    try:
        kernel = _run(launch.kernel, *launch.args, grid=(1,), warmup=True, **launch.kwargs)
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {error}".splitlines()[0])
    if "st.global" not in kernel.asm["ptx"]:  # Triton 3.6 compiles some kernels to a trap
        return Compiled(error="the program stores nothing")
    arguments = list(_runtime(kernel.src.signature))
    registers, spilled = _resources(kernel.asm["cubin"])
    return Compiled(
        registers,
        spilled,
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        access_bytes(kernel.asm["ptx"], arguments),
        kernel.asm.get("ttir", kernel.asm["ttgir"]),  # Gluon chooses layouts itself
        kernel.asm["ttgir"],
    )


def _runtime(signature: dict[str, Any]) -> Iterator[str]:
    """The arguments of the compiled kernel, in order.

    Tuples are flattened, and a tensor that leads a tuple has the tuple's name.
    """
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            state = str(kind[0]).startswith("*")
            names = [name if state and i == 0 else f"{name}.{i}" for i in range(len(kind))]
            yield from _runtime(dict(zip(names, kind, strict=True)))
        elif kind != "constexpr":
            yield name


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes of a lane, as Triton's own cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG and STACK, got {usage!r}")
    return int(found[1]), int(found[2])
