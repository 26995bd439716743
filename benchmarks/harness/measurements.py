"""Measure time, memory, kernel launches and bandwidth, in the same way for every benchmark.

Variants of a group run interleaved (A B C, then B C A), so that other load on the machine affects
all of them alike. On a GPU, events time each call; the device is idle before it, and the cache can
be flushed. On a CPU, the wall clock times each call, or process time on a busy machine. The number
of threads is torch's setting.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
FLUSH_BYTES = 256 * 2**20  # more than any GPU's second-level cache
CERTAIN = 0.01
SECONDS_OF_ROUNDS = 5.0
# Seconds. A round repeats shorter calls. Events are more precise than the clocks of a CPU.
SHORTEST_ROUND = {"cpu": 5e-3, "cuda": 5e-4}

Call = Callable[[], object]


@dataclass
class Replay:
    """A clock for pytest-benchmark that replays rounds measured before.

    pytest-benchmark times one test after another, so it cannot interleave variants. The rounds are
    therefore measured first. pytest-benchmark then times `play`, which advances this clock by them.
    """

    now: float = 0.0
    rounds: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += self.rounds.pop(0)


REPLAY = Replay()


@cache
def _cache_filler(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES // 4, device=device)


def seconds(call: Call, device: torch.device, clock: str, flush: bool = False) -> float:
    """Return the seconds that one call takes."""
    if device.type != "cuda":
        now = CLOCKS[clock]
        start = now()
        call()
        return now() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if flush:
        _cache_filler(device).zero_()  # while this runs, the host queues the call below
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
    most: int = 0,
) -> dict[str, list[float]]:
    """Return, for each variant, the seconds per call in each of `rounds` rounds.

    Further rounds, up to `most`, follow while a ratio of two variants is uncertain by more than
    `CERTAIN`, for at most `SECONDS_OF_ROUNDS` in all.

    Two calls of each variant warm up first. Each round starts with the next variant, because the
    first call of a round finds its caches emptied by the garbage collection between rounds.

    Args:
        prepares: one function per variant. It does the work that is not timed, such as the forward
            pass before a backward pass, and returns the call to time.
    """
    calls = {}
    for name, prepare in prepares.items():
        first = [seconds(prepare(), device, clock, flush) for _ in range(2)]
        calls[name] = max(1, min(200, int(SHORTEST_ROUND[device.type] / max(min(first), 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in prepares}
    collected = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # collections between rounds would take tenths of a second for older objects
    try:
        names = deque(prepares)
        began = time.perf_counter()
        for done in range(max(rounds, most)):
            late = time.perf_counter() - began > SECONDS_OF_ROUNDS
            if done >= rounds and (late or uncertainty([*taken.values()]) <= CERTAIN):
                break
            for name in names:
                prepare = prepares[name]
                each = [seconds(prepare(), device, clock, flush) for _ in range(calls[name])]
                taken[name].append(sum(each) / len(each))
            names.rotate(-1)
            gc.collect()
    finally:
        gc.unfreeze()
        if collected:
            gc.enable()
    return taken


def uncertainty(rounds: Sequence[Sequence[float]]) -> float:
    """Return the largest relative standard error of a median ratio to the first variant.

    It is estimated from the quartiles, as for a normal distribution.
    """
    first, *others = rounds or [[]]
    errors = [0.0]
    for other in others:
        ratios = [a / b for a, b in zip(other, first, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        errors.append(1.2533 * (high - low) / 1.349 / middle / len(ratios) ** 0.5)
    return max(errors)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the peak memory of torch's allocator during a call, minus what was allocated before.

    Memory that libraries such as oneDNN and cuDNN allocate by themselves is not included.
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


def peak_of_step(module: nn.Module, step: Call, device: torch.device) -> int:
    """Return the peak bytes of a training step, including gradients but not the model and images.

    Run it in a process of its own.
    """
    step()  # allocates what later steps reuse
    module.zero_grad()
    return peak_bytes(step, device)


def launches(call: Call, device: torch.device) -> int | None:
    """Return the number of kernels that a call launches on a GPU, or None on a CPU."""
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
    """Return the median bandwidth of copying `megabytes` in memory: bytes read and written per
    second."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    call = lambda: target.copy_(source)  # noqa: E731
    seconds(call, device, "wall")
    return 2 * source.nbytes / median(seconds(call, device, "wall") for _ in range(7))
