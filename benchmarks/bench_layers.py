"""Compare layers with the peers: one step of flow, and eight steps with constant networks.

Constant networks take no time, so the time is that of the flow's own operators.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.measurements import REPLAY
from benchmarks.harness.models import INVERTIBLE, Spec, measure
from benchmarks.harness.session import Bench, size_and_gpu, slug

ROUNDS = 7
TASKS = ("train", "forward", "sample")


def specs(size: str, gpu: bool) -> list[Spec]:
    """Return the specs; a state has 4 * channels channels at half the image's side."""
    if size == "tiny":
        return [Spec(side=8, levels=1, steps=2, batch=2, constant=True)]
    batch, width = (32, 256) if gpu else (8, 64)
    near, deep = ((3, 128), (12, 64)) if gpu else ((3, 64), (12, 16))
    made = [Spec(c, side, 1, 8, width, batch, constant=True) for c, side in (near, deep)]
    made += [Spec(c, side, 1, 1, width, batch) for c, side in (near, deep)]
    if size == "full":
        made += [Spec(48, 16, 1, 8, width, batch, constant=True), Spec(48, 16, 1, 1, width, batch)]
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size, gpu = size_and_gpu(metafunc.config)
    rows = [
        pytest.param(spec, task, variant, id=slug(*str(spec).split(), task, variant))
        for spec in specs(size, gpu)
        for task in TASKS
        for variant in variants(size)
    ]
    metafunc.parametrize(("spec", "task", "variant"), rows)


def variants(size: str) -> list[str]:
    return [name for name in INVERTIBLE if size == "full" or name != "plain, compiled"]


@pytest.mark.benchmark(timer=REPLAY)
def test_layer(
    bench: Bench, benchmark: BenchmarkFixture, spec: Spec, task: str, variant: str
) -> None:
    benchmark.group = f"{task}, {spec}"
    names = variants(bench.size)
    bench.record(benchmark, ("layers", spec, task), variant,
                 lambda: measure(bench, spec, task, names, ROUNDS, memory=False))  # fmt: skip
