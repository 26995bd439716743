"""Time, memory, launches and bandwidth, each measured in one way for every benchmark.

Variants of a group run interleaved, A B C, B C A, so that whatever else the machine does falls on
all of them alike. On a GPU a call is timed by events around it, the device idle before and the
cache flushed where asked; on a CPU by wall clock (or by the process's own time, for a machine that
is busy with other work), with as many threads as torch is set to.
"""

import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
FLUSH_BYTES = 256 * 2**20  # more than any GPU's second-level cache
# Seconds: a round of shorter calls is several of them. Events tell time better than a CPU's clock.
SHORTEST_ROUND = {"cpu": 5e-3, "cuda": 5e-4}

Call = Callable[[], object]


@dataclass
class Replay:
    """A clock for pytest-benchmark that plays back rounds measured elsewhere.

    pytest-benchmark times one test after another; rounds that are interleaved over variants have to
    be measured before, and are handed to it by a target that moves this clock on.
    """

    now: float = 0.0
    rounds: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += self.rounds.pop(0)


REPLAY = Replay()


def flush_cache(device: torch.device) -> None:
    _flushed(device).zero_()


@cache
def _flushed(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES // 4, device=device)


def seconds(call: Call, device: torch.device, clock: str, flush: bool = False) -> float:
    """Of one call."""
    if device.type != "cuda":
        now = CLOCKS[clock]
        start = now()
        call()
        return now() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if flush:
        flush_cache(device)  # and while it runs, the host gets ahead of the device
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    prepares: dict[str, Callable[[], Call]],
    rounds: int,
    device: torch.device,
    clock: str,
    *,
    flush: bool = False,
) -> dict[str, list[float]]:
    """Seconds a call of each variant, a list of `rounds`, after two calls that warm up.

    A round starts with the next variant each time: the first one finds its caches emptied, by
    Python's garbage collection between rounds.

    Args:
        prepares: each runs what comes before (a backward pass's forward) and returns what to time.
    """
    calls = {}
    for name, prepare in prepares.items():
        first = [seconds(prepare(), device, clock, flush) for _ in range(2)]
        calls[name] = max(1, min(200, int(SHORTEST_ROUND[device.type] / max(min(first), 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in prepares}
    collected = gc.isenabled()
    gc.disable()
    try:
        names = deque(prepares)
        for _ in range(rounds):
            for name in names:
                prepare = prepares[name]
                each = [seconds(prepare(), device, clock, flush) for _ in range(calls[name])]
                taken[name].append(sum(each) / len(each))
            names.rotate(-1)
            gc.collect()
    finally:
        if collected:
            gc.enable()
    return taken


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most that torch's allocator had handed out during a call, beyond what it had before.

    What libraries allocate by themselves (oneDNN, cuDNN) is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    events = [e for e in _events(profiler) if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels that a call launches on a GPU; None on a CPU, which launches nothing."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    on_device = [e for e in _events(profiler) if e.device_type() == torch.autograd.DeviceType.CUDA]
    return sum(not e.name().startswith(("Memcpy", "Memset")) for e in on_device)


def _events(profiler: profile) -> list[Any]:
    assert profiler.profiler is not None
    return list(profiler.profiler.kineto_results.events())


@cache
def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes a second, read and written, of copying that much from memory to memory: the median."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    call = lambda: target.copy_(source)  # noqa: E731
    seconds(call, device, "wall")
    return 2 * source.nbytes / median(seconds(call, device, "wall") for _ in range(7))
