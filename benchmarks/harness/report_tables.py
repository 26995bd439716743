"""The tables of a benchmark report: a row for each group, a column for each variant."""

from collections.abc import Callable, Iterator, Sequence

from benchmarks.harness.output import markdown_table
from benchmarks.harness.saved_runs import Row, format_time, ratio

MIB = 2**20
Variants = dict[str, Row]


def by_group(rows: Sequence[Row]) -> dict[str, Variants]:
    """Return the rows by group and variant, in their order."""
    found: dict[str, Variants] = {}
    for row in rows:
        found.setdefault(row.group, {})[row.variant] = row
    return found


def timed(row: Row, first: Row) -> str:
    """The first variant's time, and of others the first one's time over theirs with quartiles."""
    if row is first:
        return format_time(row.median)
    middle, low, high = ratio(first, row)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _peak(row: Row, first: Row) -> str:
    peak = row.extra.get("peak_bytes")
    return "-" if peak is None else f"{peak / MIB:.2f}"


def _share(row: Row, first: Row) -> str:
    return f"{row.extra['share_of_copy_bandwidth']:.0%}"


def _launches(row: Row, first: Row) -> str:
    return str(row.extra["launches"])


FIRST = "The first column has a time; the others have that time divided by theirs [quartiles]."
COLUMNS: tuple[tuple[str, str | None, Callable[[Row, Row], str]], ...] = (
    (FIRST, None, timed),
    ("Peak memory, MiB:", "peak_bytes", _peak),
    ("The fewest bytes that must move, divided by the time, over the bandwidth of a copy:",
     "share_of_copy_bandwidth", _share),
    ("Launches:", "launches", _launches),
)  # fmt: skip


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the tables of groups that have the same variants, and of what else was measured."""
    families: dict[tuple[str, ...], dict[str, Variants]] = {}
    for name, group in by_group([row for row in rows if "figures" not in row.extra]).items():
        families.setdefault(tuple(group), {})[name] = group
    for variants, groups in families.items():
        for lead, key, cell in COLUMNS:
            if key is not None and not any(
                row.extra.get(key) is not None
                for group in groups.values()
                for row in group.values()
            ):
                continue
            lines = [[name, *(cell(row, group[variants[0]]) for row in group.values())]
                     for name, group in groups.items()]  # fmt: skip
            yield f"{lead}\n\n{markdown_table(['', *variants], lines)}\n"
    yield from others([row for row in rows if "figures" in row.extra])


def others(rows: Sequence[Row]) -> Iterator[str]:
    """Yield tables of memory ceilings and training, which name their own columns."""
    by_columns: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_columns.setdefault(tuple(row.extra["figures"]), []).append(row)
    for columns, group in by_columns.items():
        lines = [[row.variant, row.extra["spec"], format_time(row.median),
                  *(str(row.extra["figures"][c]) for c in columns)] for row in group]  # fmt: skip
        yield markdown_table(["", "model", "step", *columns], lines) + "\n"
