"""Compare whole models with the peers, over depth, resolution and width.

The tasks are a training step, forward and sampling. A process of its own measures the peak memory
of a training step.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.measurements import REPLAY
from benchmarks.harness.models import Spec, measure, variants
from benchmarks.harness.session import Bench, size_and_gpu, slug

ROUNDS = 5


def specs(size: str, gpu: bool) -> list[tuple[Spec, tuple[str, ...]]]:
    """Return each spec with its tasks."""
    every: tuple[str, ...] = ("train", "forward", "sample")
    if size == "tiny":
        return [(Spec(side=8, levels=2, steps=2, width=8, batch=2), every)]
    base = Spec(side=64, width=256, batch=32) if gpu else Spec()
    wide = base._replace(width=2 * base.width)
    low, big = base._replace(steps=16, precision="bfloat16"), Spec(side=64, steps=32, batch=32)
    train = every[:1]
    if size == "full":
        depths = dict.fromkeys((4, 8, 16, 32), every)
        widths = dict.fromkeys((8, 16, 32), every)
        sides = (16, 32, 128, 256) if gpu else (16, 64, 128)
        rest = {low: every[:2], big: train}
    elif gpu:
        depths, widths, sides = {8: every, 32: every}, {}, (128, 256)
        rest = {low: every[:2]}
    else:  # forward and sampling take the same time in every step, so fewer depths are enough
        depths = {4: train, 8: every, 16: train, 32: every}
        widths, sides, rest = {8: train, 32: train}, (16, 64), {}
    return [
        *((base._replace(steps=k), tasks) for k, tasks in depths.items()),
        *((wide._replace(steps=k), tasks) for k, tasks in widths.items()),
        *rest.items(),
        *((base._replace(side=side, steps=8, batch=8), train) for side in sides),
    ]


def chosen(spec: Spec, task: str, size: str) -> list[str]:
    """Return the variants to measure.

    Compiling a deep model takes minutes, so the default set compiles only one. Its wide models
    leave out variants that trade time for memory.
    """
    compiled = size == "full" or (size == "default" and spec == Spec())
    left_out = set() if compiled else {"plain, compiled"}
    if size == "default" and spec.width == 2 * Spec().width:
        left_out |= {"mflow_kernels, nothing stored", "checkpointing", "memcnn"}
    return [name for name in variants(task) if name not in left_out]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size, gpu = size_and_gpu(metafunc.config)
    rows = [
        pytest.param(spec, task, variant, id=slug(*str(spec).split(), task, variant))
        for spec, tasks in specs(size, gpu)
        for task in tasks
        for variant in chosen(spec, task, size)
    ]
    metafunc.parametrize(("spec", "task", "variant"), rows)


@pytest.mark.benchmark(timer=REPLAY)
def test_model(
    bench: Bench, benchmark: BenchmarkFixture, spec: Spec, task: str, variant: str
) -> None:
    benchmark.group = f"{task}, {spec}"
    names = chosen(spec, task, bench.size)
    memory = task == "train"
    bench.record(benchmark, ("models", spec, task), variant,
                 lambda: measure(bench, spec, task, names, ROUNDS, memory=memory))  # fmt: skip
