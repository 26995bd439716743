"""Compare layers with the peers: each layer alone, and eight steps with constant networks.

Constant networks take no time, so the time is that of the flow's own operators.
"""

from collections.abc import Iterator
from functools import partial

from benchmarks.harness import single_layers
from benchmarks.harness.models import INVERTIBLE, Spec, measure
from benchmarks.harness.session import Group, measured_row
from benchmarks.harness.single_layers import LAYERS, Size

test_layer = measured_row
ROUNDS = 7
TASKS = ("train", "forward", "sample")
SIDES = (4, 8, 16, 32)


def specs(size: str, gpu: bool) -> list[Spec]:
    """Return the specs; a state has 4 * channels channels at half the image's side."""
    if size == "tiny":
        return [Spec(side=8, levels=1, steps=2, batch=2, constant=True)]
    batch, width = (32, 256) if gpu else (8, 64)
    near, deep = ((3, 128), (12, 64)) if gpu else ((3, 64), (12, 16))
    made = [Spec(c, side, 1, 8, width, batch, constant=True) for c, side in (near, deep)]
    return [*made, Spec(48, 16, 1, 8, width, batch, constant=True)] if size == "full" else made


def alone(kind: str, task: str, size: Size, compiled: bool) -> Group:
    """One layer in one task. Compiling takes seconds, more than everything else in a group."""
    variants = single_layers.variants(kind, compiled)
    measured = partial(
        single_layers.measure, kind=kind, size=size, task=task, names=variants, rounds=ROUNDS
    )
    words = (kind, *str(size).split(), task)
    return Group(f"{kind} alone, {task}, {size}", words, variants, measured)


def sizes(gpu: bool) -> list[Size]:
    return [Size(12, side, *((256, 32) if gpu else (64, 8))) for side in SIDES]


def groups(size: str, gpu: bool) -> Iterator[Group]:
    variants = [name for name in INVERTIBLE if size == "full" or name != "plain, compiled"]
    for spec in specs(size, gpu):
        for task in TASKS:
            measured = partial(
                measure, spec=spec, task=task, variants=variants, rounds=ROUNDS, memory=False
            )
            yield Group(f"{task}, {spec}", (*str(spec).split(), task), variants, measured)
    for kind in LAYERS:
        for one in [Size(4, 2, 8, 2)] if size == "tiny" else sizes(gpu):
            for task in TASKS:
                yield alone(kind, task, one, size == "full")
