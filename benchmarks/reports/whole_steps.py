"""Count the launches, bytes and floating point operations of a model's kernels, with no GPU.

The count includes the coupling networks. The same model in other packages is counted beside it.

    python -m benchmarks.reports.whole_steps --width 128 512

counts three tasks of one Glow in every package, with the same weights: the second training step
(forward and backward, without the optimizer), sampling, and evaluation (the forward pass without
gradients).
The docstring of `mflow_kernels/training/account.py` has the rules of the count. "over plain" is
the ratio of bytes to those of plain eager PyTorch in the same dtypes.

The lower bound of a card is a sum over kernels. Each kernel takes at least the time that its bytes
take at the card's published bandwidth, and at least the time that its products take at the card's
published tensor throughput. Real kernels take longer, and the time between launches is left out. It
is not a measured speed.

With --check FILE the exit code is 1 if a variant moves more bytes, or makes more launches, than
FILE records; --record FILE writes such a file.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness.measurements import Call
from benchmarks.harness.models import Model, Spec
from benchmarks.harness.output import command_parser, markdown_table, save_json, text_table
from benchmarks.harness.session import Missing
from benchmarks.reports import step_counts
from benchmarks.reports.step_counts import PARTS
from mflow_kernels.training.cards import CARDS

TASKS = {"train": "training step", "sample": "sampling", "forward": "evaluation"}
# Variants that differ from the others only in training.
RECOMPUTING = ("mflow_kernels, reversible", "checkpointing")
VARIANTS = ("mflow_kernels, stored", "mflow_kernels, reversible", "plain", "plain, channels_last",
            "checkpointing", "normflows", "nflows", "FrEIA")  # fmt: skip


@dataclass
class Row:
    """A task of one variant of one model."""

    spec: str
    width: int
    task: str
    variant: str
    launches: int
    read: int
    written: int
    flops: int
    parts: dict[str, int]  # bytes by part
    levels: dict[str, int]  # bytes by level, finest first; "-" has no pixels
    lower_bounds: dict[str, float]  # seconds by card

    @property
    def moved(self) -> int:
        return self.read + self.written


def count(spec: Spec, variant: str, task: str) -> Row:
    """Count one task. Raises `Missing` if the variant's package is not installed."""
    model = Model(spec, variant, torch.device("cpu"))
    # Sampling starts from latents of the model. Making them is not part of the task.
    made: list[Call] = []
    step_counts.count(lambda: made.append(model.task(task)), model.module, model.x)
    (run,) = made
    kernels = step_counts.count(run, model.module, model.x)
    parts, levels = dict.fromkeys(PARTS, 0), defaultdict[str, int](int)
    for k in kernels:
        parts[k.part] += k.moved
        levels[str((spec.side // k.side).bit_length() - 1) if k.side else "-"] += k.moved
    return Row(
        str(spec), spec.width, task, variant, len(kernels), sum(k.read for k in kernels),
        sum(k.written for k in kernels), sum(k.flops for k in kernels), parts,
        dict(sorted(levels.items())), {n: card.lower_bound(kernels) for n, card in CARDS.items()},
    )  # fmt: skip


def rows(specs: Sequence[Spec], variants: Sequence[str], tasks: Sequence[str]) -> list[Row]:
    made = []
    for spec in specs:
        for task in tasks:
            for variant in variants:
                if variant in RECOMPUTING and task != "train":
                    continue
                try:
                    made.append(count(spec, variant, task))
                except Missing as error:
                    print(error, file=sys.stderr)
    return made


def report(made: Sequence[Row]) -> str:
    """Return a table for each model and task."""
    pages = []
    for key in dict.fromkeys((row.spec, row.task) for row in made):
        group = [row for row in made if (row.spec, row.task) == key]
        plain = next((row for row in group if row.variant == "plain"), None)
        head = ["", "launches", "read MB", "written MB", "over plain", "GFLOP",
                *(f"{part} %" for part in PARTS), "MB by level",
                *(f"{card} at least, ms" for card in CARDS)]  # fmt: skip
        cells = [
            [
                row.variant, row.launches, f"{row.read / 1e6:.1f}", f"{row.written / 1e6:.1f}",
                over(row, plain), f"{row.flops / 1e9:.2f}",
                *(f"{100 * row.parts[part] / row.moved:.1f}" for part in PARTS),
                " / ".join(f"{level}: {b / 1e6:.1f}" for level, b in row.levels.items()),
                *(f"{1e3 * bound:.3f}" for bound in row.lower_bounds.values()),
            ]
            for row in group
        ]  # fmt: skip
        pages.append(f"{TASKS[key[1]]}, {key[0]}\n{text_table(head, cells)}")
    return "\n\n".join(pages)


def over(row: Row, plain: Row | None) -> str:
    """Return the bytes of a row over those of plain eager, if that was counted."""
    return f"{row.moved / plain.moved:.2f}" if plain else "-"


def summary(made: Sequence[Row]) -> str:
    """Return a Markdown table for each task: bytes over plain eager's and launches, by width."""
    widths = list(dict.fromkeys(row.width for row in made))
    pages = []
    for task in dict.fromkeys(row.task for row in made):
        cells = {(row.variant, row.width): row for row in made if row.task == task}
        lines = [
            [variant, *(f"{over(cells[variant, w], cells.get(('plain', w)))} / "
                        f"{cells[variant, w].launches:,}" for w in widths)]
            for variant in dict.fromkeys(variant for variant, _ in cells)
        ]  # fmt: skip
        pages.append(markdown_table([TASKS[task], *(f"width {w}" for w in widths)], lines))
    return "\n\n".join(pages)


def check(made: Sequence[Row], recorded: Sequence[dict[str, object]]) -> list[str]:
    """List the counts that are larger than the recorded ones, one line each."""
    before = {(r["spec"], r["task"], r["variant"]): r for r in recorded}
    grown = []
    for row in made:
        old = before.get((row.spec, row.task, row.variant))
        if old is None:
            continue
        for name in ("launches", "moved"):
            now, then = getattr(row, name), int(str(old[name]))
            if now > then:
                grown.append(
                    f"{row.variant}, {TASKS[row.task]}, {row.spec}: {name} {then:,} -> {now:,}"
                )
    return grown


def record(made: Sequence[Row]) -> list[dict[str, object]]:
    """Return the part of the rows that `check` reads."""
    return [
        {"spec": r.spec, "task": r.task, "variant": r.variant, "launches": r.launches,
         "moved": r.moved}
        for r in made
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.reports.whole_steps", __doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[128], help="hidden channels")
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of flow in each level")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32",
                        help="of the coupling networks")  # fmt: skip
    parser.add_argument("--task", choices=tuple(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--summary", action="store_true",
                        help="print only bytes over those of plain, and launches")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all rows as JSON")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail if a count exceeds FILE's")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what --check reads")
    options = parser.parse_args(arguments)
    specs = [
        Spec(side=options.side, levels=options.levels, steps=options.steps, width=width,
             batch=options.batch, precision=options.precision)
        for width in options.width
    ]  # fmt: skip
    made = rows(specs, options.variant, options.task)
    print(summary(made) if options.summary else report(made))
    if options.json:
        save_json(options.json, [asdict(row) for row in made])
    if options.record:
        save_json(options.record, record(made))
    grown = check(made, json.loads(options.check.read_text())) if options.check else []
    for line in grown:
        print(f"grown: {line}")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
