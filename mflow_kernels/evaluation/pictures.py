"""The pictures of a run, as PNG files in which each image pixel is a whole number of pixels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.printable import printable
from mflow_kernels.models.selection import IntrinsicDimension

_DPI = 100
COLUMNS = 12  # images in a row
_TILE = 64  # small images are enlarged by a whole factor, to at most this many pixels
_GAP = 4
_GLYPH = {9: 7.5, 10: 8.3, 12: 10.0}  # font size -> upper bound of a character's mean pixels
_LONGEST = 80  # characters of a text that are drawn


def draw_images(
    path: Path,
    title: str,
    rows: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]],
    footer: str | None = None,
) -> None:
    """Draw rows of images, uint8 (N, C, H, W) with C of 1 or 3 and the same shape in all rows, with
    the name of each row at its left, under a title and above a footer."""
    names, images = zip(*(rows.items() if isinstance(rows, Mapping) else rows), strict=True)
    mosaic = _mosaic(images)
    height, width = mosaic.shape[:2]
    title, names = _plain(title), tuple(map(_plain, names))
    left = 16 + math.ceil(max(len(name) for name in names) * _GLYPH[10])
    right, top, bottom = 16, 44, 34 if footer else 12
    texts = len(title) * _GLYPH[12], len(footer or "") * _GLYPH[9]
    total = (left + max(width, *map(math.ceil, texts)) + right, bottom + height + top)
    figure = Figure(figsize=(total[0] / _DPI, total[1] / _DPI), dpi=_DPI, facecolor="white")
    axes = figure.add_axes(
        (left / total[0], bottom / total[1], width / total[0], height / total[1])
    )
    axes.imshow(mosaic, interpolation="nearest")
    figure.text(left / total[0], 1 - 28 / total[1], title, fontsize=12, parse_math=False)
    row_height = (height + _GAP) / len(names)
    centres = [(row + 0.5) * row_height - _GAP / 2 for row in range(len(names))]
    axes.set_yticks(centres, names, fontsize=10, parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if footer:
        figure.text(left / total[0], 12 / total[1], footer, fontsize=9, color="0.3")
    _save(figure, path)


def in_rows(rows: Mapping[str, Tensor], columns: int = COLUMNS) -> list[tuple[str, Tensor]]:
    """Break long rows into rows of at most `columns` images.

    The first `columns` images of every row come first, then the next. White images fill up the last
    rows.
    """
    result = []
    count = max(len(images) for images in rows.values())
    for begin in range(0, count, columns):
        for name, images in rows.items():
            part = images[begin : begin + columns]
            blank = part.new_full((min(columns, count) - len(part), *part.shape[1:]), 255)
            result.append((name, torch.cat([part, blank])))
    return result


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw training curves, one row of panels for each stage. A fourth panel shows the weight of
    the penalty if it changes in training.

    Each of `rows` has metrics by name, with `step` and `stage` (from 0). Others may be absent, and
    values that are not finite are left out.
    """
    rows = [{k: v for k, v in row.items() if math.isfinite(v)} for row in rows]
    rows = [row for row in rows if "stage" in row]
    stages = sorted({int(row["stage"]) for row in rows}) or [0]
    figure = Figure(figsize=(12, 0.6 + 3.2 * len(stages)), dpi=_DPI, layout="constrained")
    changes = any("penalty_weight" in row for row in rows)
    panels = figure.subplots(len(stages), 4 if changes else 3, squeeze=False)
    figure.suptitle("Training", fontsize=13)
    for stage, (likelihood, loss, parts, *weight) in zip(stages, panels, strict=True):
        own = [row for row in rows if int(row["stage"]) == stage]
        name = "image flow" if stage == 0 else "on the manifold"
        likelihood.set(title=f"stage {stage + 1} ({name}): likelihood", ylabel="bits per dimension")
        _plot(likelihood, own, {"bits_per_dim": "training", "heldout_bits_per_dim": "held out"})
        loss.set(title=f"stage {stage + 1}: objective", ylabel="bits per dimension")
        labels = {"loss": "loss", "penalty": "penalty"}
        _plot(loss, own, {f"{name}_bits_per_dim": label for name, label in labels.items()})
        parts.set(title=f"stage {stage + 1}: parts of the likelihood", ylabel="bits per dimension")
        labels = {"on_manifold": "on manifold", "off_manifold": "off manifold", "logdet": "log-det"}
        _plot(parts, own, {f"{name}_bits_per_dim": label for name, label in labels.items()})
        for axes in weight:
            axes.set(title=f"stage {stage + 1}: weight of the penalty", ylabel="weight")
            _plot(axes, own, {"penalty_weight": "weight"})
            if not any("penalty_weight" in row for row in own):
                axes.set_axis_off()  # the weight of this stage is constant
    _save(figure, path)


