"""Run each launch compiled, on a machine with no GPU, and count what it asks of global memory; and
count launches beside the networks.

Two ratios, of tensors that have pixels (states, params, network inputs, gradients):

    ratio     bytes that threads ask for, to the fewest: each element that the operation needs read
              once, each that it leaves written once. What an operation needs is what it touches,
              less what `NEEDLESS` knows that it could do without.
    sectors   32 bytes times the sectors that each warp's request touches, to the bytes that it asks
              for. A GPU's memory moves whole sectors: what is past 1 comes with them unasked, and
              is served by a cache where another request of the same block asks for it soon.

Weights, ledgers and partial sums are listed apart ("other"), with a ratio of sectors of their own.

Exit code 1 where the ratio of bytes passes 1.05 up to C = 128 at sizes that fill tiles, or 1.25 at
any size of at least 1,024 pixels; where past C = 128 an element is read more than ceil(C / 128)
times or written more than once (un-mixing past C = 64: twice that, see `TWICE`); where a kernel
leaves its tensors or races; or where a chain of K steps takes more than K + 1 launches over states
forward, inverse, or two a step and one more backward. Sectors are counted and have no bound yet.
"""

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.reports import traffic_counts  # before anything of mflow_kernels

import torch  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.output import save_json, text_table
from benchmarks.reports.cases import CHAINS, Case, backward_of, chain, operations

CHANNELS = (12, 24, 48, 96, 192, 384)
# Whole-state arguments of which a kernel needs the second half of the channels alone: the coupling
# leaves the first half as it is, and no gradient depends on its values.
NEEDLESS = {("_coupling_bwd_kernel", "x"), ("_coupling_conv1x1_bwd_kernel", "x")}


def cases(quick: bool) -> Iterator[tuple[Case, bool]]:
    """States, and whether their pixels fill tiles."""
    if quick:
        yield Case(12, n=1, side=16), True
        yield Case(136, n=1, side=8, channels_last=True), True
        return
    for c in CHANNELS:
        # Past C = 128, where the rule counts reads, fewer pixels do.
        side = 32 if c <= 128 else 16
        yield Case(c, n=1, side=side), True
        yield Case(c, n=1, side=side, channels_last=True), True
    yield Case(12, n=2, side=23), False  # tiles that end inside a sample
    yield Case(48, n=2, side=23, channels_last=True), False
    yield Case(12, n=13, side=9, channels_last=True), False  # samples that end inside a tile
    yield Case(96, n=13, side=9), False
    yield Case(24, n=1100, side=1), False


@dataclass
class Row:
    operation: str
    direction: str
    kernel: str
    c: int
    n: int
    p: int
    layout: str
    launches: int
    loaded: int
    stored: int
    fewest: int
    ratio: float
    sectors: float
    other: int  # bytes in tensors without pixels
    other_sectors: float
    reads: int  # the most that one tensor's elements are read, on average, rounded up
    fault: str

    HEAD = (
        "operation", "direction", "kernel", "C", "N", "P", "layout", "launches", "loaded B",
        "stored B", "fewest B", "ratio", "sectors", "other B", "other sectors", "reads", "",
    )  # fmt: skip

    @property
    def cells(self) -> tuple[object, ...]:
        return tuple(f"{v:.3f}" if isinstance(v, float) else v for v in asdict(self).values())


def sector_ratio(memories: Sequence[traffic_counts.Memory]) -> float:
    """Bytes of the sectors that requests touch, to the bytes that they ask for."""
    moved = sum(memory.moved for memory in memories)
    return 32 * sum(memory.sectors for memory in memories) / moved if moved else 1.0


