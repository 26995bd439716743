"""The end of a benchmark run: the table of claims, what was left out, and a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.bench_claims import claims
from benchmarks.harness.claims import Claim, against_best, figures, text, verdict, worst
from benchmarks.harness.output import save_figure
from benchmarks.harness.saved_runs import Row
from benchmarks.harness.session import TIME_LIMIT, size_and_gpu

COLOURS = {"holds": "C0", "within noise": "C1", "misses": "C3"}


def rows_of(benchmarks: Sequence[Any]) -> list[Row]:
    """Return the rows of a session of pytest-benchmark."""
    return [Row(b.fullname, b.group, list(b.stats.data), b.extra_info) for b in benchmarks
            if "variant" in b.extra_info]  # fmt: skip


def closing_lines(
    benchmarks: Sequence[Any],
    not_measured: Sequence[dict[str, str]],
    config: pytest.Config,
    with_claims: bool,
) -> Iterator[str]:
    """Yield the table of claims, and a line for each reason with the command that measures more."""
    if with_claims:
        failed = {row["group"] for row in not_measured if row["outcome"] == "failed"}
        yield text(claims(size_and_gpu(config)[1]), rows_of(benchmarks), failed)
        yield ""
    reasons: dict[str, list[dict[str, str]]] = {}
    for row in not_measured:
        if row["outcome"] == "skipped":
            reasons.setdefault(row["reason"], []).append(row)
    for reason, rows in reasons.items():
        groups = list(dict.fromkeys(row["group"] for row in rows))
        some = "; ".join(groups[:3]) + (f"; and {len(groups) - 3} more" if len(groups) > 3 else "")
        line = f"left out, {len(rows)} rows: {reason} ({some})."
        if TIME_LIMIT in reason:
            line += " All of them: pytest benchmarks/ --benchmark-only --time-limit 3600"
        elif "is not installed" in reason:
            line += ' The peers: pip install -e ".[bench]"'
        yield line
    if with_claims and not config.getoption("--full"):
        yield ("left out: other sizes, depths and peers, and every operator. "
               "All of them, for hours: pytest benchmarks/ --benchmark-only --full")  # fmt: skip


def draw_claims(rows: Sequence[Row], gpu: bool, path: Path) -> None:
    """Draw each measured claim's ratio to its best peer, on a line with what it claims."""
    drawn = [(claim, found) for claim in claims(gpu)
             if (found := worst(against_best(figures(claim, rows)))) is not None]  # fmt: skip
    figure = Figure(figsize=(10, 0.28 * len(drawn) + 1.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for i, (claim, found) in enumerate(drawn):
        colour = COLOURS[verdict(claim, found)]
        axes.plot([found.low, found.high], [i, i], color=colour, linewidth=2)
        axes.plot([found.ratio], [i], "o", color=colour, markersize=5)
        axes.plot([claim.at_most], [i], "|", color="black", markersize=10)
    axes.set_yticks(range(len(drawn)), [_label(claim) for claim, _ in drawn], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("this package over its best peer, in the worst group; | is what is claimed",
                    fontsize=8)  # fmt: skip
    if rows:
        e = rows[0].extra
        where = f"{e['device']}, {e['threads']} thread(s), {e['clock']}, commit {e['commit']}"
        figure.suptitle(where, fontsize=8)
    save_figure(path, figure, dpi=110)


def _label(claim: Claim) -> str:
    return f"{claim.text} ({'memory' if claim.memory else 'time'})"
