"""Compare manifold flows with other methods on small real images.

The parts are digits and patches (small real images), longer trainings of some methods on digits,
and uses of the trained models (noise removed, hidden pixels filled in). Each run is a JSON file in
the output folder, and a run whose file exists is not repeated. Each part writes tables (Markdown)
and pictures (PNG). All parts take about eight hours of CPU time in one process, and with `--quick`
about five minutes.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.output import command_parser, save_text
from benchmarks.manifold import images, uses
from benchmarks.manifold.methods import RECIPES
from benchmarks.manifold.output import Store, fill_in

Run = Callable[[Store, bool], None]
Report = Callable[[Store], dict[str, str]]
PARTS: dict[str, tuple[Run, Report]] = {
    "digits": (partial(images.run, "digits"), partial(images.report, "digits")),
    "longer": (images.run_longer, lambda store: {}),
    "uses": (uses.run, uses.report),
    "patches": (partial(images.run, "patches"), partial(images.report, "patches")),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    store = Store(options.out / ("quick" if options.quick else "full"))
    if options.method:
        row = images.run_one(store, options.method, options.seed, options.seconds)
        row.pop("picture", None)
        print(json.dumps(row, indent=1))
        return
    for name in options.only or PARTS:
        run, report = PARTS[name]
        if not options.tables:
            run(store, options.quick)
        if not store.has_any(f"{name}-"):
            print(f"no runs of {name} in {store.folder}")
            continue
        for table, text in report(store).items():
            save_text(store.folder / f"{table}.md", text)
            print(f"\n{text}")
    for document in options.docs:
        fill_in(document, store.folder)
    print(f"runs, tables and pictures are in {store.folder}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.manifold", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, little time and a smaller sweep"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/manifold_recovery"), metavar="DIR",
        help="folder for runs, tables and pictures (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only", choices=list(PARTS), action="append", help="run one part; may be repeated"
    )
    parser.add_argument(
        "--method", choices=list(RECIPES), metavar="NAME",
        help="make and print one run on digits, of this row of the tables, and nothing else",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the run of --method (default: 0)"
    )
    parser.add_argument(
        "--seconds", type=float, choices=sorted(images.BUDGETS), default=images.SHORTEST,
        help="CPU seconds of the run of --method (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--tables", action="store_true", help="make no runs; draw the tables of those that exist"
    )
    parser.add_argument(
        "--docs", type=Path, nargs="+", default=[], metavar="FILE",
        help="Markdown files whose marked tables are replaced by the new ones; pictures go into "
        "the folder pictures beside each",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
