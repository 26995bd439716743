"""The tables of a benchmark report, as Markdown."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.harness.output import markdown_table
from benchmarks.harness.saved_runs import Row, format_time, ratio, spread

MIB = 2**20
PACKAGE = "mflow_kernels"
STORED = f"{PACKAGE}, stored"  # stores activations, as the peers do
TASKS = {"train": "Training step", "forward": "Forward", "sample": "Sampling"}
Tables = Callable[[Sequence[Row]], Iterator[str]]


def _spread(row: Row) -> str:
    low, high = spread(row.rounds)
    return f"{format_time(row.median)} [{format_time(low)}, {format_time(high)}]"


def _groups(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.group, {})[row.variant] = row
    return found


def _against(row: Row | None, base: Row | None) -> str:
    if row is None or base is None:
        return "-"
    middle, low, high = ratio(row, base)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def operators(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table for each shape."""
    for shape in dict.fromkeys(row.extra["shape"] for row in rows):
        groups = _groups([r for r in rows if r.extra["shape"] == shape]).values()
        names = [name for name in (PACKAGE, "eager", "compiled") if any(name in g for g in groups)]
        launched = any(row.extra["launches"] is not None for g in groups for row in g.values())
        head = ["", "fewest MiB", *names, *(f"{PACKAGE} / {n}" for n in names if n != PACKAGE),
                f"peak MiB: {', '.join(names)}"]  # fmt: skip
        lines = [_operator(group, names, launched) for group in groups]
        head += [f"launches: {', '.join(names)}"] if launched else []
        yield f"### {shape}\n\n{markdown_table(head, lines)}\n"


def _operator(group: dict[str, Row], names: Sequence[str], launched: bool) -> list[str]:
    def each(written: Callable[[Row], str]) -> list[str]:
        return [written(group[name]) if name in group else "-" for name in names]

    def rate(row: Row) -> str:
        share, bytes_per_second = (
            row.extra[k] for k in ("share_of_copy_bandwidth", "bytes_per_second")
        )
        return f"{format_time(row.median)} ({bytes_per_second / 1e9:.1f}, {share:.0%})"

    first = next(iter(group.values())).extra
    own = group.get(PACKAGE)
    cells = [f"{first['operator']} {first['direction']}", f"{first['bytes'] / MIB:.2f}"]
    cells += each(rate)
    cells += [_against(own, group.get(name)) for name in names if name != PACKAGE]
    cells.append(", ".join(each(lambda row: f"{row.extra['peak_bytes'] / MIB:.2f}")))
    if launched:
        cells.append(", ".join(each(lambda row: str(row.extra["launches"]))))
    return cells


VARYING = ("channels", "side", "levels", "steps", "width", "batch", "precision")
SHORT = {"channels": "channels", "side": "px", "levels": "L", "steps": "K", "width": "W",
         "batch": "B", "precision": ""}  # fmt: skip


def _families(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the title and the rows of each table: those of one task, width and precision."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        e = row.extra
        key = (e["task"], None if e["constant"] else e["width"], e["precision"])
        families.setdefault(key, []).append(row)
    for (task, width, precision), family in families.items():
        networks = "constant networks" if width is None else f"width {width}"
        low = "" if precision == "float32" else f", {precision} networks"
        yield f"{TASKS[task]}, {networks}{low}", family


def _columns(family: Sequence[Row]) -> tuple[list[dict[str, Row]], list[str], str]:
    """Return the groups of a family, the heading of each, and the settings that all share."""
    groups = list(_groups(family).values())
    first = [next(iter(group.values())).extra for group in groups]
    differ = [f for f in VARYING if len({e[f] for e in first}) > 1] or ["steps"]
    heads = [" ".join(f"{SHORT[f]}={e[f]}" for f in differ) for e in first]
    same = ", ".join(f"{SHORT[f] or f}={first[0][f]}" for f in VARYING if f not in differ)
    return groups, heads, same


def speedups(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table for each task and width: each peer's time divided by that of mflow_kernels."""
    for title, family in _families(rows):
        groups, heads, same = _columns(family)
        names = dict.fromkeys(row.variant for row in family if not row.variant.startswith(PACKAGE))
        lines = [[name, *(_against(group.get(name), group.get(STORED)) for group in groups)]
                 for name in names]  # fmt: skip
        yield f"### {title}\n\n{same}\n\n{markdown_table(['', *heads], lines)}\n"


def comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """Yield tables over depth and resolution for each task and width: relative time, and memory."""
    for title, family in _families(rows):
        yield f"### {title}\n\n{_comparison(family)}"


def _comparison(family: Sequence[Row]) -> str:
    groups, heads, same = _columns(family)
    names = list(dict.fromkeys(row.variant for row in family))

    def table(cell: Callable[[dict[str, Row], str], str]) -> str:
        lines = [[name, *(cell(group, name) for group in groups)] for name in names]
        return markdown_table(["", *heads], lines) + "\n"

    def relative_time(group: dict[str, Row], name: str) -> str:
        if name == "plain" and name in group:
            return _spread(group[name])
        return _against(group.get(name), group.get("plain"))

    def peak_memory(group: dict[str, Row], name: str) -> str:
        peak = group[name].extra.get("peak_bytes") if name in group else None
        return "-" if peak is None else f"{peak / MIB:.1f}"

    parts = [f"{same}\n\n{table(relative_time)}"]
    if any("peak_bytes" in row.extra for row in family):
        title = "Peak memory of a training step, including gradients, MiB:"
        parts.append(f"{title}\n\n{table(peak_memory)}")
    if family[0].extra["task"] == "train":
        numbers = {row.variant: row.extra["parameters"] for row in groups[-1].values()}
        counts = "; ".join(f"{name} {count:,}" for name, count in numbers.items())
        parts.append(f"Parameters ({heads[-1]}): {counts}.\n")
    return "\n".join(parts)


def others(rows: Sequence[Row]) -> Iterator[str]:
    """Yield tables of memory ceilings and training, which name their own columns."""
    by_columns: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_columns.setdefault(tuple(row.extra["figures"]), []).append(row)
    for columns, group in by_columns.items():
        lines = [[row.variant, row.extra["spec"], format_time(row.median),
                  *(str(row.extra["figures"][c]) for c in columns)] for row in group]  # fmt: skip
        yield markdown_table(["", "model", "step", *columns], lines) + "\n"


def accelerated(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of other libraries' models."""
    kinds = list(dict.fromkeys(row.variant for row in rows))
    head = ["", "model", *kinds, *(f"original / {kind}" for kind in kinds[1:]), "peak MiB of each"]
    lines = []
    for group in _groups(rows).values():
        original, extra = group.get("original"), next(iter(group.values())).extra
        peaks = [group[k].extra["peak_bytes"] / MIB if k in group else None for k in kinds]
        lines.append([
            extra["library"], extra["spec"],
            *(_spread(group[k]) if k in group else "-" for k in kinds),
            *(_against(original, group.get(k)) for k in kinds[1:]),
            ", ".join("-" if peak is None else f"{peak:.1f}" for peak in peaks),
        ])  # fmt: skip
    yield markdown_table(head, lines) + "\n"
