"""Compare layers with the peers: one step of flow, and eight steps with constant networks.

Constant networks take no time, so the time is that of the flow's own operators.
"""

from collections.abc import Iterator
from functools import partial

from benchmarks.harness.models import INVERTIBLE, Spec, measure
from benchmarks.harness.session import Group, measured_row

test_layer = measured_row
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


def groups(size: str, gpu: bool) -> Iterator[Group]:
    variants = [name for name in INVERTIBLE if size == "full" or name != "plain, compiled"]
    for spec in specs(size, gpu):
        for task in TASKS:
            measured = partial(
                measure, spec=spec, task=task, variants=variants, rounds=ROUNDS, memory=False
            )
            yield Group(f"{task}, {spec}", (*str(spec).split(), task), variants, measured)
