"""Figures of saved benchmark runs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness.output import save_figure
from benchmarks.harness.saved_runs import Row, ratio

MIB = 2**20
COLOURS = [*mpl.color_sequences["tab10"], "black"]


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw every figure for which the rows have data, as PNG files in `out`."""
    made = []
    for name, figure in _figures(rows):
        path = out / f"{name}.png"
        save_figure(path, figure, dpi=130, bbox_inches="tight")
        plt.close(figure)
        made.append(path)
    return made


def _figures(rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    models = [row for row in rows if row.kind == "models" and row.extra["task"] == "train"]
    for name, axis, label in (("depth", "steps", "steps of flow a level, K"),
                              ("resolution", "side", "image side, pixels")):  # fmt: skip
        series = largest_series(models, axis)
        if series:
            yield name, _against(series, axis, label)
    operators = [row for row in rows if row.kind == "ops"]
    if operators:
        yield "bandwidth", _bandwidth(operators)
    for kind in ("layers", "models"):
        compared = [row for row in rows if row.kind == kind]
        if compared:
            yield f"speedup-{kind}", _speedup(compared)


def largest_series(rows: Sequence[Row], axis: str) -> list[Row]:
    """Return the longest series of rows that differ only in `axis` and variant."""
    fields = ("channels", "side", "levels", "steps", "width", "batch", "constant", "precision")
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.extra[f] for f in fields if f != axis), []).append(row)

    def length(series: list[Row]) -> int:
        return len({row.extra[axis] for row in series})

    longest = max(found.values(), key=length, default=[])
    return longest if longest and length(longest) > 1 else []


def _style(variant: str, order: Sequence[str]) -> dict[str, Any]:
    colour = COLOURS[list(order).index(variant) % len(COLOURS)]
    own = variant.startswith("mflow_kernels")
    return {"color": colour, "linewidth": 2.2 if own else 1.2, "marker": "o" if own else "s",
            "markersize": 5, "linestyle": "-" if own else "--", "label": variant}  # fmt: skip


def _against(series: Sequence[Row], axis: str, label: str) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4))
    order = list(dict.fromkeys(row.variant for row in series))
    values: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("training step, ms", lambda row: 1e3 * row.median),
        ("peak memory of a training step, MiB",
         lambda row: row.extra["peak_bytes"] / MIB if "peak_bytes" in row.extra else None),
    )  # fmt: skip
    for panel, (title, value) in zip(panels, values, strict=True):
        for variant in order:
            points = [(row.extra[axis], value(row)) for row in series if row.variant == variant]
            known = sorted((x, y) for x, y in points if y is not None)
            if known:
                panel.plot(*zip(*known, strict=True), **_style(variant, order))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        ticks = sorted({row.extra[axis] for row in series})
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.set(xlabel=label, title=title)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False)
    first = series[0].extra
    varies = "K=" if axis == "steps" else f"{first['channels']}x"
    fixed = [word for word in first["spec"].split() if not word.startswith(varies)]
    figure.suptitle(f"{' '.join(fixed)}, {first['device']}", fontsize=9)
    return figure


def _marks(count: int) -> list[Any]:
    """Return the patches of a legend, in the order of colours."""
    return [plt.Rectangle((0, 0), 1, 1, color=COLOURS[i]) for i in range(count)]


def _bandwidth(rows: Sequence[Row]) -> Any:
    shapes = list(dict.fromkeys(row.extra["shape"] for row in rows))[:4]
    named = list(dict.fromkeys((r.extra["operator"], r.extra["direction"]) for r in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(3.2 * len(shapes) + 1.5, 0.36 * len(named) + 1.2), sharey=True,
        squeeze=False,
    )  # fmt: skip
    height = 0.8 / len(variants)
    for panel, shape in zip(panels[0], shapes, strict=True):
        for i, variant in enumerate(variants):
            measured = {(r.extra["operator"], r.extra["direction"]): r for r in rows
                    if r.variant == variant and r.extra["shape"] == shape}  # fmt: skip
            at = [j + i * height for j, key in enumerate(named) if key in measured]
            shares = [100 * measured[key].extra["share_of_copy_bandwidth"] for key in named
                      if key in measured]  # fmt: skip
            panel.barh(at, shares, height, color=COLOURS[i])
        panel.axvline(100, color="black", linewidth=0.7)
        panel.set_title(shape, fontsize=8)
        panel.set_xlabel("% of copy bandwidth", fontsize=8)
        panel.grid(axis="x", alpha=0.3)
    middles = [j + 0.4 - height / 2 for j in range(len(named))]
    panels[0][0].set_yticks(middles, [" ".join(key) for key in named], fontsize=8)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(_marks(len(variants)), variants, fontsize=8)
    figure.suptitle(
        "The fewest bytes an operator must move per second, as a share of copy bandwidth\n"
        f"(states that fit in the cache can exceed 100%), {rows[0].extra['device']}",
        fontsize=9,
    )
    figure.tight_layout()
    return figure


def _speedup(rows: Sequence[Row]) -> Any:
    """Draw the peers' time divided by that of mflow_kernels, for each task."""
    groups = list(dict.fromkeys(row.group for row in rows))
    tasks = list(dict.fromkeys(row.extra["task"] for row in rows))
    by_task = {t: [g for g in groups if g.startswith(f"{t},")] for t in tasks}
    longest = max(map(len, by_task.values()))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(5.2 * len(tasks), 0.75 * longest + 1.5), squeeze=False
    )
    peers = [v for v in dict.fromkeys(r.variant for r in rows) if not v.startswith("mflow_kernels")]
    height = 0.85 / max(1, len(peers))
    for panel, task in zip(panels[0], tasks, strict=True):
        labels = []
        for j, group in enumerate(by_task[task]):
            measured = {row.variant: row for row in rows if row.group == group}
            labels.append(
                group.split(", ", 1)[1].replace(" constant networks", "\nnetworks constant")
            )
            if "mflow_kernels, stored" not in measured:
                continue
            for i, peer in enumerate(peers):
                if peer in measured:
                    middle, low, high = ratio(measured[peer], measured["mflow_kernels, stored"])
                    panel.barh(j + i * height, middle, height, color=COLOURS[i],
                               xerr=[[middle - low], [high - middle]],
                               error_kw={"linewidth": 0.7})  # fmt: skip
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_yticks([j + 0.4 for j in range(len(labels))], labels, fontsize=7)
        panel.invert_yaxis()
        panel.set_title(f"{task}: time over mflow_kernels with stored activations", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.legend(_marks(len(peers)), peers, ncols=len(peers), fontsize=8, frameon=False,
                  loc="upper center", bbox_to_anchor=(0.5, 0))  # fmt: skip
    return figure
