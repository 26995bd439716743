"""Count what each launch asks of global memory, compiled and run on the machine of tests/ptx.

Import this before anything that imports mflow_kernels: launches then take CPU tensors. Counts are
of the compiled kernel's instructions, so they include what several threads load alike. A launch
that touches memory it was not given, or that races, raises `ptx.launch.Violation`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from ptx.launch import Device, Launched, installed

from mflow_kernels.ops import launch

launch.KERNELS_ON_CPU = True


@dataclass
class Memory:
    """What a launch did with one of the storages that it was given."""

    names: list[str]
    itemsize: int
    pixels: bool  # whether a tensor with pixels lives here (one of four axes, see `cases`)
    loaded: int = 0  # bytes that threads asked for
    stored: int = 0
    loaded_once: int = 0  # bytes that were touched at all
    stored_once: int = 0
    sectors: int = 0  # of 32 bytes that the warps' requests touch, loads and stores

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


@dataclass
class Launch:
    kernel: str
    memories: list[Memory]


def _launch_of(launched: Launched) -> Launch:
    report, memories = launched.report, []
    for region, tensors in launched.tensors.items():
        loads, stores = report.traffic[region, "load"], report.traffic[region, "store"]
        memories.append(
            Memory(
                [name for name, _ in tensors],
                tensors[0][1].element_size(),
                any(t.dim() == 4 for _, t in tensors),
                loads.bytes,
                stores.bytes,
                report.touched[region, "load"].bytes,
                report.touched[region, "store"].bytes,
                loads.sectors + stores.sectors,
            )
        )
    return Launch(launched.kernel, memories)


def count(prepare: Callable[[], Callable[[], object]], arch: str = "sm_90") -> list[Launch]:
    """Every launch of the function that `prepare()` returns, with what it moved."""
    with installed(Device(arch)) as device:
        function = prepare()
        device.launches.clear()
        function()
        return [_launch_of(launched) for launched in device.launches]
