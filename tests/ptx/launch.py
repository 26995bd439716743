"""A Triton driver whose device is the machine of this package.

Launches of CPU tensors go through Triton's own path: it binds and specializes the arguments and
compiles for the architecture. The driver then gets PTX in place of machine code, and
`Device.launch` runs it on copies of the tensors' storages.

While the driver is installed, `torch.empty` and similar functions return memory filled with 0xFF
bytes. The machine recognizes uninitialized memory by them.
"""

import ctypes
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from ptx.global_memory import GlobalMemory, Region
from ptx.machine import Machine
from ptx.parser import parse
from ptx.report import Report
from ptx.translator import Translator

SHARED_OF_BLOCK = {80: 163 * 1024, 90: 227 * 1024}  # bytes
BLANK = 0xFF
SHOWN = 4  # faults in a message


class Violation(AssertionError):
    """A compiled kernel made an invalid access, or one that races."""


@dataclass
class Launched:
    """A finished launch: its report, its bytes of shared memory, and its tensors by region."""

    kernel: str
    grid: tuple[int, ...]
    report: Report
    shared: int
    tensors: dict[str, list[tuple[str, Tensor]]]


class Device:
    """The part of a Triton driver that compiling and launching need.

    With `raises`, a launch with a fault raises `Violation`. See `TensorCores` about `late`. Tests
    of the checks set `edit`, a function that changes the PTX before it runs.
    """

    def __init__(self, arch: str, late: bool = False, raises: bool = True) -> None:
        self.arch, self.late, self.raises = arch, late, raises
        self.launches: list[Launched] = []
        self.edit: Callable[[str], str] = lambda ptx: ptx
        self.ptx = ""  # of the last launch
        self.translators: dict[str, Translator] = {}
        self.blank: dict[int, Tensor] = {}  # results of `empty`, kept so that no memory is reused
        self.launcher_cls = self._launcher
        self.utils = self

    # Called by Triton

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": SHARED_OF_BLOCK[self.get_current_target().arch]}

    def load_binary(self, name: str, ptx: bytes, *_: object) -> tuple[object, ...]:
        return None, ptx.decode(), 0, 0, 1024  # module, function, registers, spills, threads

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: object, ptx: str, *rest: Any) -> None:
            args = rest[4:]  # after Triton's metadata and hooks
            pairs = list(_flat(source.fn.arg_names, source.signature.values(), args))
            self.launch(metadata.name, ptx, (x, y, z), metadata.shared, pairs)

        return launch

    # Running

    def launch(
        self, name: str, ptx: str, grid: tuple[int, int, int], shared: int,
        arguments: list[tuple[str, str, Any]],
    ) -> None:  # fmt: skip
        """Run a kernel. An argument is its name, Triton's type and its value."""
        self.ptx = ptx = self.edit(ptx)
        if ptx not in self.translators:
            self.translators[ptx] = Translator(parse(ptx))
        translator = self.translators[ptx]
        kernel = translator.kernel
        report = Report(kernel)
        arena = Arena(report, [(n, v) for n, _, v in arguments if isinstance(v, Tensor)], self)
        packed = bytearray(kernel.parameter_bytes)
        # Parameters after the arguments are Triton's scratch memory, which stays null.
        for parameter, (_, kind, value) in zip(kernel.parameters, arguments, strict=False):
            raw = _packed(arena.address(value) if isinstance(value, Tensor) else value, kind)
            packed[parameter.offset : parameter.offset + parameter.size] = raw[: parameter.size]
        Machine(translator, arena.memory, bytes(packed), grid, shared, self.late).run()
        arena.write_back()
        self.launches.append(Launched(name, grid, report, shared, arena.tensors))
        if report.faults and self.raises:
            shown = "".join(f"\n  {fault}" for fault in report.faults[:SHOWN])
            more = len(report.faults) - SHOWN
            shown += f"\n  and at {more} more instructions" if more > 0 else ""
            raise Violation(f"{name}, compiled for {self.arch}, on a grid of {grid}:{shown}")

    def forget(self) -> None:
        """Drop the records of all launches so far."""
        self.launches.clear()
        self.blank.clear()

    # Uninitialized memory

    def fill(self, made: Tensor) -> Tensor:
        """Fill a result of `empty` with BLANK bytes."""
        wrapped = type(made) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(made)
        if wrapped or made.device.type != "cpu" or made.dtype == torch.bool:
            return made
        if made.layout == torch.strided and made.numel():
            storage = made.untyped_storage()
            ctypes.memset(storage.data_ptr(), BLANK, storage.nbytes())
            self.blank[storage.data_ptr()] = made.detach()
        return made


