"""Pictures of saved benchmark runs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness.claims import Claim, against_best, figures, verdict, worst
from benchmarks.harness.output import save_figure
from benchmarks.harness.report_tables import by_group
from benchmarks.harness.saved_runs import Row, ratio

MIB = 2**20
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
COLOURS = {"holds": "C0", "within noise": "C1", "misses": "C3"}


def _circumstances(row: Row, date: str) -> str:
    e = row.extra
    return f"{e['device']}, {e['threads']} thread, {e['clock']}, {date}"


def bars(rows: Sequence[Row]) -> list[tuple[str, float, tuple[float, float, float]]]:
    """Return each variant's label, peak MiB, and time over plain's (median and quartiles).

    Raises:
        ValueError: a variant was not measured.
    """
    measured = {row.variant: row for row in rows}
    missing = [name for name in LABELS if name not in measured]
    if missing:
        raise ValueError(f"results: expected every variant of the comparison, lacks {missing}")
    return [
        (label, measured[name].extra["peak_bytes"] / MIB, ratio(measured[name], measured[BASE]))
        for name, label in LABELS.items()
    ]


def draw_comparison(rows: Sequence[Row], date: str, path: Path, mark: str) -> None:
    """Draw memory and time of a training step of each package as bars."""
    each = bars(rows)
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
    row = rows[0].extra
    figure.supxlabel(
        f"Glow of {row['levels']} levels of {row['steps']} steps, width {row['width']}, batch of "
        f"{row['batch']} {row['channels']}x{row['side']}x{row['side']} images, {row['precision']}. "
        f"{_circumstances(rows[0], date)}",
        fontsize=7.5, color="0.3",
    )  # fmt: skip
    save_figure(path, figure, metadata={"Results": mark})


def draw_splines(rows: Sequence[Row], date: str, path: Path, mark: str) -> None:
    """Draw the time of a spline flow's training step in each library, one panel for each size."""
    groups = by_group(rows)
    figure = Figure(figsize=(8.6, 3.1), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle("A training step of the same spline flow, time relative to nflows", fontsize=11)
    for axes, (name, group) in zip(
        figure.subplots(1, len(groups), sharey=True), groups.items(), strict=True
    ):
        shown = {variant: row for variant, row in group.items() if "form" not in variant}
        times = [ratio(row, group["nflows"])[0] for row in shown.values()]
        own = [variant.startswith(("mflow_kernels", "accelerated")) for variant in shown]
        drawn = axes.barh([*shown], times, color=["C0" if mine else "0.7" for mine in own])
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axes.set_title(name.removeprefix("spline flow, train, "), fontsize=9)
        axes.set_xlim(0, 1.2 * max(times))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    axes.invert_yaxis()  # the panels share this axis
    figure.supxlabel(
        "Six rational-quadratic couplings with 8 bins, float32. Blue: this package.\n"
        f"{_circumstances(rows[0], date)}",
        fontsize=7.5, color="0.3",
    )  # fmt: skip
    save_figure(path, figure, metadata={"Results": mark})


def draw_claims(claims: Sequence[Claim], rows: Sequence[Row], path: Path, mark: str = "") -> None:
    """Draw each measured claim's ratio to its best peer, on a line with what it claims."""
    drawn = [(claim, found) for claim in claims
             if (found := worst(against_best(figures(claim, rows)))) is not None]  # fmt: skip
    figure = Figure(figsize=(10, 0.28 * len(drawn) + 1.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for i, (claim, found) in enumerate(drawn):
        colour = COLOURS[verdict(claim, found)]
        axes.plot([found.low, found.high], [i, i], color=colour, linewidth=2)
        axes.plot([found.ratio], [i], "o", color=colour, markersize=5)
        axes.plot([claim.at_most], [i], "|", color="black", markersize=10)
    labels = [f"{claim.text} ({'memory' if claim.memory else 'time'})" for claim, _ in drawn]
    axes.set_yticks(range(len(drawn)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("this package over its best peer, in the worst group; | is what is claimed",
                    fontsize=8)  # fmt: skip
    if rows:
        figure.suptitle(_circumstances(rows[0], f"commit {rows[0].extra['commit']}"), fontsize=8)
    save_figure(path, figure, dpi=110, metadata={"Results": mark})


def draw_ratios(rows: Sequence[Row], path: Path) -> None:
    """Draw, for each group, the time of its first variant over that of the fastest other one."""
    found = []
    for name, (first, *rest) in (
        (name, [*group.values()]) for name, group in by_group(rows).items()
    ):
        if rest:
            found.append((name, max((ratio(first, other), other.variant) for other in rest)))
    figure = Figure(figsize=(10, 0.2 * len(found) + 1), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for i, (_, ((middle, low, high), _)) in enumerate(found):
        axes.plot([low, high], [i, i], color="C0", linewidth=2)
        axes.plot([middle], [i], "o", color="C0", markersize=4)
    axes.set_yticks(range(len(found)), [f"{name}: {best}" for name, (_, best) in found], fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel(
        "time of the first variant over that of the fastest other one, named at the left"
    )
    save_figure(path, figure, dpi=110)
