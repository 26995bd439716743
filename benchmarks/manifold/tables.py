"""Tables of the comparisons: settings of the sweep, and differences seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import t

from benchmarks.harness.output import markdown_table
from benchmarks.manifold.methods import RECIPES
from benchmarks.manifold.output import Row


def sweep(rows: Sequence[Row]) -> str:
    """Return one line per method: the result of each setting, best first.

    Args:
        rows: runs of a comparison. Those with seed 0 are the sweep.
    """
    lines = []
    for method, recipe in RECIPES.items():
        found = [
            row | row.get("validation", {})
            for row in rows
            if row["method"] == method and row["seed"] == 0 and row["steps"]
        ]
        if not found:
            continue
        key = "bits" if recipe.by_likelihood else "score"
        found.sort(key=lambda row, key=key: math.inf if row.get(key) is None else row[key])
        cells = []
        for row in found:
            weight = f", {row['weight']:g}" if recipe.weighted else ""
            value = "not finite" if row.get(key) is None else f"{row[key]:.3g}"
            cells.append(f"{value} at ({row['rate']:g}{weight})")
        by = "bits per dimension" if recipe.by_likelihood else "Frechet distance"
        lines.append([method, by, "; ".join(cells)])
    head = ("method", "chosen by", "result at (learning rate, weight)")
    return markdown_table(head, lines, texts=3) + "\n"


def differences(rows: Sequence[Row], reference: str, metrics: Mapping[str, tuple[str, str]]) -> str:
    """Return a table of the differences between each method and the reference on the same seed.

    A cell holds the mean and its 95% confidence interval by Student's t, for which the differences
    count as independent and normal. It is a dash if a method lacks the metric, and empty without
    at least two seeds.
    """
    by_seed: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "failed" not in row:
            by_seed.setdefault(row["method"], {})[row["seed"]] = row
    base = by_seed.pop(reference, {})
    if len(base) < 2:
        return ""
    heads = [f"minus {reference}", *(heading for heading, _ in metrics.values())]
    lines = []
    for method, found in by_seed.items():
        seeds = sorted(found.keys() & base.keys())
        cells = []
        for name, (_, form) in metrics.items():
            pairs = [(found[seed][name], base[seed][name]) for seed in seeds]
            if any(value is None for pair in pairs for value in pair):
                cells.append("-")
                continue
            cells.append(_interval([a - b for a, b in pairs], form))
        lines.append([method, *cells])
    return markdown_table(heads, lines) + "\n"


def _interval(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return ""
    if not all(map(math.isfinite, values)):
        return "not finite"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+{form}} ± {half:{form}}"
