"""Pictures of the image comparisons: samples, the frontier, and the curves of training."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from benchmarks.manifold.methods import RECIPES
from benchmarks.manifold.output import Row, save_figure
from mflow_kernels.evaluation.pictures import draw_images

COLUMNS = 8  # images of each method
LABELS = {
    "bits": "bits per dimension",
    "squared_error": "reconstruction error (MSE)",
    "frechet": "Frechet distance of samples, T = 1",
}


def draw_samples(path: Path, name: str, rows: Sequence[Row], test: Tensor) -> None:
    """Draw samples of the first seed of each method in the rows."""
    shown = {"test images": test[:COLUMNS]}
    for row in rows:
        if row["seed"] == 0 and "picture" in row:
            kind = "samples, v drawn" if row["method"].startswith("plain") else "samples"
            label = RECIPES[row["method"]].short or row["method"]
            images = torch.tensor(row["picture"][kind], dtype=torch.uint8)
            shown[label] = images[:COLUMNS]
    draw_images(path, f"{name}: samples", shown)


def draw_uses(path: Path, rows: Sequence[Row]) -> None:
    """Draw digits whose lower half is hidden, and how every method's first seed fills it in."""
    shown: dict[str, Tensor] = {}
    for row in (row for row in rows if row["seed"] == 0):
        images = {k: torch.tensor(v, dtype=torch.uint8) for k, v in row["picture"].items()}
        shown |= {"test images": images["digits"], "lower half hidden": images["half"]}
        shown[RECIPES[row["method"]].short or row["method"]] = images["half filled"]
    draw_images(path, "digits: hidden halves filled in", shown)


def draw_frontier(
    path: Path, rows: Mapping[str, Sequence[Row]], others: Mapping[str, Sequence[Row]]
) -> None:
    """Draw bits per dimension, and the Frechet distance, against the reconstruction error.

    Args:
        rows: runs of each set of images, with a point for each and a marker for their mean.
        others: runs of one rate with several weights; a line joins the means of each weight.
    """
    sets = [name for name, found in rows.items() if found]
    figure = Figure(figsize=(9, 3.4 * len(sets) + 1), layout="constrained")
    for line, name in zip(figure.subplots(len(sets), 2, squeeze=False), sets, strict=True):
        for axis, metric in zip(line, ("bits", "frechet"), strict=True):
            _points(axis, rows[name], metric)
            _lines(axis, others.get(name, []), metric)
            axis.set(title=f"{name} (lower left is better)", xlabel=LABELS["squared_error"])
            _scales(axis, metric)
    _save_with_legend(path, figure, axis)


def _scales(axis: Axes, metric: str) -> None:
    """Show a metric on the y axis. All axes are logarithmic, but that of bits per dimension."""
    axis.set(xscale="log", ylabel=LABELS[metric])
    axis.grid(alpha=0.3)
    _plain_ticks(axis.xaxis)
    if metric != "bits":
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)


def _save_with_legend(path: Path, figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(path, figure)


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _points(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    for method, recipe in RECIPES.items():
        found = _made(rows, method)
        xs, ys = [row["squared_error"] for row in found], [_value(row, metric) for row in found]
        known = [y for y in ys if y is not None]
        if len(known) != len(found) or not found:
            continue
        axis.scatter(xs, known, s=9, color=recipe.colour, alpha=0.5, linewidths=0)
        axis.plot(
            statistics.fmean(xs), statistics.fmean(known), recipe.marker, color=recipe.colour,
            label=method, ms=11 if recipe.marker == "*" else 7, mec="white", mew=0.5,
        )  # fmt: skip


def _lines(axis: Axes, others: Sequence[Row], metric: str) -> None:
    for method in dict.fromkeys(row["method"] for row in others):
        found = _made(others, method)
        xs, ys = [], []
        for weight in sorted({row["weight"] for row in found}):
            seeds = [row for row in found if row["weight"] == weight]
            xs.append(statistics.fmean(row["squared_error"] for row in seeds))
            ys.append(statistics.fmean(_value(row, metric) for row in seeds))
        axis.plot(xs, ys, "-", color=RECIPES[method].colour, lw=1, alpha=0.7, marker=".", ms=4)


def _made(rows: Sequence[Row], method: str) -> list[Row]:
    """Return the rows of a method's trainings that did not fail."""
    return [row for row in rows if row["method"] == method and "failed" not in row]


def _value(row: Row, metric: str) -> float | None:
    """Return a figure; the Frechet distance is that of the better kind of samples at T = 1."""
    if metric != "frechet":
        return row[metric]
    return min(row[key] for key in ("frechet_on", "frechet_off") if row[key] is not None)


def draw_budgets(path: Path, rows: Sequence[Row]) -> None:
    """Draw bits per dimension, reconstruction error and Frechet distance against CPU time."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 3), LABELS, strict=True):
        for method, recipe in RECIPES.items():
            found = _made(rows, method)
            if not found or None in [_value(row, metric) for row in found]:
                continue
            times = sorted({row["budget"] for row in found})
            if len(times) < 2:
                continue
            seeds = [[_value(r, metric) for r in found if r["budget"] == t] for t in times]
            means = [statistics.fmean(values) for values in seeds]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in seeds]
            style = {"color": recipe.colour, "label": method, "lw": 1.2, "ms": 5, "capsize": 2}
            axis.errorbar(times, means, spread, fmt=recipe.marker + "-", **style)
        axis.set_xlabel("CPU seconds")
        _scales(axis, metric)
        axis.set_xticks(sorted({row["budget"] for row in rows}))
    _save_with_legend(path, figure, axis)
