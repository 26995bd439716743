"""Write the figures of the pages, or a report of other benchmark runs.

    python -m benchmarks.report --measure        # measure the claims, and write the pages
    python -m benchmarks.report                  # write the pages from the results that are kept
    python -m benchmarks.report results.json --out report

The kept results are benchmarks/results/claims.json. The pages are benchmarks/measured.md, and the
marked figures, tables and pictures of README.md and docs/ (`harness/pages.py`). A report of other
results has their tables, and with --out also a picture. Ratios are medians over interleaved
rounds; the brackets hold their first and third quartiles.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from benchmarks.bench_claims import claims
from benchmarks.harness.output import command_parser, save_json, save_text
from benchmarks.harness.pages import ROOT, page_tables, values, written
from benchmarks.harness.pictures import draw_claims, draw_comparison, draw_ratios, draw_splines
from benchmarks.harness.report_tables import tables
from benchmarks.harness.saved_runs import Runs, kept, merged, runs

RESULTS = ROOT / "benchmarks" / "results" / "claims.json"
PICTURES = ROOT / "docs" / "pictures"
MEASURED = ROOT / "benchmarks" / "measured.md"
KINDS = {
    "claims": "Groups of the claims",
    "models": "Models",
    "layers": "Layers",
    "ops": "Operators",
    "splines": "Spline flows",
    "autoregressive": "Masked autoregressive layers",
    "interop": "Accelerated models of other libraries",
    "sequences": "Sequences",
    "ceilings": "Memory ceilings",
    "training": "Short training",
}


def page(saved: Runs, before: Sequence[str] = ()) -> str:
    """Return the Markdown page of a run: a section for each file, with `before` ahead of them."""
    parts = ["# Measured\n", *_circumstances(saved), *before]
    for kind, title in KINDS.items():
        rows = [row for row in saved.rows if row.kind == kind]
        if rows:
            parts += [f"## {title}\n", *tables(rows)]
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


def digest(results: Path) -> str:
    """Return what marks a picture as drawn from a file of results."""
    return sha256(results.read_bytes()).hexdigest()[:16]


def pages() -> list[Path]:
    """Return the pages whose marked figures come from the kept results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written_pages(saved: Runs) -> dict[Path, str]:
    """Return each page, as the results say that it must be."""
    every = claims(False)
    known, made = values(every, saved), page_tables(every, saved)
    found = {path: written(path.read_text(), known, made) for path in pages()}
    claimed = [
        "## Claims\n\nThe ratio is that to the best peer, in the group in which the claim does "
        "worst. A claim holds if its third quartile is at most what is claimed.\n",
        f"{made['claims']()}\n",
        "![Each claim's ratio, and what is claimed](../docs/pictures/claims.png)\n",
    ]
    return {**found, MEASURED: page(saved, claimed)}


def draw(saved: Runs, folder: Path, mark: str) -> list[Path]:
    """Draw the pictures of the pages."""
    every, date = claims(False), saved.commands[0]["datetime"][:10]
    groups = {claim.key: {group.name for group in claim.groups} for claim in every}

    def of(key: str) -> list:
        return [row for row in saved.rows if row.group in groups[key]]

    draw_comparison(of("deep-time"), date, folder / "comparison.png", mark)
    draw_splines(of("splines-train"), date, folder / "splines.png", mark)
    draw_claims(every, saved.rows, folder / "claims.png", mark)
    return [folder / f"{name}.png" for name in ("comparison", "splines", "claims")]


def measure() -> int:
    """Measure the claims into the kept results. Return pytest's exit code."""
    whole = RESULTS.with_name("whole.json")
    command = ["pytest", "benchmarks/", "--benchmark-only", "--clock", "process", "--time-limit",
               "400", "--benchmark-json", str(whole)]  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
    if whole.exists():
        if code == 0:
            save_text(RESULTS, kept(merged([whole])))
        whole.unlink()
        whole.with_suffix(".png").unlink(missing_ok=True)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.report", __doc__)
    parser.add_argument("results", type=Path, nargs="*", help="JSON of pytest --benchmark-json")
    parser.add_argument("--measure", action="store_true", help="measure the claims first")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.md and a picture there"
    )
    parser.add_argument("--save", type=Path, metavar="PATH", help="write all results as one file")
    options = parser.parse_args(arguments)
    if not options.results:
        if options.measure and (code := measure()):
            print("the pages keep their figures, because the run failed", file=sys.stderr)
            return code
        saved = runs(merged([RESULTS]))
        draw(saved, PICTURES, digest(RESULTS))
        for path, text in written_pages(saved).items():
            if not path.exists() or path.read_text() != text:
                save_text(path, text)
                print(f"wrote {path.relative_to(ROOT)}")
        return 0
    try:
        content = merged(options.results)
    except ValueError as error:
        parser.error(str(error))
    if options.save:
        save_json(options.save, content)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        saved = runs(content)
        draw_ratios(saved.rows, options.out / "ratios.png")
        save_text(options.out / "report.md", page(saved, ["![Ratios](ratios.png)\n"]))
        print(f"wrote {options.out / 'report.md'} and a picture")
    elif not options.save:
        print(page(runs(content)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
