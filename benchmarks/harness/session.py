"""One run of the benchmarks: its options and environment, and groups of variants measured once."""

import os
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import mflow_kernels
from benchmarks.harness.measurements import REPLAY, Call, copy_bandwidth, interleaved, peak_of_step
from benchmarks.harness.output import commit
from benchmarks.harness.processes import Died, Late, in_fresh_processes
from benchmarks.harness.saved_runs import format_time

SECONDS_PER_PEAK = 300  # time limit of a process that measures peak memory
MOST_ROUNDS = 25
SECONDS_OF_CLAIMS = 285  # after which no group starts
TIME_LIMIT = "the time limit of"


class Missing(Exception):
    """The reason why a row cannot be measured. The row is skipped and the reason is saved."""


@dataclass
class Measured:
    """Results of a group of variants.

    Attributes:
        seconds: interleaved rounds of each variant.
        extra: further results of each variant, saved with its row.
        faults: why a variant was not measured.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, Exception] = field(default_factory=dict)

    def compare(
        self,
        bench: "Bench",
        variants: Iterable[str],
        make: Callable[[str], Callable[[], Call]],
        rounds: int,
        *,
        flush: bool = False,
    ) -> dict[str, Callable[[], Call]]:
        """Time the variants that agree with their reference, interleaved; return what `make` did.

        Args:
            make: builds and checks a variant. It raises an error if the variant disagrees or is
                missing, and else returns the function that prepares each call, as `interleaved`
                takes it.
            rounds: the default number.
        """
        prepares = {}
        for variant in variants:
            try:
                prepares[variant] = make(variant)
            except Exception as error:
                self.fault(variant, error)
        if not bench.check_only:
            self.seconds = interleaved(
                prepares, bench.rounds(rounds), bench.device, bench.clock, flush=flush,
                most=bench.most_rounds,
            )  # fmt: skip
        return prepares

    def fault(self, variant: str, error: Exception) -> None:
        """Record why a variant was not measured.

        Wrong results, and any error of this package, fail the row. Any other error of a peer is a
        limit of that peer (such as memcnn under autocast), and the row is skipped.
        """
        if not variant.startswith("mflow_kernels") and not isinstance(
            error, AssertionError | Missing
        ):
            lines = str(error).splitlines() or [""]
            error = Missing(f"{variant}: {type(error).__name__}: {lines[0]}")
        traceback.clear_frames(error.__traceback__)  # the frames hold models
        self.faults[variant] = error

    def add_peaks(
        self,
        bench: "Bench",
        variants: Sequence[str],
        step_of: Callable[..., tuple[nn.Module, Call]],
        *given: object,
        workers: int,
    ) -> None:
        """Measure the peak memory of a training step of each variant, in a process of its own.

        Args:
            step_of: called as step_of(*given, variant, device). Returns a model and its step.
            workers: processes at once. Peaks of allocators do not depend on load.
        """
        if bench.check_only:
            return
        jobs = [(step_of, (*given, variant, bench.device), bench.threads) for variant in variants]
        peaks = in_fresh_processes(_step_peak, jobs, workers, SECONDS_PER_PEAK)
        for variant, peak in zip(variants, peaks, strict=True):
            if isinstance(peak, Late):
                self.faults[variant] = Missing(f"peak memory of {variant}: {peak}")
            elif isinstance(peak, Died):
                self.fault(variant, RuntimeError(f"peak memory of {variant}: {peak}"))
            else:
                self.extra[variant]["peak_bytes"] = peak


def _step_peak(job: tuple[Callable[..., tuple[nn.Module, Call]], tuple[Any, ...], int]) -> int:
    step_of, given, threads = job
    torch.set_num_threads(threads)
    model, step = step_of(*given)
    return peak_of_step(model, step, given[-1])


@dataclass
class Bench:
    """The options of a run, its environment, and the group of variants measured last.

    `say` shows a line to the user.
    """

    device: torch.device
    size: str  # tiny, default or full
    clock: str
    threads: int
    environment: dict[str, Any]
    time_limit: float
    chosen_rounds: int | None
    check_only: bool = False
    claims_only: bool = False  # rounds adapt to the noise, and only progress is shown
    groups: int = 0  # number of groups to measure
    say: Callable[[str], None] = field(default=lambda line: None)
    started: float = field(default_factory=time.monotonic)
    begun: int = 0
    last: "tuple[Group, Measured | Exception] | None" = None

    def rounds(self, default: int) -> int:
        return self.chosen_rounds or (2 if self.size == "tiny" else default)

    @property
    def most_rounds(self) -> int:
        """Claims get more rounds where they are noisy."""
        return MOST_ROUNDS if self.claims_only and not self.chosen_rounds else 0

    def _progress(self, name: str) -> str:
        passed = int(time.monotonic() - self.started)
        return f"[{self.begun}/{self.groups}, {passed // 60}:{passed % 60:02}] {name}"

    def record(self, benchmark: BenchmarkFixture, group: "Group", variant: str) -> None:
        """Report a variant to pytest-benchmark. The first call of a group measures all variants."""
        benchmark.group = group.name
        if self.last is None or self.last[0] is not group:
            self.last = None
            self.begun += 1
            if time.monotonic() - self.started > self.time_limit:
                pytest.skip(f"{TIME_LIMIT} {self.time_limit:g} s was reached")
            self.say(self._progress(group.name))
            try:
                found = group.measure(self)
                self.last = group, found
                for line in lines(found, self.check_only, self.claims_only):
                    self.say(line)
            except Exception as error:  # every variant reports it; none measures again
                traceback.clear_frames(error.__traceback__)
                self.last = group, error
                self.say(f"  not measured: {error}")
        measured = self.last[1]
        fault = measured if isinstance(measured, Exception) else measured.faults.get(variant)
        if isinstance(fault, Missing):
            pytest.skip(str(fault))
        if fault is not None:
            raise fault
        assert isinstance(measured, Measured)
        if self.check_only:
            pytest.skip("agrees with its reference; --check does not measure")
        REPLAY.rounds = list(measured.seconds[variant])
        benchmark.pedantic(REPLAY.play, rounds=len(REPLAY.rounds))
        benchmark.extra_info.update(
            {**self.environment, "variant": variant, **measured.extra.get(variant, {})}
        )


@dataclass(frozen=True, eq=False)
class Group:
    """Variants that are measured together.

    Attributes:
        name: of the group in the results.
        words: of the id of each row, before the variant.
        measure: measures the variants, or raises the reason why it cannot.
    """

    name: str
    words: tuple[str, ...]
    variants: Sequence[str]
    measure: Callable[[Bench], Measured]


@pytest.mark.benchmark(timer=REPLAY)
def measured_row(bench: Bench, benchmark: BenchmarkFixture, group: Group, variant: str) -> None:
    """The test of each bench file, which takes its rows from the file's `groups(size, gpu)`."""
    bench.record(benchmark, group, variant)


