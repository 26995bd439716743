"""Forecast the time of whole steps on an H100, for a run on a GPU to check.

`whole_steps` gives a lower bound, which no model reaches. A forecast adds what the bound leaves
out: products and copies below the card's peaks, the latency of each launch, and the host. It is
arithmetic on the counted launches with the constants below. None of it was measured.

    bound       least time of the bytes and products of all launches
    graphs      forecast of the device's time: with CUDA graphs the host does not matter
    eager       forecast without graphs: the device's or the host's time, whichever is longer
    optimizer   forecast of clipping and Adam, which no other column of a training step has
    measured    median of a run of the benchmarks, without graphs; empty until there is one

"plain, compiled" is plain torch with every run of launches without products fused into one launch
that moves as many bytes as the largest of them. With --measured FILES, results of the benchmarks
fill the last column.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness.measurements import Call
from benchmarks.harness.models import Model, Spec
from benchmarks.harness.output import command_parser, text_table
from benchmarks.reports import step_counts
from mflow_kernels.training.account import Kernel
from mflow_kernels.training.cards import CARDS, Card

CARD = "H100"
# Shares of the card's peaks. Our kernels wait for each product, with one or two programs on a
# multiprocessor; cuDNN and cuBLAS overlap them. `efficiency` counts 28.9 ms of products, padding
# and L2 for the 14 TFLOP of celeba64's networks, half of the peak, with no wait. Our float32
# products are three of tf32 each.
BANDWIDTH = 0.8
OUR_PRODUCTS, LIBRARY_PRODUCTS = 0.3, 0.5
LATENCY = 2e-6  # seconds of a launch on the device, beside its work
HOST = {"ours": 12e-6, "torch": 8e-6, "compiled": 5e-6}  # seconds of a launch on the host
OURS = ("network", "hopper", "dh1", "dh2", "sum_", "accumulate", "actnorm", "conv1x1", "coupling",
        "rebuild", "weight_gradient", "masked_inverse")  # fmt: skip
# Adam and the clipping of gradients: float32 numbers that are read and written for a parameter.
OPTIMIZER_NUMBERS = 9

TASKS = {"train": "training step", "sample": "sampling"}
VARIANTS = {
    "mflow_kernels, reversible": "mflow_kernels, reversible",
    "mflow_kernels, stored": "mflow_kernels, stored",
    "plain, channels_last": "plain, channels_last",
    "plain, compiled": "plain, channels_last",
}
# Specs that `gpu_run.sh` measures, and the preset celeba64 at batch 128.
SPECS = (
    Spec(side=64, width=256, batch=32, steps=16, precision="bfloat16"),
    Spec(side=64, width=512, batch=128, steps=32, precision="bfloat16"),
)


class Row(NamedTuple):
    """A task of a variant. Times are in seconds."""

    spec: str
    task: str
    variant: str
    launches: int
    bound: float
    device: float
    host: float
    optimizer: float

    @property
    def eager(self) -> float:
        return max(self.device, self.host)


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The launches after a compiler has fused those between products."""
    made: list[Kernel] = []
    for product, grouped in groupby(kernels, key=lambda k: k.flops > 0):
        run = list(grouped)
        made += run if product else [max(run, key=lambda k: k.moved)]
    return made


def device_seconds(kernel: Kernel, card: Card) -> float:
    ours = kernel.name.startswith(OURS)
    rate = card.throughput.get(kernel.dtype, float("inf"))
    share = OUR_PRODUCTS if ours else LIBRARY_PRODUCTS
    if ours and kernel.dtype == torch.float32:
        share /= 3
    return LATENCY + max(kernel.moved / (BANDWIDTH * card.bandwidth), kernel.flops / (share * rate))


def forecast(spec: str, task: str, variant: str, kernels: Sequence[Kernel], parameters: int) -> Row:
    """The row of counted launches."""
    card = CARDS[CARD]
    if variant == "plain, compiled":
        kernels = fused(kernels)
    numbers = OPTIMIZER_NUMBERS * parameters if task == "train" else 0
    optimizer = 4 * numbers / (BANDWIDTH * card.bandwidth)
    device = sum(device_seconds(k, card) for k in kernels)
    torchs = "compiled" if variant == "plain, compiled" else "torch"
    host = sum(HOST["ours" if k.name.startswith(OURS) else torchs] for k in kernels)
    bound = card.lower_bound(kernels)
    return Row(spec, task, variant, len(kernels), bound, device, host, optimizer)


def count(spec: Spec, variant: str, task: str) -> Row:
    model = Model(spec, VARIANTS[variant], torch.device("cpu"))
    made: list[Call] = []
    step_counts.count(lambda: made.append(model.task(task)), model.module, model.x)
    kernels = step_counts.count(made[0], model.module, model.x)
    return forecast(str(spec), task, variant, kernels, model.parameters)


def measured(files: Iterable[Path]) -> dict[tuple[str, str, str], float]:
    """Median seconds of a run's benchmarks by spec, task and variant."""
    found = {}
    for file in files:
        for one in json.loads(file.read_text())["benchmarks"]:
            about = one["extra_info"]
            if about.keys() >= {"spec", "task", "variant"}:
                key = about["spec"], about["task"], about["variant"]
                found[key] = statistics.median(one["stats"]["data"])
    return found


def table(rows: Sequence[Row], times: dict[tuple[str, str, str], float]) -> str:
    head = ("task", "model", "variant", "launches", "bound ms", "graphs ms", "eager ms",
            "optimizer ms", "measured ms")  # fmt: skip
    cells = []
    for row in rows:
        time = times.get((row.spec, row.task, row.variant))
        cells.append(
            (TASKS[row.task], row.spec, row.variant, row.launches,
             *(f"{1e3 * t:.1f}" for t in (row.bound, row.device, row.eager, row.optimizer)),
             "" if time is None else f"{1e3 * time:.1f}")
        )  # fmt: skip
    return text_table(head, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.reports.forecast", __doc__)
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, in seconds")
    options = parser.parse_args(arguments)
    specs = (Spec(side=8, levels=2, steps=2, width=16, batch=2),) if options.tiny else SPECS
    rows = [
        count(spec, variant, task)
        for spec in specs
        for task in TASKS
        for variant in VARIANTS
        if task == "train" or "reversible" not in variant
    ]
    print(f"Forecast for an {CARD}, by arithmetic; only the last column was measured")
    print(table(rows, measured(options.measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
