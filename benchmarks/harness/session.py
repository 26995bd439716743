"""What benchmarks share: groups of variants measured once, and what every row carries."""

import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import mflow_kernels
from benchmarks.harness.measurements import REPLAY, copy_bandwidth
from benchmarks.harness.processes import Died

ROOT = Path(__file__).resolve().parents[2]


class Missing(Exception):
    """Why a row is not measured: it is skipped, and the reason saved."""


@dataclass
class Measured:
    """A group of variants: interleaved seconds, what else is known of each row, and what kept a
    variant from being measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, Exception] = field(default_factory=dict)

    def fault(self, variant: str, error: Exception) -> None:
        """Note why a variant is not measured. Ours failing and outputs that are wrong fail their
        rows; what else a peer raises is its own limit (memcnn under autocast, an operator that
        torch has dropped): its row is skipped."""
        if not variant.startswith("ours") and not isinstance(error, AssertionError | Missing):
            told = str(error).splitlines() or [""]
            error = Missing(f"{variant}: {type(error).__name__}: {told[0]}")
        traceback.clear_frames(error.__traceback__)  # they hold models
        self.faults[variant] = error

    def peaks(self, variants: Iterable[str], told: Sequence[int | Died]) -> None:
        """Note the peak memory of variants, each from a process of its own."""
        for variant, peak in zip(variants, told, strict=True):
            if isinstance(peak, Died):
                self.faults[variant] = RuntimeError(f"peak memory of {variant}: {peak}")
            else:
                self.extra[variant]["peak_bytes"] = peak


@dataclass
class Bench:
    """What the options chose, and the group measured last."""

    device: torch.device
    size: str  # tiny, default or full
    clock: str
    threads: int
    environment: dict[str, Any]
    time_limit: float
    chosen_rounds: int | None
    check_only: bool = False
    started: float = field(default_factory=time.monotonic)
    last: tuple[object, Measured | Exception] | None = None

    def rounds(self, default: int) -> int:
        return self.chosen_rounds or (2 if self.size == "tiny" else default)

    def record(
        self,
        benchmark: BenchmarkFixture,
        key: tuple[object, ...],
        variant: str,
        measure: Callable[[], Measured],
    ) -> None:
        """Hand one variant of the group `key` to pytest-benchmark; the first of its variants
        measures them all."""
        if self.last is None or self.last[0] != key:
            self.last = None
            if time.monotonic() - self.started > self.time_limit:
                pytest.skip(f"the time limit of {self.time_limit:g} s was reached")
            try:
                self.last = key, measure()
            except Exception as error:  # told by every variant, not met again by each
                traceback.clear_frames(error.__traceback__)
                self.last = key, error
        measured = self.last[1]
        fault = measured if isinstance(measured, Exception) else measured.faults.get(variant)
        if isinstance(fault, Missing):
            pytest.skip(str(fault))
        if fault is not None:
            raise fault
        assert isinstance(measured, Measured)
        if self.check_only:
            pytest.skip("agrees with its reference; --check measures nothing")
        REPLAY.rounds = list(measured.seconds[variant])
        benchmark.pedantic(REPLAY.play, rounds=len(REPLAY.rounds))
        benchmark.extra_info.update(
            {**self.environment, "variant": variant, **measured.extra.get(variant, {})}
        )


def slug(*names: str) -> str:
    """A row's id, of characters that pytest's -k takes: "K8-train-ours_stored"."""
    return "-".join(re.sub(r"[,\s]+", "_", name.replace("=", "")) for name in names)


def _commit() -> str:
    """Of the working tree, or as MFLOW_COMMIT tells it where there is no git."""
    told = os.environ.get("MFLOW_COMMIT")
    if told:
        return told
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    dirty = "-dirty" if changes.stdout.strip() else ""
    return head.stdout.strip() + dirty if head.returncode == 0 else "unknown"


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


def size_of(config: pytest.Config) -> str:
    """How much is asked for: tiny, default or full."""
    if config.getoption("--full"):
        return "full"
    return "tiny" if config.getoption("--tiny") else "default"


def open_bench(config: pytest.Config) -> Bench:
    """What the options choose, with the machine's copy bandwidth measured."""
    option = config.getoption
    device, size = torch.device(option("--device")), size_of(config)
    on_gpu = device.type == "cuda"
    megabytes = 8 if size == "tiny" or option("--check") else 1024 if on_gpu else 128
    environment = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {_cpu()}",
        "threads": option("--threads"),
        "clock": "CUDA events" if on_gpu else f"{option('--clock')} time",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "mflow_kernels": mflow_kernels.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "copy_bytes_per_second": copy_bandwidth(device, megabytes),
    }
    if on_gpu:
        torch.cuda.empty_cache()  # other processes measure how much fits
    # The default set ends within ten minutes on machines slower than most, too.
    limit = option("--time-limit") or (540 if size == "default" else float("inf"))
    return Bench(device, size, option("--clock"), option("--threads"), environment, limit,
                 option("--rounds"), option("--check"))  # fmt: skip
