"""Turn saved benchmark runs into a Markdown page and plots, and compare two runs.

    pytest benchmarks/ --benchmark-only --benchmark-json results.json
    python -m benchmarks.report results.json --out report
    python -m benchmarks.report new.json --against old.json --threshold 1.1

Without --out, the page is printed without plots. Ratios are medians over interleaved rounds; the
brackets hold their first and third quartiles. With --against, the exit code is 1 if a row of both
runs now fails, or takes more than `threshold` times as long or as much memory as before. It is 2 if
the runs used different devices, clocks or numbers of threads.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.output import save_json
from benchmarks.harness.saved_runs import Row, Runs, merged, ratio, runs, spread

MIB = 2**20
KINDS = ("ops", "layers", "models", "interop", "ceilings", "training")
PACKAGE = "mflow_kernels"
STORED = f"{PACKAGE}, stored"  # stores activations, as the peers do
TASKS = {"train": "Training step", "forward": "Forward", "sample": "Sampling"}
Tables = Callable[[Sequence[Row]], Iterator[str]]


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)) + "\n"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _spread(row: Row) -> str:
    low, high = spread(row.rounds)
    return f"{_time(row.median)} [{_time(low)}, {_time(high)}]"


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
        lines = [_operator(mine, names, launched) for mine in groups]
        head += [f"launches: {', '.join(names)}"] if launched else []
        yield f"#### {shape}\n\n{_markdown(head, lines)}"


def _operator(mine: dict[str, Row], names: Sequence[str], launched: bool) -> list[str]:
    def each(written: Callable[[Row], str]) -> list[str]:
        return [written(mine[name]) if name in mine else "-" for name in names]

    def rate(row: Row) -> str:
        share, bytes_per_second = (
            row.extra[k] for k in ("share_of_copy_bandwidth", "bytes_per_second")
        )
        return f"{_time(row.median)} ({bytes_per_second / 1e9:.1f}, {share:.0%})"

    first = next(iter(mine.values())).extra
    own = mine.get(PACKAGE)
    cells = [f"{first['operator']} {first['direction']}", f"{first['bytes'] / MIB:.2f}"]
    cells += each(rate)
    cells += [_against(own, mine.get(name)) for name in names if name != PACKAGE]
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
    first = [next(iter(mine.values())).extra for mine in groups]
    differ = [f for f in VARYING if len({e[f] for e in first}) > 1] or ["steps"]
    heads = [" ".join(f"{SHORT[f]}={e[f]}" for f in differ) for e in first]
    same = ", ".join(f"{SHORT[f] or f}={first[0][f]}" for f in VARYING if f not in differ)
    return groups, heads, same


def speedups(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table for each task and width: each peer's time divided by that of mflow_kernels."""
    for title, family in _families(rows):
        groups, heads, same = _columns(family)
        names = dict.fromkeys(row.variant for row in family if not row.variant.startswith(PACKAGE))
        lines = [[name, *(_against(mine.get(name), mine.get(STORED)) for mine in groups)]
                 for name in names]  # fmt: skip
        yield f"#### {title}\n\n{same}\n\n{_markdown(['', *heads], lines)}"


def comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """Yield tables over depth and resolution for each task and width: relative time, and memory."""
    for title, family in _families(rows):
        yield f"#### {title}\n\n{_comparison(family)}"


def _comparison(family: Sequence[Row]) -> str:
    groups, heads, same = _columns(family)
    names = list(dict.fromkeys(row.variant for row in family))

    def table(cell: Callable[[dict[str, Row], str], str]) -> str:
        lines = [[name, *(cell(mine, name) for mine in groups)] for name in names]
        return _markdown(["", *heads], lines)

    def relative_time(mine: dict[str, Row], name: str) -> str:
        if name == "plain" and name in mine:
            return _spread(mine[name])
        return _against(mine.get(name), mine.get("plain"))

    def peak_memory(mine: dict[str, Row], name: str) -> str:
        peak = mine[name].extra.get("peak_bytes") if name in mine else None
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
    for columns, mine in by_columns.items():
        lines = [[row.variant, row.extra["spec"], _time(row.median),
                  *(str(row.extra["figures"][c]) for c in columns)] for row in mine]  # fmt: skip
        yield _markdown(["", "model", "step", *columns], lines)