def _flat(names: Any, kinds: Any, values: Any) -> Iterator[tuple[str, str, Any]]:
    """The arguments of a compiled kernel. Constants are left out and tuples are flattened, and a
    tensor that leads a tuple has the tuple's name."""
    for name, kind, value in zip(names, kinds, values, strict=True):
        if isinstance(kind, tuple | list):
            inner = [f"{name}[{i}]" for i in range(len(kind))]
            if str(kind[0]).startswith("*"):
                inner[0] = name
            yield from _flat(inner, kind, value)
        elif kind != "constexpr":
            yield name, kind, value


def _packed(value: Any, kind: str) -> bytes:
    if kind in ("fp32", "fp64"):
        return struct.pack({"fp32": "<f", "fp64": "<d"}[kind], value)
    return (int(value) & (1 << 64) - 1).to_bytes(8, "little")


class Arena:
    """The storages of a launch's tensors as regions of the machine's memory."""

    def __init__(self, report: Report, named: list[tuple[str, Tensor]], device: Device) -> None:
        self.memory = GlobalMemory(report)
        self.tensors: dict[str, list[tuple[str, Tensor]]] = {}
        # By real address, with the machine's address.
        self.regions: dict[int, tuple[Region, int]] = {}
        groups: dict[int, list[tuple[str, Tensor]]] = {}
        for name, t in named:
            if t.numel():
                groups.setdefault(t.untyped_storage().data_ptr(), []).append((name, t))
        for begin, members in groups.items():
            region = _region(begin, members, device.blank.get(begin))
            self.regions[begin] = region, self.memory.add(region)
            self.tensors[region.name] = members

    def address(self, t: Tensor) -> int:
        """The machine's address of a tensor's first element; 0 for an empty tensor."""
        if not t.numel():
            return 0
        begin = t.untyped_storage().data_ptr()
        return self.regions[begin][1] + t.data_ptr() - begin

    def write_back(self) -> None:
        for begin, (region, _) in self.regions.items():
            if region.written:
                ctypes.memmove(begin, region.data.tobytes(), region.nbytes)


def _region(begin: int, members: list[tuple[str, Tensor]], blank: Tensor | None) -> Region:
    storage = members[0][1].untyped_storage()
    raw = ctypes.string_at(begin, storage.nbytes())
    legal = np.zeros(storage.nbytes(), bool)
    for _, t in members:
        elements = np.zeros(storage.nbytes() // t.element_size(), bool)
        reached = elements[t.storage_offset() :]
        np.lib.stride_tricks.as_strided(reached, t.shape, t.stride())[...] = True
        legal[: len(elements) * t.element_size()] |= np.repeat(elements, t.element_size())
    grain, unwritten = min(t.element_size() for _, t in members), None
    if blank is not None:
        grain = min(grain, blank.element_size())
        cells = np.frombuffer(raw, np.uint8)[: len(raw) // grain * grain].reshape(-1, grain)
        unwritten = (cells == BLANK).all(1)
    return Region("+".join(name for name, _ in members), raw, grain, legal, unwritten)


@contextmanager
def installed(device: Device) -> Iterator[Device]:
    """A context in which Triton launches on `device` and `empty` returns marked memory."""
    machine_code, before = CUDABackend.make_cubin, driver._active
    empty = torch.empty, torch.empty_like, Tensor.new_empty

    def load_ptx(self: CUDABackend, ptx: str, *_: object) -> bytes:
        return ptx.encode()

    def marked(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made if torch.compiler.is_compiling() else device.fill(made)

        return call

    with knobs.cache.scope():
        # The cache holds PTX in place of machine code, so it must not be the one of real launches.
        knobs.cache.dir = str(Path(tempfile.gettempdir()) / f"mflow-ptx-{os.getuid()}")
        CUDABackend.make_cubin = load_ptx
        torch.empty, torch.empty_like, Tensor.new_empty = map(marked, empty)
        driver.set_active(device)
        try:
            yield device
        finally:
            driver.set_active(before)
            torch.empty, torch.empty_like, Tensor.new_empty = empty
            CUDABackend.make_cubin = machine_code
