"""Figures on pages, written from the results that the repository keeps.

A page marks a figure by its key, and a table by its name:

    It takes <!--=deep-time.plain-->1.09<!--/--> of plain PyTorch's time.

    <!-- table: splines -->
    ...
    <!-- /table -->

`values` says which keys there are. `written` replaces what stands between the marks.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.harness.claims import (
    HEAD,
    Claim,
    Figure,
    against_best,
    figures,
    table,
    verdict,
    worst,
    written_size,
)
from benchmarks.harness.output import markdown_table
from benchmarks.harness.report_tables import by_group, tables
from benchmarks.harness.saved_runs import Row, Runs, format_time, ratio
from benchmarks.harness.session import slug

ROOT = Path(__file__).resolve().parents[2]
FIGURE = re.compile(r"<!--=([^>]+?)-->(.*?)<!--/-->", re.DOTALL)
TABLE = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- /table -->", re.DOTALL)
MIB = 2**20


def values(claims: Sequence[Claim], saved: Runs) -> dict[str, str]:
    """Return the figures that a page can name.

    `date`, `device`, `torch` and `commit` are those of the run. A claim K has `K.ratio`, to its
    best peer in its worst group, with quartiles `K.low` and `K.high`, the values `K.ours` and
    `K.theirs`, `K.peer` and `K.verdict`. For each peer P, as in ids of rows, `K.P` is the largest
    ratio over the groups and `K.P.least` the smallest one.
    """
    (environment,) = saved.environments
    found = {
        "date": saved.commands[0]["datetime"][:10],
        **{key: str(environment[key]) for key in ("device", "torch", "commit")},
    }
    for claim in claims:
        each = figures(claim, saved.rows)
        most = worst(against_best(each))
        if most is None:
            continue
        size = written_size(claim)
        own = {
            "ratio": f"{most.ratio:.2f}",
            "low": f"{most.low:.2f}",
            "high": f"{most.high:.2f}",
            "ours": size(most.ours),
            "theirs": size(most.theirs),
            "peer": most.peer,
            "verdict": verdict(claim, most),
        }
        by_peer: dict[str, list[Figure]] = {}
        for figure in each:
            by_peer.setdefault(slug(figure.peer), []).append(figure)
        for peer, over in by_peer.items():
            ratios = [figure.ratio for figure in over]
            own |= {peer: f"{max(ratios):.2f}", f"{peer}.least": f"{min(ratios):.2f}"}
        found |= {f"{claim.key}.{name}": value for name, value in own.items()}
    return found


def written(page: str, known: dict[str, str], made: dict[str, Callable[[], str]]) -> str:
    """Return a page with its figures and tables.

    Raises:
        ValueError: a mark names a figure or table that the results do not have.
    """

    def figure(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ValueError(f"{match[0]}: the results have no figure {match[1]!r}")
        return f"<!--={match[1]}-->{known[match[1]]}<!--/-->"

    def block(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"table: expected one of {sorted(made)}, got {match[1]!r}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]()}\n<!-- /table -->"

    return TABLE.sub(block, FIGURE.sub(figure, page))


def _groups(claims: Iterable[Claim], start: str, rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The measured groups of the claims whose keys begin with `start`."""
    names = {
        group.name for claim in claims if claim.key.startswith(start) for group in claim.groups
    }
    return {name: group for name, group in by_group(rows).items() if name in names}


def page_tables(claims: Sequence[Claim], saved: Runs) -> dict[str, Callable[[], str]]:
    """Return the tables that a page can show."""
    rows = saved.rows

    def all_claims() -> str:
        return markdown_table(HEAD, list(table(claims, rows, set())), texts=len(HEAD))

    def measured(start: str) -> str:
        return "\n".join(
            tables([r for g in _groups(claims, start, rows).values() for r in g.values()])
        )

    def layers() -> str:
        lines = []
        for name, group in _groups(claims, "alone-", rows).items():
            own = group["mflow_kernels"]
            cells = [f"{ratio(own, group[p])[0]:.2f}" if p in group else "-"
                     for p in ("plain", "FrEIA", "normflows")]  # fmt: skip
            lines.append([name.replace(" alone", ""), format_time(own.median), *cells])
        head = ["", "time", "over plain PyTorch's", "over FrEIA's", "over normflows'"]
        return markdown_table(head, lines)

    def training() -> str:
        found = {**_groups(claims, "deep-", rows), **_groups(claims, "chain", rows)}
        head = ["time over plain's, peak memory", *(n.removeprefix("train, ") for n in found)]
        variants = dict.fromkeys(v for group in found.values() for v in group)
        lines = [[v, *(_over_plain(group, v) for group in found.values())] for v in variants]
        return markdown_table(head, lines)

    def accelerated() -> str:
        lines = []
        for name, group in _groups(claims, "accelerate-", rows).items():
            if "original" not in group:
                continue
            original = group["original"]
            cells = [_with_peak(format_time(original.median), original)]
            for kind in ("mflow_kernels, accelerated", "mflow_kernels, accelerated reversibly"):
                row = group.get(kind)
                if row is None:
                    cells.append("-")
                    continue
                middle, low, high = ratio(row, original)
                cells.append(_with_peak(f"{middle:.2f} [{low:.2f}, {high:.2f}]", row))
            lines.append([name, *cells])
        return markdown_table(["", "original", "accelerated", "reversible"], lines)

    def splines() -> str:
        found = _groups(claims, "splines-train", rows)
        head = ["time over nflows'", *(n.removeprefix("spline flow, train, ") for n in found)]
        lines = [["nflows", *(format_time(g["nflows"].median) for g in found.values())]]
        for v in dict.fromkeys(v for group in found.values() for v in group if v != "nflows"):
            lines.append([v, *(f"{ratio(g[v], g['nflows'])[0]:.2f}" for g in found.values())])
        return markdown_table(head, lines)

    return {
        "claims": all_claims,
        "layers": layers,
        "training": training,
        "accelerated": accelerated,
        "splines": splines,
        "sequences": lambda: measured("sequences"),
    }


def _over_plain(group: dict[str, Row], variant: str) -> str:
    if variant not in group:
        return "-"
    return _with_peak(f"{ratio(group[variant], group['plain'])[0]:.2f}", group[variant])


def _with_peak(cell: str, row: Row) -> str:
    peak = row.extra.get("peak_bytes")
    return cell if peak is None else f"{cell}, {peak / MIB:.1f} MiB"
