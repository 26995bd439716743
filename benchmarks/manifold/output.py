"""Markdown tables, and files that are never half written."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mflow_kernels.data.files import write_atomically

Row = Mapping[str, Any]
DPI = 100


def save_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_figure(path: Path, figure: Figure) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))


def mean_and_deviation(rows: Sequence[Row], name: str, form: str) -> str:
    """Format mean ± standard deviation of a metric over rows (seeds); a dash if any is None."""
    values = [row[name] for row in rows]
    if any(value is None for value in values):
        return "-"
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form)}"


def markdown(
    rows: Sequence[Row], keys: Mapping[str, str], metrics: Mapping[str, tuple[str, str]]
) -> str:
    """Format a Markdown table with one line per combination of keys, in order of appearance.

    Args:
        rows: one row per run, of all seeds.
        keys: names of the columns that identify a line, with their headings.
        metrics: names of the averaged columns, with their headings and number formats.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    heads = [*keys.values(), *(heading for heading, _ in metrics.values())]
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + "---|" * len(keys) + "---:|" * len(metrics))
    for values, group in groups.items():
        cells = [mean_and_deviation(group, name, form) for name, (_, form) in metrics.items()]
        lines.append("| " + " | ".join([*map(str, values), *cells]) + " |")
    return "\n".join(lines)
