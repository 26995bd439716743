"""Compare two benchmark runs: two commits, two machines, or two cards.

    python -m benchmarks.compare before.json after.json

For each row of both runs, the ratio is the time of the second run over that of the first, with an
interval that follows from the quartiles of both. A row moved if its interval lacks 1 and the ratio
differs from 1 by more than --least. Peak memory has no noise; it moved if it differs by that much.
Rows that only one run has are listed too. The exit code is 0, or 2 for files that are not results.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.harness.output import command_parser, text_table
from benchmarks.harness.saved_runs import Row, Runs, format_time, merged, runs, spread

MIB = 2**20


class Change(NamedTuple):
    """How a row's time or peak memory changed: a ratio, and the interval of its noise."""

    name: str
    what: str
    before: str
    after: str
    ratio: float
    low: float
    high: float

    def moved(self, least: float) -> bool:
        return (self.low > 1 or self.high < 1) and abs(self.ratio - 1) > least


def _key(row: Row) -> str:
    return f"{row.group}: {row.variant}"


def change_of_time(before: Row, after: Row) -> Change:
    """Compare medians. The rounds of two runs were not interleaved, so the spreads add up."""
    (low_a, high_a), (low_b, high_b) = spread(before.rounds), spread(after.rounds)
    middle_a, middle_b = median(before.rounds), median(after.rounds)
    interval = low_b / high_a, high_b / low_a
    written = format_time(middle_a), format_time(middle_b)
    return Change(_key(before), "time", *written, middle_b / middle_a, *interval)


def changes(before: Runs, after: Runs) -> Iterator[Change]:
    """Yield the changes of all rows that both runs have."""
    known = {_key(row): row for row in before.rows}
    for row in after.rows:
        old = known.get(_key(row))
        if old is None:
            continue
        yield change_of_time(old, row)
        then, now = old.extra.get("peak_bytes"), row.extra.get("peak_bytes")
        if then and now:
            sizes = f"{then / MIB:.2f} MiB", f"{now / MIB:.2f} MiB"
            yield Change(_key(row), "memory", *sizes, *(3 * (now / then,)))


def only(one: Runs, other: Runs) -> list[str]:
    names = {_key(row) for row in other.rows}
    return [_key(row) for row in one.rows if _key(row) not in names]


def told(before: Runs, after: Runs, least: float) -> Iterator[str]:
    """Yield the lines of the comparison."""
    for title, saved in (("first", before), ("second", after)):
        for e in saved.environments:
            yield f"{title}: " + ", ".join(f"{key} {value}" for key, value in e.items())
    found = list(changes(before, after))
    moved = sorted((c for c in found if c.moved(least)), key=lambda c: c.ratio)
    yield f"\n{len(found)} figures in both runs, {len(moved)} moved beyond their noise"
    if found:
        yield f"median ratio of all: {median(c.ratio for c in found):.2f}"
    lines = [[c.name, c.what, c.before, c.after, f"{c.ratio:.2f} [{c.low:.2f}, {c.high:.2f}]"]
             for c in moved]  # fmt: skip
    if lines:
        yield "\n" + text_table(["moved", "", "first", "second", "second / first"], lines)
    for title, names in (("first", only(before, after)), ("second", only(after, before))):
        if names:
            yield f"\nonly in the {title} run, {len(names)}:"
            yield from (f"  {name}" for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.compare", __doc__)
    parser.add_argument("before", type=Path, help="JSON of pytest --benchmark-json")
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=0.03, metavar="SHARE",
                        help="changes below this share are not listed (0.03)")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        before, after = (runs(merged([path])) for path in (options.before, options.after))
    except ValueError as error:
        parser.error(str(error))
    for line in told(before, after, options.least):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