def lines(measured: Measured, check_only: bool = False, brief: bool = False) -> Iterator[str]:
    """Yield a line for each variant of a group: time, its ratio to the first one's, peak memory,
    and whether its results agree with the reference, or why it was not measured.

    With `brief`, there are only lines for variants that were not measured.
    """
    first = next(iter(measured.seconds.values()), [])
    for variant, seconds in measured.seconds.items():
        if variant in measured.faults or brief:
            continue
        ratio = median(a / b for a, b in zip(seconds, first, strict=False))
        peak = measured.extra.get(variant, {}).get("peak_bytes")
        memory = "" if peak is None else f"{peak / 2**20:.1f} MiB"
        time = format_time(median(seconds))
        yield f"  {variant:30} {time:>9} {ratio:7.2f} {memory:>12}   agrees"
    for variant, error in measured.faults.items():
        kind = "skipped" if isinstance(error, Missing) else "failed"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        yield f"  {variant:30} {kind}: {reason.removeprefix(f'{variant}: ')}"
    if check_only and not measured.faults:
        yield "  every variant agrees"


def slug(*names: str) -> str:
    """Join names to a row's id that pytest's -k accepts, such as "K8-train-plain_channels_last"."""
    return "-".join(re.sub(r"[,\s]+", "_", name.replace("=", "")) for name in names)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def size_and_gpu(config: pytest.Config) -> tuple[str, bool]:
    """Return the chosen size (tiny, default or full), and whether the run is on a GPU."""
    option = config.getoption
    size = "full" if option("--full") else "tiny" if option("--tiny") else "default"
    return size, option("--device").startswith("cuda")


def open_bench(config: pytest.Config, claims_only: bool, groups: int) -> Bench:
    """Create the Bench of the chosen options, and measure the machine's copy bandwidth."""
    option = config.getoption
    device = torch.device(option("--device"))
    size, on_gpu = size_and_gpu(config)
    megabytes = 8 if size == "tiny" or option("--check") else 1024 if on_gpu else 128
    environment = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {_cpu()}",
        "threads": option("--threads"),
        "clock": "CUDA events" if on_gpu else f"{option('--clock')} time",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "mflow_kernels": mflow_kernels.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("MFLOW_COMMIT") or commit(),
        "copy_bytes_per_second": copy_bandwidth(device, megabytes),
    }
    if on_gpu:
        torch.cuda.empty_cache()  # other processes measure how much memory is free
    default = 540 if size == "default" else float("inf")
    limit = option("--time-limit") or (SECONDS_OF_CLAIMS if claims_only else default)
    return Bench(
        device, size, option("--clock"), option("--threads"), environment, limit,
        option("--rounds"), option("--check"), claims_only, groups, _writer(config),
    )  # fmt: skip


def _writer(config: pytest.Config) -> Callable[[str], None]:
    """Return a function that writes a line to the terminal while tests run."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)
            reporter.flush()

    return say if reporter is not None else lambda line: None