def draw_spectrum(path: Path, estimate: IntrinsicDimension) -> None:
    """Draw the spectrum behind an estimated intrinsic dimension, and mark its largest drop."""
    figure = Figure(figsize=(7, 4), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    values, d = estimate.spectrum.cpu().numpy(), estimate.dimension
    order = np.arange(1, len(values) + 1)
    for part, colour, label in (
        (slice(None, d), "C0", f"on the manifold: {d}"),
        (slice(d, None), "C1", f"off the manifold: {len(values) - d}"),
    ):
        if len(order[part]):
            axes.plot(order[part], values[part], "o-", ms=3, lw=1, color=colour, label=label)
    if d < len(values):
        axes.axvline(d + 0.5, color="0.6", lw=1, ls="--")
        title = f"intrinsic dimension {d}: the largest drop is a factor of {estimate.gap:.3g}"
    else:
        title = f"no sharp drop: the largest is a factor of {estimate.gap:.3g}"
    axes.set(title=title, xlabel="singular value", ylabel="local standard deviation", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(framealpha=0.85, edgecolor="none")
    axes.grid(alpha=0.25)
    axes.title.set_fontsize(11)
    _save(figure, path)


def draw_histograms(path: Path, panels: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Draw histograms side by side, in two rows if there are more than three.

    A panel, by its axis label, has the values (N,) of each set by name. Values that are not finite
    are left out.
    """
    lines = 1 if len(panels) <= 3 else 2
    columns = math.ceil(len(panels) / lines)
    size = (4.2 * columns, 3.6 * lines)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (label, sets) in zip(places, panels.items(), strict=False):
        finite = {name: values[values.isfinite()].numpy() for name, values in sets.items()}
        together = np.concatenate([*finite.values(), np.zeros(0)])
        low, high = (together.min(), together.max()) if len(together) else (0.0, 1.0)
        # Only a logarithmic axis shows sets that lie orders of magnitude apart.
        far = low > 0 and high > 20 * low
        edges = np.geomspace(low, high, 41) if far else np.linspace(low, max(high, low + 1e-9), 41)
        shapes = [
            axes.hist(values, edges, histtype="stepfilled", alpha=0.5)[2][0]
            for values in finite.values()
        ]
        axes.set(xlabel=label, ylabel="images", xscale="log" if far else "linear")
        if far:  # the default labels within a decade overlap
            subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
            axes.xaxis.set_major_locator(LogLocator(subs=subs))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        names = list(finite)
    # A legend would leave out labels that begin with "_", and parse "$" as mathematics.
    numbers = list(map(str, range(len(names))))
    legend = figure.legend(
        shapes, numbers, loc="outside upper center", ncols=len(names), frameon=False
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=_plain(name), parse_math=False)
    _save(figure, path)


def _plain(text: str) -> str:
    """Return a text as one line that a font can draw, cut off if it is long."""
    text = printable(text).strip()
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _plot(axes, rows, names) -> None:  # type: ignore[no-untyped-def]
    shown = []
    for key, label in names.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        sparse = len(points) < 30
        axes.plot(steps, values, label=label, lw=1.4, marker="o" if sparse else None, ms=3)
        # Scale the axis without the first steps, whose large values would flatten the rest. Warm-up
        # takes at most a fifth of the steps.
        shown.append(np.quantile(values[len(values) // 5 :], [0.0, 0.5, 0.98]))
    if shown:
        low, high = min(s[0] for s in shown), max(s[2] for s in shown)
        margin = 0.06 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.legend(fontsize=9, framealpha=0.85, edgecolor="none")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.title.set_fontsize(11)


def _mosaic(rows: Sequence[Tensor]) -> np.ndarray:
    """Stack rows of images on white, with small images enlarged: uint8 (height, width, 3)."""
    zoom = max(1, _TILE // rows[0].shape[-1])
    lines = []
    for images in rows:
        pixels = images.cpu().numpy().transpose(0, 2, 3, 1)
        tiles = np.repeat(np.repeat(pixels, zoom, axis=1), zoom, axis=2)
        tiles = np.pad(tiles, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=255)
        lines.append(np.concatenate(list(np.broadcast_to(tiles, (*tiles.shape[:3], 3))), axis=1))
    return np.concatenate(lines, axis=0)[:-_GAP, :-_GAP]
