"""Whole models against the peers: training step, forward and sampling; against depth, resolution
and width, with the peak memory of a training step from a process of its own."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks._bench import Bench, size_of
from benchmarks._measure import REPLAY
from benchmarks._models import INVERTIBLE, RECOMPUTING, Spec, measure

ROUNDS = 5


def specs(size: str, gpu: bool) -> list[tuple[Spec, tuple[str, ...]]]:
    """What is measured, and in which tasks."""
    every = ("train", "forward", "sample")
    if size == "tiny":
        return [(Spec(side=8, levels=2, steps=2, width=8, batch=2), every)]
    base = Spec(side=64, width=256, batch=32) if gpu else Spec()
    deep = (4, 8, 16, 32) if size == "full" or not gpu else (8, 32)
    # Forward and sampling cost the same at every step.
    few = every if size == "full" or gpu else ("train",)
    depths = [(base._replace(steps=k), every if k in (8, 32) else few) for k in deep]
    sides = (128, 256) if gpu else (16, 64)
    wide = [(base._replace(width=2 * base.width, steps=k), every) for k in (8, 16, 32)]
    low = base._replace(steps=16, precision="bfloat16")
    if size == "full":
        sides = (16, 32, 128, 256) if gpu else (16, 64, 128)
        big = base._replace(side=64, batch=32, steps=32)
        rest = [*wide, (low, ("train", "forward")), (big, ("train",))]
    elif gpu:
        rest = [(low, ("train", "forward"))]
    else:
        rest = [(wide[1][0], ("train",))]
    sizes = [(base._replace(side=side, steps=8, batch=8), ("train",)) for side in sides]
    return list(dict.fromkeys([*depths, *sizes, *rest]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    size = size_of(config)
    rows = []
    for spec, tasks in specs(size, config.getoption("--device").startswith("cuda")):
        for task in tasks:
            for variant in variants(task, size):
                name = str(spec).replace(" ", ",")
                rows.append(pytest.param(spec, task, variant, id=f"{name}-{task}-{variant}"))
    metafunc.parametrize(("spec", "task", "variant"), rows)


def variants(task: str, size: str) -> list[str]:
    """Those that recompute differ in training alone; compiling a whole model takes minutes."""
    names = INVERTIBLE[:1] + RECOMPUTING + INVERTIBLE[1:] if task == "train" else INVERTIBLE
    return [name for name in names if name != "plain, compiled" or size == "full"]


@pytest.mark.benchmark(timer=REPLAY)
def test_model(
    bench: Bench, benchmark: BenchmarkFixture, spec: Spec, task: str, variant: str
) -> None:
    benchmark.group = f"{task}, {spec}"
    names = variants(task, bench.size)
    bench.record(
        benchmark, (spec, task), variant,
        lambda: measure(bench, spec, task, names, bench.rounds(ROUNDS), memory=task == "train"),
    )  # fmt: skip
