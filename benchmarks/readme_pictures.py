"""Draw the pictures of the README, of docs/method.md and of the tutorial.

    mflow train --run-dir runs/default
    pytest benchmarks/bench_models.py --benchmark-only --clock process \\
        -k "K32 and W64 and train and 3x32x32" --benchmark-json docs/pictures/training_step.json
    pytest benchmarks/bench_splines.py --benchmark-only --clock process --rounds 15 -k train \\
        --benchmark-json docs/pictures/spline_step.json
    python -m benchmarks.readme_pictures runs/default

The first command trains the default run. The next two measure a training step of every package,
of Glow and of a spline flow; they are only needed for new figures. The last one draws
docs/pictures/*.png from all of these. `python -m benchmarks.manifold --docs` draws frontier.png and
plateau.png.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness.output import command_parser, save_figure
from benchmarks.harness.saved_runs import Row, Runs, merged, ratio, runs
from mflow_kernels.data.files import write_atomically
from mflow_kernels.evaluation.likelihood import held_out_images
from mflow_kernels.evaluation.pictures import draw_images
from mflow_kernels.evaluation.samples import (
    draw_samples,
    inpaint_images,
    known_pixels,
    project_images,
)
from mflow_kernels.runs.folder import Run, load_run

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "pictures"
RESULTS = PICTURES / "training_step.json"
SPLINES = PICTURES / "spline_step.json"
BASE = "plain"
LABELS = {  # the variants that are drawn, and their names in the picture
    "mflow_kernels, reversible": "mflow_kernels, reversible",
    "mflow_kernels, stored": "mflow_kernels, stored",
    "memcnn": "memcnn",
    "checkpointing": "gradient checkpointing",
    "FrEIA": "FrEIA",
    "normflows": "normflows",
    "plain, channels_last": "plain, channels_last",
    "plain": "plain PyTorch",
    "nflows": "nflows",
}
SAMPLES = 12
MISSING: tuple[Literal["half", "centre", "pixels"], ...] = ("half", "centre", "pixels")
MIB = 2**20


def bars(saved: Runs) -> list[tuple[str, float, tuple[float, float, float]]]:
    """Return each variant's label, peak MiB, and time over plain's (median and quartiles).

    Raises:
        ValueError: a variant was not measured, or the rows are of more than one model.
    """
    rows: dict[str, Row] = {row.variant: row for row in saved.rows}
    missing = [name for name in LABELS if name not in rows]
    if missing or len({row.group for row in saved.rows}) != 1:
        raise ValueError(f"results: expected one model with every variant, lacks {missing}")
    return [
        (label, rows[name].extra["peak_bytes"] / MIB, ratio(rows[name], rows[BASE]))
        for name, label in LABELS.items()
    ]


def draw_comparison(saved: Runs, path: Path) -> None:
    """Draw memory and time of a training step of each package as bars."""
    each = bars(saved)
    names = [name for name, _, _ in each]
    colours = ["C0" if name.startswith("mflow_kernels") else "0.7" for name in names]
    figure = Figure(figsize=(8.6, 3.3), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle("A training step of the same Glow in each package", fontsize=11)
    memory, time = figure.subplots(1, 2, sharey=True)
    peaks = [peak for _, peak, _ in each]
    memory.barh(names, peaks, color=colours)
    memory.bar_label(memory.containers[0], fmt="%.0f", padding=3, fontsize=9)
    memory.set_title("peak memory, MiB", fontsize=10)
    medians = [middle for _, _, (middle, _, _) in each]
    spread = [[m - low for _, _, (m, low, _) in each], [high - m for _, _, (m, _, high) in each]]
    timed = time.barh(names, medians, color=colours, xerr=spread, error_kw={"linewidth": 0.8})
    time.bar_label(timed, fmt="%.2f", padding=4, fontsize=9)
    time.set_title("time, relative to plain PyTorch", fontsize=10)
    for axes, largest in ((memory, max(peaks)), (time, max(high for *_, (_, _, high) in each))):
        axes.set_xlim(0, 1.12 * largest)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    memory.invert_yaxis()  # after all bars: the panels share this axis
    row, (machine,) = saved.rows[0].extra, saved.environments
    figure.supxlabel(
        f"Glow of {row['levels']} levels of {row['steps']} steps, width {row['width']}, batch of "
        f"{row['batch']} {row['channels']}x{row['side']}x{row['side']} images, {row['precision']}. "
        f"{machine['device']}, {machine['threads']} thread, {machine['clock']}, "
        f"{saved.commands[0]['datetime'][:10]}",
        fontsize=7.5, color="0.3",
    )  # fmt: skip
    save_figure(path, figure)


def draw_splines(saved: Runs, path: Path) -> None:
    """Draw the time of a spline flow's training step in each library, one panel for each size."""
    groups = list(dict.fromkeys(row.group for row in saved.rows))
    figure = Figure(figsize=(8.6, 3.1), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle("A training step of the same spline flow, time relative to nflows", fontsize=11)
    for axes, group in zip(figure.subplots(1, len(groups), sharey=True), groups, strict=True):
        rows = {row.variant: row for row in saved.rows if row.group == group}
        rows = {name: row for name, row in rows.items() if "form" not in name}
        times = [ratio(row, rows["nflows"])[0] for row in rows.values()]
        own = [name.startswith(("mflow_kernels", "accelerated")) for name in rows]
        bars = axes.barh([*rows], times, color=["C0" if mine else "0.7" for mine in own])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_title(group.removeprefix("spline flow, train, "), fontsize=9)
        axes.set_xlim(0, 1.2 * max(times))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    axes.invert_yaxis()  # the panels share this axis
    machine = saved.environments[0]
    figure.supxlabel(
        "Six rational-quadratic couplings with 8 bins, float32. Blue: this package.\n"
        f"{machine['device']}, {machine['threads']} thread, "
        f"{machine['clock']}, {saved.commands[0]['datetime'][:10]}",
        fontsize=7.5, color="0.3",
    )  # fmt: skip
    save_figure(path, figure)


def draw_run(run: Run, path: Path) -> None:
    """Draw held-out images of a run, their projections on the manifold, and samples."""
    images = held_out_images(run, None)[0].batch(range(SAMPLES))
    rows = {
        "held out": images,
        "projection": project_images(run.model, images),
        "sample": draw_samples(run.model, SAMPLES, 1.0, seed=0),
    }
    title = f"A run of mflow train: held-out {run.config.data_name}, their projections, and samples"
    draw_images(path, title, rows)


def draw_uses(run: Run, path: Path) -> None:
    """Draw digits with missing pixels filled in, and samples with and without v."""
    images = held_out_images(run, None)[0].batch(range(SAMPLES))
    rows = {"held out": images}
    for missing in MISSING:
        known = known_pixels(missing, images)
        rows[f"known: {missing}"] = images.where(known, images.new_full((), 128))
        rows[f"{missing} filled in"] = inpaint_images(run.model, images, known)
    for name, ambient in (("v = 0", False), ("v drawn", True)):
        drawn = draw_samples(run.model, SAMPLES, 1.0, seed=1, ambient=ambient)
        rows[f"sample, {name}"] = drawn
    draw_images(path, "Missing pixels filled in from the manifold, and samples on and off it", rows)
    small = Image.open(path).convert("L").quantize(64)  # all images are grey
    write_atomically(path, lambda temporary: small.save(temporary, format="png", optimize=True))


def draw_moons(path: Path) -> None:
    """Run the first page of the tutorial, which draws moons.png and saves a model."""
    page = (DOCS / "tutorial" / "density.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=folder, check=True)
        drawn = Path(folder, "moons.png").read_bytes()
    write_atomically(path, lambda temporary: temporary.write_bytes(drawn))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("benchmarks.readme_pictures", __doc__)
    parser.add_argument("run", type=Path, help="run folder of mflow train")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder for the PNG files")
    options = parser.parse_args(arguments)
    draw_comparison(runs(merged([RESULTS])), options.out / "comparison.png")
    draw_splines(runs(merged([SPLINES])), options.out / "splines.png")
    run = load_run(str(options.run), "cpu")
    draw_run(run, options.out / "digits.png")
    draw_uses(run, options.out / "uses.png")
    draw_moons(options.out / "moons.png")


if __name__ == "__main__":
    main()
