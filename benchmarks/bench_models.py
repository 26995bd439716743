"""Compare whole models with the peers, over depth, resolution and width.

The tasks are a training step, forward and sampling. A process of its own measures the peak memory
of a training step.
"""

from collections.abc import Iterator
from functools import partial

from benchmarks.harness.models import Spec, measure, variants
from benchmarks.harness.session import Group, measured_row

test_model = measured_row
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


def groups(size: str, gpu: bool) -> Iterator[Group]:
    for spec, tasks in specs(size, gpu):
        for task in tasks:
            names = chosen(spec, task, size)
            measured = partial(
                measure, spec=spec, task=task, variants=names, rounds=ROUNDS,
                memory=task == "train",
            )  # fmt: skip
            yield Group(f"{task}, {spec}", (*str(spec).split(), task), names, measured)
