"""Measure training steps of Glow-TTS' decoder: as published, and as a masked chain."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.harness.glow_tts import Decoder, Size, masked_chain
from benchmarks.harness.measurements import REPLAY, Call, peak_of_step
from benchmarks.harness.models import assert_trains_alike, train
from benchmarks.harness.processes import in_fresh_processes
from benchmarks.harness.session import Bench, Measured, size_and_gpu, slug

ROUNDS = 7
SECONDS_PER_PEAK = 300  # time limit of a process that measures peak memory
VARIANTS = ("original", "mflow_kernels, stored", "mflow_kernels, reversible")
Job = tuple[Size, int, int, str, str, int]


def build(
    size: Size, batch: int, frames: int, device: torch.device
) -> tuple[Decoder, Tensor, Tensor]:
    """The published decoder, and frames of random lengths from half of `frames` on, with a mask."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(size)
        for block in model.blocks:
            block.end.weight.data.mul_(0.1)  # type: ignore[union-attr]
        lengths = 2 * torch.randint(frames // 4, frames // 2 + 1, (batch, 1, 1))
        mask = (torch.arange(frames) < lengths).float()
        x = torch.randn(batch, size.mels, frames) * mask
    return model.to(device), x.to(device), mask.to(device)


def variant_of(published: Decoder, size: Size, variant: str) -> nn.Module:
    if variant == "original":
        return copy.deepcopy(published)
    chain = masked_chain(published, size)
    chain.reversible = variant.endswith("reversible")
    return chain


def loss_of(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """The negative log-likelihood in nats per sequence, without its constant."""
    z, logdet = model(x, mask)
    return (z.flatten(1).square().sum(1) / 2 - logdet).mean()


def step_peak(job: Job) -> int:
    size, batch, frames, variant, device, threads = job
    torch.set_num_threads(threads)
    published, *given = build(size, batch, frames, torch.device(device))
    model = variant_of(published, size, variant)
    return peak_of_step(model, partial(train, loss_of, model, *given), given[0].device)


def measure(bench: Bench, size: Size, batch: int, frames: int) -> Measured:
    measured = Measured()
    published, *given = build(size, batch, frames, bench.device)
    terms = 9 * sum(p.shape[0] for p in published.parameters())

    def make(variant: str) -> Callable[[], Call]:
        model = variant_of(published, size, variant)
        assert_trains_alike(loss_of, model, published, given, terms, variant, terms=terms)
        spec = f"B={batch} T={frames} {size.blocks} blocks of width {size.width}"
        measured.extra[variant] = {"library": "Glow-TTS", "spec": spec}
        return lambda: partial(train, loss_of, model, *given)

    made = measured.compare(bench, VARIANTS, make, ROUNDS)
    if not bench.check_only:
        device, threads = str(bench.device), bench.threads
        jobs: list[Job] = [(size, batch, frames, variant, device, threads) for variant in made]
        measured.add_peaks(made, in_fresh_processes(step_peak, jobs, 1, SECONDS_PER_PEAK))
    return measured


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    how, gpu = size_and_gpu(metafunc.config)
    sizes = [(Size(4, 2, 4, 2), 2, 8)] if how == "tiny" else [(Size(), 32 if gpu else 8, 400)]
    rows = [pytest.param(*size, v, id=slug("Glow-TTS", v)) for size in sizes for v in VARIANTS]
    metafunc.parametrize(("size", "batch", "frames", "variant"), rows)


@pytest.mark.benchmark(timer=REPLAY)
def test_sequences(
    bench: Bench, benchmark: BenchmarkFixture, size: Size, batch: int, frames: int, variant: str
) -> None:
    benchmark.group = f"Glow-TTS' decoder, B={batch} T={frames}"
    measured = partial(measure, bench, size, batch, frames)
    bench.record(benchmark, ("sequences", size, batch, frames), variant, measured)
