"""Measure how well manifold flows recover known manifolds and densities.

There are three parts: points on curves and surfaces, images with a known number of factors, and
MNIST digits. Each writes figures (JSON), tables (Markdown) and pictures (PNG) into the output
folder. Everything takes about 15 minutes on two idle cores, with one process on each.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.manifold import digits, factors, points
from benchmarks.manifold.output import save_text

PARTS = {"points": points, "factors": factors, "digits": digits}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    for name in options.only or PARTS:
        _run_part(name, seeds, options)
    print(f"figures, tables and pictures are in {options.out}")


def _run_part(name: str, seeds: list[int], options: argparse.Namespace) -> None:
    part, out = PARTS[name], options.out
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    tasks = part.tasks(seeds, options.quick)
    for row in _in_processes(name, part.run, tasks, options.jobs):
        rows.append(row)
        minutes = (time.perf_counter() - started) / 60
        details = _details(rows, len(tasks), minutes, options)
        content = {"run": details, "rows": [_without_picture(row) for row in rows]}
        save_text(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in details.items())
    table = f"{part.report(rows, out)}\n{about}\n"
    save_text(out / f"{name}.md", table)
    print(f"\n{table}")


def _in_processes(
    name: str, run: Callable[[Any], dict[str, Any]], tasks: Sequence[Any], jobs: int
) -> Iterator[dict[str, Any]]:
    """Yield one row for each task, in the order of the tasks."""
    # Threads of torch do not survive a fork, so spawn.
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool,
    ):
        yield from progress.track(pool.map(run, tasks), total=len(tasks))


def _details(
    rows: list[dict[str, Any]], tasks: int, minutes: float, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "seeds": sorted({row["seed"] for row in rows}),
        "runs": f"{len(rows)} of {tasks}",
        "minutes": round(minutes, 1),
        "processes": options.jobs,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "commit": _commit(),
    } | ({"quick": True} if options.quick else {})


@cache
def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or "not in a git checkout"


def _without_picture(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "picture"}


def _positive_int(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.manifold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed and few steps, to test the code"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/manifold_recovery"), metavar="DIR",
        help="folder for figures, tables and pictures (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only", choices=list(PARTS), action="append", help="run one part; may be repeated"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="seeds (default: 0 1 2); factors use the first",
    )
    parser.add_argument(
        "--jobs", type=_positive_int, default=os.cpu_count(), metavar="N",
        help="number of processes (default: one per core)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
