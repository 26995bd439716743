"""What the package claims about its speed and memory, as rows that one table shows.

A claim compares one variant with the peers that a user would pick, in one or more groups of
measured variants. Its figure is the ratio to the best peer of the group in which the claim does
worst.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.harness.output import text_table
from benchmarks.harness.saved_runs import Row, format_time, ratio
from benchmarks.harness.session import Group

MIB = 2**20
HOLDS, NOISE, MISSES, WRONG, LEFT_OUT = "holds", "within noise", "misses", "WRONG", "not measured"


@dataclass(frozen=True)
class Claim:
    """A sentence that a figure can refute.

    Attributes:
        key: names the claim on pages.
        text: the sentence, for the table.
        groups: the groups whose rows it needs.
        ours: the variant that it is about.
        peers: the variants that it is compared with.
        at_most: the largest ratio to the best peer with which the claim holds.
        memory: whether it is about peak memory; otherwise about time.
    """

    key: str
    text: str
    groups: tuple[Group, ...]
    ours: str
    peers: tuple[str, ...]
    at_most: float = 1.0
    memory: bool = False


class Figure(NamedTuple):
    """A claim's figures in one group: the ratio to a peer, and its quartiles."""

    group: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float


def figures(claim: Claim, rows: Iterable[Row]) -> list[Figure]:
    """Return the figure of each peer in each group that has both rows."""
    by_group: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, {})[row.variant] = row
    found = []
    for group in claim.groups:
        measured = by_group.get(group.name, {})
        own = measured.get(claim.ours)
        for peer in claim.peers:
            other = measured.get(peer)
            if own is None or other is None:
                continue
            if claim.memory:
                if "peak_bytes" not in own.extra or "peak_bytes" not in other.extra:
                    continue
                ours, theirs = own.extra["peak_bytes"], other.extra["peak_bytes"]
                found.append(Figure(group.name, peer, ours, theirs, *(3 * (ours / theirs,))))
            else:
                values = own.median, other.median
                found.append(Figure(group.name, peer, *values, *ratio(own, other)))
    return found


def against_best(each: Sequence[Figure]) -> list[Figure]:
    """Return the figure of the best peer in each group."""
    best: dict[str, Figure] = {}
    for figure in each:
        if figure.group not in best or figure.ratio > best[figure.group].ratio:
            best[figure.group] = figure
    return list(best.values())


def worst(each: Sequence[Figure]) -> Figure | None:
    return max(each, key=lambda figure: figure.ratio, default=None)


def verdict(claim: Claim, figure: Figure | None) -> str:
    """Say whether a figure supports the claim. Quartiles on both sides of the bound do not tell."""
    if figure is None:
        return LEFT_OUT
    if figure.high <= claim.at_most:
        return HOLDS
    return MISSES if figure.low > claim.at_most else NOISE


def table(claims: Sequence[Claim], rows: Sequence[Row], failed: set[str]) -> Iterator[list[str]]:
    """Yield the cells of each claim: claim, ours, best peer, ratio, verdict.

    Args:
        failed: names of groups in which a row's values disagree with their reference.
    """
    for claim in claims:
        best = against_best(figures(claim, rows))
        figure = worst(best)
        said = verdict(claim, figure)
        if any(group.name in failed for group in claim.groups):
            said = WRONG
        if figure is None:
            yield [claim.text, "-", "-", "-", said]
            continue
        written = written_size(claim)
        spread = "" if claim.memory else f" [{figure.low:.2f}, {figure.high:.2f}]"
        if len(best) > 1:
            said += f" (the worst of {len(best)}: {short(figure.group)})"
        yield [
            claim.text,
            written(figure.ours),
            f"{figure.peer}, {written(figure.theirs)}",
            f"{figure.ratio:.2f}{spread}, claimed {claim.at_most:g}",
            said,
        ]


def written_size(claim: Claim) -> Callable[[float], str]:
    return (lambda size: f"{size / MIB:.1f} MiB") if claim.memory else format_time


def short(group: str) -> str:
    """The words of a group's name that tell it from others of a claim."""
    return group.replace(" alone", "").replace("spline flow, ", "")


HEAD = ["claim", "ours", "best peer", "ours / peer", "verdict"]


def text(claims: Sequence[Claim], rows: Sequence[Row], failed: set[str]) -> str:
    """The closing table for a terminal, and a line that counts the verdicts."""
    cells = list(table(claims, rows, failed))
    shown = [["\n".join(textwrap.wrap(c[0], 60)), *c[1:]] for c in cells]
    lines = []
    for first, *rest in shown:
        head, *more = first.split("\n")
        lines.append([head, *rest])
        lines += [[line, "", "", "", ""] for line in more]
    counts = [
        f"{sum(c[-1].startswith(v) for c in cells)} {v}"
        for v in (HOLDS, NOISE, MISSES, WRONG, LEFT_OUT)
    ]
    return f"{text_table(HEAD, lines)}\n\n{len(cells)} claims: {', '.join(counts)}"
