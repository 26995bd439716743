"""How well manifold flows find manifolds and densities that are known.

Three parts: points on curves and surfaces, images of a known number of factors, MNIST digits. Each
writes its figures (JSON), tables (Markdown) and pictures (PNG) into the output folder. All of it is
meant to take 15 minutes on two quiet cores; one process runs on each.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.manifold_recovery import digits, factors, points
from benchmarks.manifold_recovery.report import save_text

PARTS = {"points": points, "factors": factors, "digits": digits}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    for name in options.only or PARTS:
        part = PARTS[name]
        started = time.perf_counter()
        rows = _run(name, part.tasks(seeds, options.quick), options.jobs)
        minutes = (time.perf_counter() - started) / 60
        details = _details(options, rows, minutes)
        save_text(
            options.out / f"{name}.json",
            json.dumps({"run": details, "rows": [_without_pictures(r) for r in rows]}, indent=1),
        )
        table = part.report(rows, options.out)
        about = ", ".join(f"{key} {value}" for key, value in details.items())
        save_text(options.out / f"{name}.md", f"{table}\n{about}\n")
        print(f"\n{table}\n{about}\n")
    print(f"figures, tables and pictures are in {options.out}")


def _run(name: str, tasks: Sequence[Any], jobs: int) -> list[dict[str, Any]]:
    """One row for each task, in the order of the tasks."""
    run = PARTS[name].run
    rows: list[dict[str, Any]] = [{} for _ in tasks]
    # spawn: threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=len(tasks))
        with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
            futures = {pool.submit(run, task): i for i, task in enumerate(tasks)}
            for future in as_completed(futures):
                rows[futures[future]] = future.result()
                progress.advance(bar)
    return rows


def _details(options: argparse.Namespace, rows: list[Any], minutes: float) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "date": datetime.date.today().isoformat(),
        "seeds": sorted({row["seed"] for row in rows}),
        "minutes": round(minutes, 1),
        "processes": options.jobs,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "commit": commit or "not in a git checkout",
    } | ({"quick": True} if options.quick else {})


def _without_pictures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "picture"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.manifold_recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: does it run?")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/manifold_recovery"), metavar="DIR",
        help="folder for figures, tables and pictures (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--only", choices=list(PARTS), action="append", help="may be repeated")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="default: 0 1 2; factors use the first"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N",
        help="processes at a time (default: one a core)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
