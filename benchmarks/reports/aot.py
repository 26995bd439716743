"""Compile the launches that the real launchers make, with no GPU.

`capture` records the launches of code on meta tensors, by a walk of `training.account`.
`compile_for` then compiles a recorded launch through Triton's own launch path (argument names,
specialization on alignment, divisibility by 16 and 1, options) up to machine code, with a driver
that only names the GPU to compile for.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.reports.ptx import access_bytes
from mflow_kernels.ops import launch as launches
from mflow_kernels.training.account import Account, counting

launches.KERNELS_ON_CPU = True  # launchers ask Triton's driver for the GPU


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


class Amd(Arch):
    """Limits of one compute unit of CDNA 2 and 3 (AMD's ISA references, MI200 and MI300). Its waves
    have 64 lanes, its four SIMDs have 512 registers for each lane, for vectors and accumulators,
    and give them in units of 8. Its local memory has 64 KB."""

    def resident(self, registers: int, shared: int, warps: int) -> int:
        if shared > 64 * 1024:
            return 0
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(4 * waves // warps, 64 * 1024 // shared if shared else 32)


ARCHS: dict[str, Arch] = {
    # A block of sm_80 may take 163 KB, one of sm_86 and sm_89 only 99 KB. Kernels take the same on
    # all three, so the report allows 99 KB.
    "sm_80": Arch(shared=164 * 1024, shared_of_block=99 * 1024),
    "sm_86": Arch(threads=1536, blocks=16, shared=100 * 1024, shared_of_block=99 * 1024),
    "sm_89": Arch(threads=1536, blocks=24, shared=100 * 1024, shared_of_block=99 * 1024),
    "sm_90": Arch(),
    "sm_100": Arch(),
    "sm_120": Arch(threads=1536, blocks=24, shared=100 * 1024, shared_of_block=99 * 1024),
    "gfx90a": Amd(),
    "gfx942": Amd(),
}
# No launch may spill on these.
TARGETS = tuple(ARCHS)


def is_amd(target: str) -> bool:
    return target.startswith("gfx")


class _CompileOnly:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        if is_amd(self.target):
            return GPUTarget("hip", self.target, 64)
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


class _Launches(Account):
    def __init__(self) -> None:
        super().__init__(gpu=True)
        self.launches: list[Launch] = []

    def launched(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.launches.append(Launch(kernel, args, options, grid))


def capture(function: Callable[[], object]) -> list[Launch]:
    """Run `function`, which works on meta tensors, and return its launches."""
    account = _Launches()
    with counting(account):
        function()
    return account.launches


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
        kernel = launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {error}".splitlines()[0])
    if is_amd(target):
        return _compiled_for_amd(kernel)
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


def _compiled_for_amd(kernel: Any) -> Compiled:
    """What the assembly says of a kernel. Widths of accesses are not read from it."""
    text = kernel.asm["amdgcn"]
    if not re.search(r"(global|buffer)_store", text):
        return Compiled(error="the program stores nothing")

    def counted(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"amdgcn: expected a line with .{name}")
        return int(found[1])

    return Compiled(
        counted("vgpr_count"),  # with those of accumulators
        counted("private_segment_fixed_size"),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        {},
        kernel.asm["ttir"],
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
