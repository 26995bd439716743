"""Out-of-distribution scores of models of digits and of faces, as tables of AUROC.

    mflow train --seed 0 --run-dir runs/digits0
    mflow train --seed 1 --run-dir runs/digits1
    python -m benchmarks.manifold.ood runs/digits0 runs/digits1 --docs docs/evaluation.md

Every number is the probability that an image of the row's set scores above a held-out image: mean
and standard deviation over the runs. The command also trains three small models of the faces that
scikit-image contains, in about a minute. Every model has a JSON file in the output folder, named
after a run's options and weights, and is not scored again if the file exists.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.output import command_parser, save_text
from benchmarks.manifold import methods, training
from benchmarks.manifold.comparison import about_runs
from benchmarks.manifold.other_images import beside_digits, beside_faces, faces
from benchmarks.manifold.output import Row, Store, fill_in, markdown, run_key
from mflow_kernels import Glow, HierarchicalFlow, ManifoldObjective
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.splits import load_splits
from mflow_kernels.evaluation.ood import SCORES, compare_sets, score_images, training_scores
from mflow_kernels.runs.folder import Run, load_run

FACE_SEEDS = (0, 1, 2)
HELD_OUT_FACES = 30  # of 100
FACE_STEPS, FACE_BATCH, FACE_RATE = 300, 35, 1e-2
TRAINING_IMAGES = 1000  # at most; they give the deviation and the mean bits


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("benchmarks.manifold.ood", __doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of mflow train on digits")
    parser.add_argument("--images", type=int, default=500, help="images of each set (500)")
    parser.add_argument("--quick", action="store_true", help="leave out the scores with Jacobians")
    parser.add_argument("--no-faces", action="store_true", help="train no models of faces")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tables"), help="folder for the tables"
    )
    parser.add_argument("--docs", type=Path, help="Markdown file that takes the tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    store = Store(options.out)
    quick = "-quick" if options.quick else ""
    rows: dict[str, list[Row]] = {"digits": [], "faces": []}
    for run in [load_run(str(folder)) for folder in options.runs]:
        key = f"digits-{run_key(run)}-images{options.images}{quick}"
        score = partial(of_run, run, options.images, options.quick)
        rows["digits"].append(store.row(key, score))
    for seed in () if options.no_faces else FACE_SEEDS:
        score = partial(of_faces, seed, options.quick)
        rows["faces"].append(store.row(f"faces-seed{seed}{quick}", score))
    for part, scored in rows.items():
        if scored:
            save_text(store.folder / f"ood-{part}.md", table(scored))
            print(f"{part}\n\n{table(scored)}")
    if options.docs:
        fill_in(options.docs, store.folder)


def of_run(run: Run, number: int, quick: bool) -> Row:
    """Score a run of digits."""
    if run.config.image_shape != (1, 28, 28):
        raise ValueError(f"run: expected 28x28 grey images, got {run.config.image_shape}")
    splits = load_splits(run.config.data, run.config.image_size)
    train, held_out = (
        part.first(count)
        for part, count in ((splits.train, TRAINING_IMAGES), (splits.test, number))
    )
    sets = beside_digits(held_out, len(held_out))
    return {"seed": run.config.seed} | _scored(run.model, train, held_out, sets, quick)


def of_faces(seed: int, quick: bool) -> Row:
    """Train a manifold flow on 70 faces, and score the other 30 and other images."""
    generator = torch.Generator().manual_seed(seed)
    images = faces()[torch.randperm(len(faces()), generator=generator)]
    held_out, train = images[:HELD_OUT_FACES], images[HELD_OUT_FACES:]
    torch.manual_seed(seed)  # for the weights
    flow = Glow((1, *images.shape[2:]), levels=2, steps=2, width=32, reversible=False)
    method = methods.one_stage(flow, 72, ManifoldObjective())  # two channels of 6x6 latents
    seconds = training.train(method, _batches(train, generator), [FACE_STEPS], FACE_RATE)
    assert isinstance(method.model, HierarchicalFlow)
    scored = _scored(method.model, train, held_out, beside_faces(held_out), quick)
    return {"seed": seed, "seconds": seconds} | scored


def _batches(images: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of images with noise, half of them mirrored, forever."""
    while True:
        x = images[torch.randint(len(images), (FACE_BATCH,), generator=generator)]
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        yield dequantize(torch.where(mirrored, x.flip(3), x), 8, generator)


def _scored(
    model: HierarchicalFlow, train: Tensor, held_out: Tensor, sets: dict[str, Tensor], quick: bool
) -> Row:
    """Return {"auroc": {set: {score: AUROC}}}; the sets are uint8 images like those of training."""
    n_bits = 8 if model.n_bits is None else model.n_bits
    progress = None if quick else lambda count: None  # with a function, the scores have Jacobians
    training = training_scores(model, train, n_bits, progress)
    scores = {
        name: score_images(model, images, n_bits, training, progress)
        for name, images in {"held out": held_out, **sets}.items()
    }
    return {"auroc": {row.name: row.aurocs for row in compare_sets(scores)[1:]}}


def table(rows: Sequence[Row]) -> str:
    """Return a table of AUROC over runs: one line for each set, and one for their mean."""
    lines: list[Row] = []
    for row in rows:
        sets = row["auroc"]
        for name, aurocs in sets.items():
            lines.append({"set": name, **aurocs})
        each = {score: [aurocs.get(score) for aurocs in sets.values()] for score in SCORES}
        known = {score: values for score, values in each.items() if None not in values}
        lines.append({"set": "mean"} | {s: sum(v) / len(v) for s, v in known.items()})
    names = [name for name in SCORES if all(name in line for line in lines)]
    metrics = {name: (SCORES[name][0], ".3f") for name in names}
    return markdown(lines, {"set": "set"}, metrics) + "\n" + about_runs(rows)


if __name__ == "__main__":
    main()