def accelerated(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of other libraries' models."""
    kinds = list(dict.fromkeys(row.variant for row in rows))
    head = ["", "model", *kinds, *(f"original / {kind}" for kind in kinds[1:]), "peak MiB of each"]
    lines = []
    for mine in _groups(rows).values():
        original, extra = mine.get("original"), next(iter(mine.values())).extra
        peaks = [mine[k].extra["peak_bytes"] / MIB if k in mine else None for k in kinds]
        lines.append([
            extra["library"], extra["spec"],
            *(_spread(mine[k]) if k in mine else "-" for k in kinds),
            *(_against(original, mine.get(k)) for k in kinds[1:]),
            ", ".join("-" if peak is None else f"{peak:.1f}" for peak in peaks),
        ])  # fmt: skip
    yield _markdown(head, lines)


FASTER = (
    f"Time of each peer divided by that of {PACKAGE} with stored activations. Above 1, {PACKAGE} "
    "is faster."
)
SHARES = "The row of plain eager gives its time; other rows give their time divided by plain's."
BYTES = "Time (GB/s of the fewest bytes that the operator must move, share of copy bandwidth)."


def page(saved: Runs, pictures: Sequence[Path] = ()) -> str:
    """Return the Markdown page. It can also be a section of another page."""
    of = {kind: [row for row in saved.rows if row.kind == kind] for kind in KINDS}
    constant = [row for row in of["layers"] if row.extra["constant"]]
    one_step = [row for row in of["layers"] if not row.extra["constant"]]
    sections: tuple[tuple[str, Sequence[Row], Tables, str, tuple[str, ...]], ...] = (
        ("Speed-up over each peer, the flow's own operators", constant, speedups, FASTER, ()),
        ("Speed-up over each peer, whole models", of["models"], speedups, FASTER,
         ("speedup-layers", "speedup-models")),
        ("Models", of["models"], comparisons, SHARES, ("depth", "resolution")),
        ("The flow's own operators", constant, comparisons, SHARES, ()),
        ("One step of flow", one_step, comparisons, SHARES, ()),
        ("Operators", of["ops"], operators, BYTES, ("bandwidth",)),
        ("Accelerated models of other libraries", of["interop"], accelerated,
         "A training step.", ()),
        ("Memory ceilings", of["ceilings"], others, "", ()),
        ("Short training", of["training"], others, "", ()),
    )  # fmt: skip
    parts = ["## Measured\n", *_circumstances(saved)]
    for title, rows, tables, lead, plots in sections:
        parts.append(f"### {title}\n")
        if not rows:
            parts.append("Not measured.\n")
            continue
        parts += [f"{lead}\n"] if lead else []
        parts += list(tables(rows))
        parts += [f"![{p.stem}]({p.name})\n" for p in pictures if p.stem in plots]
    notes = {row.variant: row.extra["note"] for row in saved.rows if "note" in row.extra}
    if notes:
        lines = [f"- {name}: {note}" for name, note in notes.items()]
        parts.append("### What is compared\n\n" + "\n".join(lines) + "\n")
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
    return "### Not measured\n\n" + ("\n".join(lines) or "Nothing was left out.") + "\n"


def regressions(new: Runs, old: Runs, threshold: float) -> tuple[str, bool]:
    """Return a table of the rows that got slower or larger, and whether there are any."""
    before = {row.name: row for row in old.rows}
    lines, compared = [], 0
    for row in new.rows:
        base = before.get(row.name)
        if base is None:
            continue
        compared += 1
        measures = [("time", row.median, base.median, _time)]
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
    return summary + _markdown(["", "", "before", "now", "ratio"], lines), True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        part = options.out / ".report.md.part"
        part.write_text(page(new, pictures))
        part.replace(options.out / "report.md")
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
