"""Turn saved benchmark runs into a Markdown page and plots, and compare two runs.

    pytest benchmarks/ --benchmark-only --benchmark-json results.json
    python -m benchmarks.report results.json --out report
    python -m benchmarks.report new.json --against old.json --threshold 1.1

Without --out, the page is printed without plots. Ratios are medians over interleaved rounds; the
brackets hold their first and third quartiles. With --against, the exit code is 1 if a row of both
runs now fails, or takes more than `threshold` times as long or as much memory as before. It is 2 if
the runs used different devices, clocks or numbers of threads.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness.output import command_parser, markdown_table, save_json, save_text
from benchmarks.harness.report_tables import (
    MIB,
    PACKAGE,
    Tables,
    accelerated,
    comparisons,
    format_time,
    operators,
    others,
    speedups,
)
from benchmarks.harness.saved_runs import Row, Runs, merged, runs

KINDS = ("ops", "layers", "models", "interop", "sequences", "ceilings", "training")

FASTER = (
    f"Time of each peer divided by that of {PACKAGE} with stored activations. Above 1, {PACKAGE} "
    "is faster."
)
SHARES = "The row of plain eager gives its time; other rows give their time divided by plain's."
BYTES = "Time (GB/s of the fewest bytes that the operator must move, share of copy bandwidth)."


def page(saved: Runs, pictures: Sequence[Path] = ()) -> str:
    """Return the Markdown page; `benchmarks/measured.md` is one."""
    by_kind = {kind: [row for row in saved.rows if row.kind == kind] for kind in KINDS}
    constant = [row for row in by_kind["layers"] if row.extra["constant"]]
    one_step = [row for row in by_kind["layers"] if not row.extra["constant"]]
    sections: tuple[tuple[str, Sequence[Row], Tables, str, tuple[str, ...]], ...] = (
        ("Speed-up over each peer, the flow's own operators", constant, speedups, FASTER, ()),
        ("Speed-up over each peer, whole models", by_kind["models"], speedups, FASTER,
         ("speedup-layers", "speedup-models")),
        ("Models", by_kind["models"], comparisons, SHARES, ("depth", "resolution")),
        ("The flow's own operators", constant, comparisons, SHARES, ()),
        ("One step of flow", one_step, comparisons, SHARES, ()),
        ("Operators", by_kind["ops"], operators, BYTES, ("bandwidth",)),
        ("Accelerated models of other libraries", by_kind["interop"], accelerated,
         "A training step.", ()),
        ("Sequences", by_kind["sequences"], accelerated, "A training step.", ()),
        ("Memory ceilings", by_kind["ceilings"], others, "", ()),
        ("Short training", by_kind["training"], others, "", ()),
    )  # fmt: skip
    parts = ["# Measured\n", *_circumstances(saved)]
    for title, rows, tables, lead, plots in sections:
        parts.append(f"## {title}\n")
        if not rows:
            parts.append("Not measured.\n")
            continue
        parts += [f"{lead}\n"] if lead else []
        parts += list(tables(rows))
        parts += [f"![{p.stem}]({p.name})\n" for p in pictures if p.stem in plots]
    notes = {row.variant: row.extra["note"] for row in saved.rows if "note" in row.extra}
    if notes:
        lines = [f"- {name}: {note}" for name, note in notes.items()]
        parts.append("## Compared models\n\n" + "\n".join(lines) + "\n")
    parts.append(not_measured(saved))
    return "\n".join(parts)


def _circumstances(saved: Runs) -> Iterator[str]:
    """Yield lines on the command, date, machine and versions."""
    for run in saved.commands:
        yield f"- `{run['command']}`, {run['datetime'][:10]}"
    for e in saved.environments:
        yield (
            f"- {e['device']}, {e['threads']} thread(s), {e['clock']}; torch {e['torch']}, triton "
            f"{e['triton']}, mflow_kernels {e['mflow_kernels']} at {e['commit']}"
        )
    bandwidths = sorted({row.extra["copy_bytes_per_second"] for row in saved.rows})
    if bandwidths:
        rates = ", ".join(f"{b / 1e9:.1f}" for b in bandwidths)
        yield f"- copy bandwidth (bytes read and written), GB/s: {rates}"
    yield "- medians of interleaved rounds [first and third quartile]; ratios are round by round\n"


def not_measured(saved: Runs) -> str:
    """Return a section on skipped and failed rows, with one line for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in saved.not_measured:
        reasons.setdefault((row["outcome"], row["reason"]), []).append(row["name"])
    lines = [f"- {outcome}: {reason} ({len(names)} rows, the first {names[0].split('::')[-1]})"
             for (outcome, reason), names in reasons.items()]  # fmt: skip
    return "## Not measured\n\n" + ("\n".join(lines) or "Nothing was left out.") + "\n"


def regressions(new: Runs, old: Runs, threshold: float) -> tuple[str, bool]:
    """Return a table of the rows that got slower or larger, and whether there are any."""
    before = {row.name: row for row in old.rows}
    lines, compared = [], 0
    for row in new.rows:
        base = before.get(row.name)
        if base is None:
            continue
        compared += 1
        measures = [("time", row.median, base.median, format_time)]
        if row.extra.get("peak_bytes") and base.extra.get("peak_bytes"):
            measures.append(("memory", row.extra["peak_bytes"], base.extra["peak_bytes"],
                             lambda b: f"{b / MIB:.2f} MiB"))  # fmt: skip
        for what, now, then, written in measures:
            if now > threshold * then:
                lines.append([row.name.split("::")[-1], what, written(then), written(now),
                              f"{now / then:.2f}"])  # fmt: skip
    failed = [r for r in new.not_measured if r["outcome"] == "failed" and r["name"] in before]
    lines += [[r["name"].split("::")[-1], "fails now", "-", "-", r["reason"]] for r in failed]
    lost = len(before) - compared - len(failed)
    summary = f"{compared} rows compared, {lost} rows of the old run missing; "
    if not lines:
        return summary + f"none got worse by more than {threshold:g} times", not compared
    summary += f"{len(lines)} got worse by more than {threshold:g} times, or fail\n\n"
    return summary + markdown_table(["", "", "before", "now", "ratio"], lines) + "\n", True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.report", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of pytest --benchmark-json")
    parser.add_argument("--against", type=Path, metavar="OLD", help="an earlier run")
    parser.add_argument(
        "--threshold", type=float, default=1.1, help="ratio that counts as a regression (1.1)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md and plots there")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write all results as one file")
    options = parser.parse_args(arguments)
    if not options.threshold > 0:
        parser.error(f"argument --threshold: expected more than 0, got {options.threshold}")
    try:
        content = merged(options.results)
        new = runs(content)
        old = runs(merged([options.against])) if options.against else None
    except ValueError as error:
        parser.error(str(error))
    if options.save:
        save_json(options.save, content)
    if options.out:
        from benchmarks.harness.plots import draw

        options.out.mkdir(parents=True, exist_ok=True)
        pictures = draw(new.rows, options.out)
        save_text(options.out / "report.md", page(new, pictures))
        print(f"wrote {options.out / 'report.md'} and {len(pictures)} plots")
    elif old is None and not options.save:
        print(page(new))
    if old is None:
        return 0
    kinds = ("device", "threads", "clock")
    found = [{tuple(row.extra[k] for k in kinds) for row in run.rows} for run in (new, old)]
    if found[0] != found[1]:
        machines = (", ".join(map(str, sorted(each))) for each in found)
        print(f"not comparable: {' against '.join(machines)}", file=sys.stderr)
        return 2
    summary, worse = regressions(new, old, options.threshold)
    print(summary)
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
