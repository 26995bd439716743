"""How large a batch fits on a GPU, and how many images a second it trains: Glow on large images,
ours, plain eager and gradient checkpointing, networks in bfloat16, each in a process of its own.

The largest batch is predicted from the peaks of two small ones, which grow by the same bytes with
every image, then run; where it does not fit after all, 4% fewer until it does. A model is held to
its reference at a small batch first; on images larger than 256x256 the reference does not fit.
"""

import gc
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.measurements import REPLAY, peak_bytes, seconds
from benchmarks.harness.models import Model, Spec, shared_results
from benchmarks.harness.processes import Died, in_fresh_processes
from benchmarks.harness.session import Bench, Measured, size_of, slug

VARIANTS = ("ours, reversible", "plain", "checkpointing")
SECONDS_A_VARIANT = 60  # its process is ended then
SHARE = 0.97  # of the memory that is free as a process starts: some goes to fragments and libraries


class Ceiling(NamedTuple):
    spec: Spec
    search: bool  # for the largest batch; else one step at spec.batch
    variants: tuple[str, ...]


def ceilings(size: str, gpu: bool) -> list[Ceiling]:
    if size == "tiny":
        low = Spec(3, 8, 2, 2, 8, 2, precision="bfloat16")
        return [Ceiling(low, True, VARIANTS), Ceiling(low._replace(side=16), False, VARIANTS[:1])]
    large = Spec(3, 256, 6, 32, 512, 2, precision="bfloat16")
    made = [Ceiling(large, True, VARIANTS)]
    made += [Ceiling(large._replace(side=s, batch=1), False, VARIANTS[:1]) for s in (512, 1024)]
    return made if gpu else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    found = ceilings(size_of(config), config.getoption("--device").startswith("cuda"))
    rows = [
        pytest.param(c, variant, id=slug(*str(c.spec).split(), variant))
        for c in found for variant in c.variants
    ] or [pytest.param(None, "", id="needs-a-GPU")]  # fmt: skip
    metafunc.parametrize(("ceiling", "variant"), rows)


def _step(model: Model, batch: int) -> tuple[int, float]:
    """Peak bytes and seconds of one training step at a batch, no warm-up: it is long."""
    for parameter in model.module.parameters():
        parameter.grad = None
    model.x = model.spec._replace(batch=batch).images(model.device)
    taken: list[float] = []
    peak = peak_bytes(
        lambda: taken.append(seconds(model.train, model.device, "wall")), model.device
    )
    return peak, taken[0]


def _free(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return 8 * 2**20  # a rehearsal's


def largest(model: Model) -> tuple[int, int, float]:
    """The largest batch, and the peak and seconds of its step."""
    few = model.spec.batch
    small, double = (_step(model, batch)[0] for batch in (few, 2 * few))
    an_image = max(1, (double - small) // few) + model.x[0].nbytes
    for parameter in model.module.parameters():
        parameter.grad = None
    rest = 2 * small - double
    batch = max(1, int((SHARE * _free(model.device) - rest) // an_image))
    while True:
        try:
            return batch, *_step(model, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        _free(model.device)
        batch = min(batch - 1, int(0.96 * batch))


def _work(job: tuple[Ceiling, str, str, int, bool]) -> tuple[int, int, float]:
    """Batch, peak and seconds."""
    ceiling, variant, device_name, threads, check_only = job
    torch.set_num_threads(threads)
    model = Model(ceiling.spec, variant, torch.device(device_name))
    if ceiling.search:
        # Gradients through 192 steps of bfloat16 states, as the peers' are, have few digits.
        model.check("train" if variant.startswith("ours") else "forward")
        shared_results.cache_clear()
    else:
        _step(model, ceiling.spec.batch)  # compiles, loads libraries
    if ceiling.search and not check_only:
        return largest(model)
    return model.spec.batch, *_step(model, model.spec.batch)


def measure(bench: Bench, ceiling: Ceiling, variant: str) -> Measured:
    measured = Measured()
    job = (ceiling, variant, str(bench.device), bench.threads, bench.check_only)
    (told,) = in_fresh_processes(_work, [job], 1, SECONDS_A_VARIANT)
    if isinstance(told, Died):
        measured.faults[variant] = told
        return measured
    batch, peak, taken = told
    measured.seconds[variant] = [taken]
    figures = {
        "largest batch" if ceiling.search else "batch": batch,
        "images/s": round(batch / taken, 2),
        "peak, GiB": round(peak / 2**30, 2),
    }
    spec = ceiling.spec._replace(batch=batch)
    measured.extra[variant] = {"spec": str(spec), "peak_bytes": peak, "figures": figures}
    return measured


@pytest.mark.benchmark(timer=REPLAY)
def test_ceiling(
    bench: Bench, benchmark: BenchmarkFixture, ceiling: Ceiling | None, variant: str
) -> None:
    if ceiling is None:
        pytest.skip("memory ceilings need a CUDA device")
    benchmark.group = f"ceiling, {ceiling.spec}"
    bench.record(benchmark, ("ceiling", ceiling, variant), variant,
                 lambda: measure(bench, ceiling, variant))  # fmt: skip