def row(
    operation: str, direction: str, case: Case, fills: bool, launch: traffic_counts.Launch
) -> Row:
    over = [memory for memory in launch.memories if memory.pixels]
    other = [memory for memory in launch.memories if not memory.pixels]
    loaded, stored = sum(m.loaded for m in over), sum(m.stored for m in over)
    fewest, reads, rewritten = 0, 0.0, False
    for memory in over:
        needed = memory.loaded_once
        if any((launch.kernel, name) in NEEDLESS for name in memory.names):
            size = case.n * case.p * memory.itemsize
            needed = min(needed, (case.c - case.c // 2) * size)
        fewest += needed + memory.stored_once
        reads = max(reads, memory.loaded / needed if needed else 0.0)
        rewritten |= memory.stored > memory.stored_once
    ratio = (loaded + stored) / fewest if fewest else 1.0
    twice = case.c > TWICE.get(launch.kernel, case.c)
    most = math.ceil(case.c / 128) * (2 if twice else 1)
    if case.c > 128 or twice:
        wrong = math.ceil(reads) > most or rewritten
        fault = f"a state is read {reads:.2f} times or rewritten, at most {most}" if wrong else ""
    else:
        bound = 1.05 if fills else 1.25 if case.n * case.p >= 1024 else math.inf
        fault = f"over {bound}" if ratio > bound else ""
    return Row(
        operation, direction, launch.kernel.strip("_"), case.c, case.n, case.p, case.layout, 1,
        loaded, stored, fewest, ratio, sector_ratio(over), sum(m.moved for m in other),
        sector_ratio(other), math.ceil(reads), fault,
    )  # fmt: skip


# Past this C the kernel reads its states once for each of two products. Three products of one tile
# do not fit the registers there, and so wide a state has few pixels: a third launch for the second
# product would cost a step more than reading twice.
TWICE = {"_rebuild_conv1x1_wide_kernel": 64}


def wanted(name: str, case: Case, fills: bool, quick: bool) -> bool:
    """Whether a case runs this operation: chains repeat what the operators do, with a network input
    beside it, so one layout of them is enough, and one width of those that store."""
    if quick:
        return name in ("coupling_conv1x1", "reversible chain")
    if "chain" not in name:
        return True
    return fills and case.channels_last and (name == "reversible chain" or case.c == 48)


def measure(job: tuple[Case, bool, int]) -> list[Row]:
    case, fills, index = job
    torch.set_num_threads(1)
    operation = list(operations(case))[index]
    return [
        row(operation.name, operation.direction, case, fills, launch)
        for launch in traffic_counts.count(operation.prepare)
        if any(memory.pixels for memory in launch.memories)
    ]


def traffic(quick: bool) -> list[Row]:
    jobs = [
        (case, fills, index)
        for case, fills in cases(quick)
        for index, operation in enumerate(operations(case))
        if wanted(operation.name, case, fills, quick)
    ]
    jobs.sort(key=lambda job: -job[0].c)  # the slowest first
    rows: dict[tuple[object, ...], Row] = {}
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for part in pool.imap_unordered(measure, jobs):
            for made in part:
                same = rows.setdefault(made.cells, made)
                if same is not made:
                    same.launches += 1
    return sorted(
        rows.values(), key=lambda r: (r.operation, r.direction, r.c, r.layout, r.n, r.kernel)
    )


class _Operators(TorchDispatchMode):
    """How many torch operators run that are launches of their own: no views, no allocations."""

    QUIET = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_to_cpu", "resize_", "set_")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.__name__
        quiet = function.is_view or function.namespace == "mflow" or name.startswith(self.QUIET)
        self.count += not quiet
        return function(*args, **(kwargs or {}))


def _watched(operators: _Operators, prepare: Callable[[], Callable[[], object]]):
    """The function that `prepare` returns, its torch operators counted."""
    function = prepare()

    def watched() -> None:
        with operators:
            function()

    return watched


@dataclass
class Launches:
    """Of a chain of constant networks, in one direction."""

    chain: str
    direction: str
    steps: int
    states: int  # launches of ours over tensors with pixels
    others: int  # launches of ours over none: the ledger's sum
    bound: int
    torch: float  # torch operators a step (from another K steps), each a launch on a GPU
    fault: str

    HEAD = ("chain", "direction", "K", "over states", "others", "at most", "torch a step", "")

    @property
    def cells(self) -> tuple[object, ...]:
        return tuple(f"{v:.1f}" if isinstance(v, float) else v for v in asdict(self).values())


def launches(steps: int = 4) -> list[Launches]:
    made = []
    case = Case(12, n=1, side=4, channels_last=True)
    for name, options in CHAINS.items():
        for direction in ("forward", "inverse", "forward backward", "inverse backward"):
            ours, torchs = [], []
            for k in (steps, 2 * steps):
                flow = chain(case, k, **options)
                x = case.tensor(case.c, case.dtype)
                run = flow if direction.startswith("forward") else flow.inverse
                if direction.endswith("backward"):
                    learned = [x, *(p for p in flow.parameters() if p.requires_grad)]
                    prepare = partial(backward_of, partial(run, x), learned)
                    bound = 2 * steps + 1
                else:
                    prepare = partial(torch.no_grad(), partial(run, x))
                    bound = steps + 1
                operators = _Operators()
                ours.append(traffic_counts.count(partial(_watched, operators, prepare)))
                torchs.append(operators.count)
            over = [launch for launch in ours[0] if any(m.pixels for m in launch.memories)]
            fault = "" if len(over) <= bound else "too many"
            made.append(
                Launches(name, direction, steps, len(over), len(ours[0]) - len(over), bound,
                         (torchs[1] - torchs[0]) / steps, fault)
            )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reports.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two widths only, in seconds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, counts = traffic(options.quick), launches()
    print(
        "Bytes and sectors that each compiled launch (sm_90) asks for\n"
        + text_table(Row.HEAD, [r.cells for r in rows])
        + "\n"
    )
    print("Launches beside the networks, K steps\n"
          + text_table(Launches.HEAD, [r.cells for r in counts]) + "\n")  # fmt: skip
    failed = [r for r in rows if r.fault]
    narrow = [r for r in rows if r.c <= TWICE.get(f"_{r.kernel}", 128)]
    extremes = [
        max(narrow or rows, key=lambda r: r.ratio),
        max(rows, key=lambda r: r.reads),
        max(rows, key=lambda r: r.sectors),
    ]
    print(text_table(Row.HEAD, [r.cells for r in failed or extremes]))
    wrong = [r for r in counts if r.fault]
    bytes_, reads, sectors = extremes
    print(f"worst: {bytes_.ratio:.3f} of the fewest bytes up to C = 128 ({bytes_.kernel}, C = "
          f"{bytes_.c}), {reads.reads} reads ({reads.kernel}, C = {reads.c}), sectors "
          f"{sectors.sectors:.2f} of the bytes asked for ({sectors.kernel}, C = {sectors.c}, "
          f"{sectors.layout}); {len(failed)} of {len(rows)} launches and {len(wrong)} of "
          f"{len(counts)} counts fail")  # fmt: skip
    if options.json:
        save_json(options.json, {"bytes": [asdict(r) for r in rows],
                            "launches": [asdict(r) for r in counts]})  # fmt: skip
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
