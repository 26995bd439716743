"""Count the requests of compiled launches to global memory, on the simulated GPU of tests/ptx.

The counts are of the compiled kernel's instructions, so an element that several threads load counts
several times. A launch that accesses memory outside its tensors, or that races, raises
`ptx.launch.Violation`.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from ptx.launch import Device, Launched, installed
from ptx.report import Report

from mflow_kernels.ops import launch

launch.KERNELS_ON_CPU = True


@dataclass
class Memory:
    """Requests of a launch to the storage of one or more of its tensors."""

    names: list[str]
    itemsize: int
    pixels: bool  # whether it holds a tensor with pixels (with four axes, see `cases`)
    loaded: int = 0  # bytes that threads requested
    stored: int = 0
    loaded_once: int = 0  # the same, each byte counted once
    stored_once: int = 0
    sectors: int = 0  # 32-byte sectors that the warps' requests touch, loads and stores
    sectors_once: int = 0  # the same, each sector counted once for loads and once for stores

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


@dataclass
class Launch:
    kernel: str
    memories: list[Memory]
    multiplications: int  # of tensor cores
    banks: float  # wavefronts of accesses to shared memory, divided by the fewest possible


_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def _multiplications(report: Report) -> int:
    """Return the multiplications of the tensor-core instructions that a launch's warps issued."""
    total = 0
    for name, warps in report.instructions.items():
        if name.startswith(("mma.sync", "wgmma.mma_async")):
            shape = _SHAPE.search(name)
            assert shape is not None
            # Four warps issue one asynchronous product together.
            groups = warps // 4 if name.startswith("wgmma") else warps
            total += groups * math.prod(map(int, shape.groups()))
    return total


def _launch_of(launched: Launched) -> Launch:
    report, memories = launched.report, []
    for region, tensors in launched.tensors.items():
        loads, stores = report.traffic[region, "load"], report.traffic[region, "store"]
        loaded, stored = report.touched[region, "load"], report.touched[region, "store"]
        memories.append(
            Memory(
                [name for name, _ in tensors],
                tensors[0][1].element_size(),
                any(t.dim() == 4 for _, t in tensors),
                loads.bytes,
                stores.bytes,
                loaded.bytes,
                stored.bytes,
                loads.sectors + stores.sectors,
                loaded.sectors + stored.sectors,
            )
        )
    return Launch(launched.kernel, memories, _multiplications(report), report.bank_conflicts)


def count(prepare: Callable[[], Callable[[], object]], arch: str = "sm_90") -> list[Launch]:
    """Return every launch of the function that `prepare()` returns, with its requests."""
    with installed(Device(arch)) as device:
        function = prepare()
        device.launches.clear()
        function()
        return [_launch_of(launched) for launched in device.launches]
