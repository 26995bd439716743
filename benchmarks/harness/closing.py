"""The end of a benchmark run: the table of claims, and what was left out."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from benchmarks.bench_claims import claims
from benchmarks.harness.claims import text
from benchmarks.harness.saved_runs import Row
from benchmarks.harness.session import TIME_LIMIT, size_and_gpu


def rows_of(benchmarks: Sequence[Any]) -> list[Row]:
    """Return the rows of a session of pytest-benchmark."""
    return [Row(b.fullname, b.group, list(b.stats.data), b.extra_info) for b in benchmarks
            if "variant" in b.extra_info]  # fmt: skip


def closing_lines(
    rows: Sequence[Row],
    not_measured: Sequence[dict[str, str]],
    config: pytest.Config,
    with_claims: bool,
) -> Iterator[str]:
    """Yield the table of claims, and a line for each reason with the command that measures more."""
    if with_claims:
        failed = {row["group"] for row in not_measured if row["outcome"] == "failed"}
        yield text(claims(size_and_gpu(config)[1]), rows, failed)
        yield ""
    reasons: dict[str, list[dict[str, str]]] = {}
    for row in not_measured:
        if row["outcome"] == "skipped":
            reasons.setdefault(row["reason"], []).append(row)
    for reason, left in reasons.items():
        groups = list(dict.fromkeys(row["group"] for row in left))
        some = "; ".join(groups[:3]) + (f"; and {len(groups) - 3} more" if len(groups) > 3 else "")
        line = f"left out, {len(left)} rows: {reason} ({some})."
        if TIME_LIMIT in reason:
            line += " All of them: pytest benchmarks/ --benchmark-only --time-limit 3600"
        elif "is not installed" in reason:
            line += ' The peers: pip install -e ".[bench]"'
        yield line
    if with_claims and not config.getoption("--full"):
        yield ("left out: other sizes, depths and peers, and every operator. "
               "All of them, for hours: pytest benchmarks/ --benchmark-only --full")  # fmt: skip
