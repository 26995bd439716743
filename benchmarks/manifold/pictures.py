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

from benchmarks.manifold.output import Row, save_figure
from mflow_kernels.evaluation.pictures import draw_images

# A method keeps its colour and marker in all pictures. Baselines are grey, plain flows blue, and
# the penalized likelihood is red.
STYLES = {
    "principal components, Gaussian": ("0.6", "s"),
    "principal components, prior flow": ("0.4", "D"),
    "autoencoder, prior flow": ("0.2", "^"),
    "plain likelihood": ("tab:blue", "o"),
    "plain likelihood, wider flow": ("tab:blue", "s"),
    "plain likelihood, prior flow": ("tab:cyan", "D"),
    "PIE": ("tab:olive", "v"),
    "M-flow": ("tab:orange", "^"),
    "denoising flow": ("tab:green", "<"),
    "rectangular flow": ("tab:brown", ">"),
    "free-form injective flow": ("tab:purple", "P"),
    "penalized": ("tab:pink", "X"),
    "penalized, hierarchy": ("tab:red", "*"),
    "error bound, hierarchy": ("darkred", "p"),
}


SHORT = {  # names that fit beside a row of images
    "principal components, Gaussian": "PCA",
    "principal components, prior flow": "PCA, prior",
    "autoencoder, prior flow": "autoencoder, prior",
    "plain likelihood": "plain",
    "plain likelihood, wider flow": "plain, wider",
    "plain likelihood, prior flow": "plain, prior",
    "free-form injective flow": "free-form",
    "penalized, hierarchy": "pen., hierarchy",
    "error bound, hierarchy": "bound, hierarchy",
}


def draw_samples(path: Path, name: str, rows: Sequence[Row], test: Tensor) -> None:
    """Draw samples of every method's first seed."""
    shown = {"test images": test[:12]}
    for row in rows:
        if row["seed"] == 0 and "picture" in row:
            kind = "samples, v drawn" if row["method"].startswith("plain") else "samples"
            label = SHORT.get(row["method"], row["method"])
            shown[label] = torch.tensor(row["picture"][kind], dtype=torch.uint8)
    draw_images(path, f"{name}: samples at T = 0.7", shown)


def draw_frontier(path: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """Draw bits per dimension, and the Frechet distance, against the reconstruction error."""
    sets = [name for name, found in rows.items() if found]
    figure = Figure(figsize=(9, 3.4 * len(sets) + 1), layout="constrained")
    for line, name in zip(figure.subplots(len(sets), 2, squeeze=False), sets, strict=True):
        for axis, metric in zip(line, ("bits", "frechet"), strict=True):
            _points(axis, rows[name], metric)
            axis.set(xlabel="reconstruction error (MSE)", xscale="log")
            axis.grid(alpha=0.3)
            _plain_ticks(axis.xaxis)
        line[0].set(title=name, ylabel="bits per dimension")
        line[1].set(title=name, ylabel="Frechet distance of samples, T = 1", yscale="log")
        _plain_ticks(line[1].yaxis)
    handles, labels = line[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(path, figure)


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _points(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    for method, (colour, marker) in STYLES.items():
        found = [row for row in rows if row["method"] == method and "failed" not in row]
        xs, ys = [row["squared_error"] for row in found], [_value(row, metric) for row in found]
        known = [y for y in ys if y is not None]
        if len(known) != len(found) or not found:
            continue
        axis.scatter(xs, known, s=9, color=colour, alpha=0.5, linewidths=0)
        axis.plot(
            statistics.fmean(xs), statistics.fmean(known), marker, color=colour, label=method,
            ms=11 if marker == "*" else 7, mec="white", mew=0.5,
        )  # fmt: skip


def _value(row: Row, metric: str) -> float | None:
    """Return a figure; the Frechet distance is that of the better kind of samples at T = 1."""
    if metric != "frechet":
        return row[metric]
    return min(row[key] for key in ("frechet_on_1.0", "frechet_off_1.0") if row[key] is not None)


def draw_plateau(path: Path, rows: Sequence[Row]) -> None:
    """Draw bits per dimension and reconstruction error on validation images during training."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, ("bits", "squared_error"), strict=True):
        for method, (colour, _) in STYLES.items():
            curves = [row["curve"] for row in rows if row["method"] == method and row.get("curve")]
            if not curves or curves[0][0][metric] is None:
                continue
            times = [point["progress"] for point in curves[0]]
            values = [
                statistics.fmean(values)
                for values in zip(*([p[metric] for p in curve] for curve in curves), strict=True)
            ]
            style = "--" if "wider" in method else "-"
            axis.plot(times, values, style, color=colour, label=method, lw=1.4)
        axis.grid(alpha=0.3)
        axis.set(xlabel="part of the steps done")
    axes[0].set(ylabel="bits per dimension, validation")
    axes[1].set(ylabel="reconstruction error, validation", yscale="log")
    _plain_ticks(axes[1].yaxis)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(path, figure)
