"""Out-of-distribution scores of a model of digits, as a table of AUROC.

    mflow train --run-dir runs/digits
    python -m benchmarks.manifold.ood runs/digits

Every number is the probability that an image of the row's set scores above a held-out digit.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.manifold.other_images import other_images
from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.splits import load_splits
from mflow_kernels.evaluation.ood import (
    SCORES,
    SetScores,
    compare_sets,
    score_images,
    training_scores,
)
from mflow_kernels.runs.folder import load_run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of mflow train on digits")
    parser.add_argument("--images", type=int, default=500, help="images of each set (500)")
    parser.add_argument("--quick", action="store_true", help="leave out the score with Jacobians")
    parser.add_argument("--out", type=Path, help="JSON file to write; by default RUN/ood.json")
    options = parser.parse_args(arguments)
    run = load_run(str(options.run))
    if run.config.image_shape != (1, 28, 28):
        parser.error(f"run: expected a model of 28x28 grey images, got {run.config.image_shape}")
    splits = load_splits(run.config.data, run.config.image_size)
    held_out = splits.test.batch(range(min(options.images, len(splits.test))))
    n_bits = run.config.n_bits
    train = splits.train.batch(range(min(1000, len(splits.train))))
    training = training_scores(run.model, train, n_bits)
    sets = {"held out": held_out, **other_images(held_out, len(held_out))}
    scores = {}
    for name, images in sets.items():
        print(f"{name} ({len(images)} images)", file=sys.stderr)
        progress = None if options.quick else _ignore
        scores[name] = score_images(run.model, images, n_bits, training, progress)
    rows = compare_sets(scores)
    print(table(rows))
    text = json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    out = options.out or options.run / "ood.json"
    write_atomically(out, lambda path: path.write_text(text))


def table(rows: tuple[SetScores, ...]) -> str:
    """A Markdown table of AUROC, one row for each set but the first, and their mean."""
    names = [name for name in SCORES if name in rows[0].medians]
    lines = ["| set | " + " | ".join(SCORES[name][0] for name in names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for row in rows[1:]:
        cells = [f"{row.aurocs[name]:.3f}" for name in names]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    means = [torch.tensor([row.aurocs[name] for row in rows[1:]]).mean().item() for name in names]
    lines.append("| mean | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines)


def _ignore(count: int) -> None:
    """Show no progress."""


if __name__ == "__main__":
    main()
