"""Run each compiled launch without a GPU and count its requests to global memory; count launches.

These ratios describe the tensors with pixels (states, params, network inputs, gradients):

    ratio     bytes that threads request, divided by the fewest possible: each element that the
              operation needs is read once, each result is written once. The operation needs the
              elements that it touches, except those in `NEEDLESS`.
    sectors   32-byte sectors that each warp's request touches, divided by the sectors that hold the
              touched elements. Memory moves whole sectors; a ratio above 1 means that some are
              moved again, at best from a cache.

These describe the whole launch:

    products  multiplications of the tensor cores, divided by those of the formulas. In tf32x3 each
              multiplication takes three.
    banks     wavefronts of accesses to shared memory, divided by the fewest possible.

Weights, ledgers and partial sums are listed as "other"; "other sectors" is their sectors' bytes,
divided by the bytes that are requested.

The exit code is 1 if one of these fails:

    the ratio of bytes is at most 1.05 up to C = 128 at sizes that fill tiles, and at most 1.25 at
    any size of at least 1,024 pixels;
    the ratio of sectors is at most 1.15, and that of products at most 1.8, up to C = 128 at sizes
    that fill tiles;
    above C = 128 an element is read at most ceil(C / 128) times and written once (twice as often
    for the kernels in `TWICE`);
    a kernel stays within its tensors and does not race;
    a chain of K steps needs at most K + 1 launches over states forward and inverse, and 2 K + 1
    backward.
"""

import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.harness.output import command_parser, save_json, text_table
from benchmarks.reports import traffic_counts
from benchmarks.reports.cases import (
    CHAINS,
    CHANNEL_PRODUCTS,
    Case,
    Operation,
    backward_of,
    chain,
    operations,
)
from mflow_kernels.ops.rebuild_conv1x1 import MOST_SLICED
from mflow_kernels.training.account import Account, counting

CHANNELS = (12, 24, 48, 96, 192, 384)
# Arguments that are whole states although the kernel needs only the second half of the channels: a
# coupling passes the first half through, and no gradient depends on its values.
NEEDLESS = {("_coupling_bwd_kernel", "x"), ("_coupling_conv1x1_bwd_kernel", "x")}


def cases(quick: bool) -> Iterator[tuple[Case, bool]]:
    """Yield states, and whether their pixels fill tiles."""
    if quick:
        for c in (12, 24, 48, 96, 136):
            yield Case(c, n=1, side=8, channels_last=True), True
        return
    for c in CHANNELS:
        # Fewer pixels suffice above C = 128, where the bound is on reads.
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
    products: float  # 0 for a launch without products
    banks: float
    other: int  # bytes requested from tensors without pixels
    other_sectors: float
    reads: int  # the largest mean number of reads of one tensor's elements, rounded up
    fault: str

    HEAD = (
        *("operation", "direction", "kernel", "C", "N", "P", "layout", "launches"),
        *("loaded B", "stored B", "fewest B", "ratio", "sectors", "products", "banks"),
        *("other B", "other sectors", "reads", ""),
    )

    @property
    def cells(self) -> tuple[object, ...]:
        return tuple(f"{v:.3f}" if isinstance(v, float) else v for v in asdict(self).values())


def sector_ratio(memories: Sequence[traffic_counts.Memory]) -> float:
    """Return the sectors that requests touch, divided by those that hold the touched elements."""
    once = sum(memory.sectors_once for memory in memories)
    return sum(memory.sectors for memory in memories) / once if once else 1.0


def sector_bytes_ratio(memories: Sequence[traffic_counts.Memory]) -> float:
    """Return the bytes of the sectors that requests touch, divided by the requested bytes."""
    moved = sum(memory.moved for memory in memories)
    return 32 * sum(memory.sectors for memory in memories) / moved if moved else 1.0


def product_ratio(case: Case, launch: traffic_counts.Launch) -> float:
    """Return the multiplications of the tensor cores, divided by those of the formulas."""
    products = CHANNEL_PRODUCTS.get(launch.kernel, 0)
    if launch.kernel.startswith("_rebuild_conv1x1"):
        names = {name for memory in launch.memories for name in memory.names}
        products -= names.isdisjoint({"x", "x_a"})  # a stored x is not rebuilt
    times = 3 if case.precision == "tf32x3" else 1
    needed = times * products * case.c**2 * case.n * case.p
    return launch.multiplications / needed if needed else 0.0


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
    sectors, products = sector_ratio(over), product_ratio(case, launch)
    if not fault and fills and case.c <= 128:
        if sectors > MOST_SECTORS and not twice:
            fault = f"over {MOST_SECTORS} of the sectors"
        elif products > MOST_PRODUCTS:
            fault = f"over {MOST_PRODUCTS} of the products"
    return Row(
        operation, direction, launch.kernel.strip("_"), case.c, case.n, case.p, case.layout, 1,
        loaded, stored, fewest, ratio, sectors, products, launch.banks,
        sum(m.moved for m in other), sector_bytes_ratio(other), math.ceil(reads), fault,
    )  # fmt: skip


# Tiles are powers of two, so 12 channels take 16 places and 16^2 / 12^2 = 1.78 of the products.
MOST_PRODUCTS = 1.8
# The gradient of a coupling reads 24 of every 48 bytes of x in two accesses: a ratio of 1.13.
MOST_SECTORS = 1.15

# Above this C the kernel reads its states once for each of two products, because three products of
# a tile do not fit the registers. Such wide states have few pixels, so reading twice costs a step
# less than a third launch would.
TWICE = {"_rebuild_conv1x1_wide_kernel": MOST_SLICED}


QUICK = {"coupling_conv1x1": "forward", "reversible chain": "forward backward"}


def wanted(operation: Operation, case: Case, fills: bool, quick: bool) -> bool:
    """Return whether to run an operation on a case.

    Chains repeat the operators, with a network input added, so one layout is enough for them, and
    one width for the chains that store states. Above C = 64, where an operation takes longest, the
    quick set has one direction.
    """
    name = operation.name
    if quick:
        return name in QUICK and (case.c <= 64 or operation.direction == QUICK[name])
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
        if wanted(operation, case, fills, quick)
    ]
    jobs.sort(key=lambda job: -job[0].c)  # the slowest first
    rows: dict[tuple[object, ...], Row] = {}
    # To import torch in other processes takes as long as the quick set does.
    for part in map(measure, jobs) if quick else _in_processes(jobs):
        for made in part:
            same = rows.setdefault(made.cells, made)
            if same is not made:
                same.launches += 1
    return sorted(
        rows.values(), key=lambda r: (r.operation, r.direction, r.c, r.layout, r.n, r.kernel)
    )


def _in_processes(jobs: Sequence[tuple[Case, bool, int]]) -> Iterator[list[Row]]:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap_unordered(measure, jobs)


class _Chain(Account):
    """Counts the launches of a chain: over states, others, and those of torch's operators."""

    def __init__(self) -> None:
        super().__init__(gpu=True)
        self.over = self.others = 0

    def launched(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        over = any(isinstance(t, Tensor) and t.dim() == 4 for t in tree_leaves(args))
        self.over += over
        self.others += not over

    @property
    def operators(self) -> int:
        return len(self.kernels) - self.over - self.others


@dataclass
class Launches:
    """Launches of a chain of constant networks, in one direction."""

    chain: str
    direction: str
    steps: int
    states: int  # the package's launches over tensors with pixels
    others: int  # its other launches: the sum of the logdets
    bound: int
    # Torch operators per step of flow, each a launch on a GPU; from chains of K and 2 K steps. The
    # first training step, which also compares both runs of each network, makes more.
    torch: float
    fault: str

    HEAD = ("chain", "direction", "K", "over states", "others", "at most", "torch a step", "")

    @property
    def cells(self) -> tuple[object, ...]:
        return tuple(f"{v:.1f}" if isinstance(v, float) else v for v in asdict(self).values())


def launches(steps: int = 4) -> list[Launches]:
    """Count the launches of each kind of chain. No kernel runs."""
    made = []
    directions = ("forward", "inverse", "forward backward", "inverse backward")
    for (name, options), direction in product(CHAINS.items(), directions):
        (over, others, operators), (*_, operators_of_twice) = (
            _count_chain(k, direction, options) for k in (steps, 2 * steps)
        )
        bound = 2 * steps + 1 if direction.endswith("backward") else steps + 1
        a_step = (operators_of_twice - operators) / steps
        fault = "" if over <= bound else "too many"
        made.append(Launches(name, direction, steps, over, others, bound, a_step, fault))
    return made


def _count_chain(steps: int, direction: str, options: Mapping[str, object]) -> tuple[int, int, int]:
    """Return a chain's launches over states, its other launches, and its torch operators."""
    with torch.device("meta"):
        case = Case(12, n=1, side=4, channels_last=True)
        flow, x = chain(case, steps, **options), case.tensor(case.c, case.dtype)
    run = partial(flow if direction.startswith("forward") else flow.inverse, x)
    with counting(_Chain()):
        if direction.endswith("backward"):
            function = backward_of(run, [x, *(p for p in flow.parameters() if p.requires_grad)])
        else:
            function = torch.no_grad()(run)
    with counting(found := _Chain()):
        function()
    return found.over, found.others, found.operators


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.reports.traffic", __doc__)
    parser.add_argument("--quick", action="store_true", help="five widths only, in seconds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, counts = traffic(options.quick), launches()
    print("Bytes and sectors that each compiled launch (sm_90) asks for")
    print(text_table(Row.HEAD, [r.cells for r in rows]) + "\n")
    print("Launches beside the networks, K steps")
    print(text_table(Launches.HEAD, [r.cells for r in counts]) + "\n")
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
    print(
        f"worst: {bytes_.ratio:.3f} of the fewest bytes up to C = 128 ({bytes_.kernel}, C = "
        f"{bytes_.c}), {reads.reads} reads ({reads.kernel}, C = {reads.c}), sectors "
        f"{sectors.sectors:.2f} of the needed ({sectors.kernel}, C = {sectors.c}, "
        f"{sectors.layout}); {len(failed)} of {len(rows)} launches and {len(wrong)} of "
        f"{len(counts)} counts fail"
    )
    if options.json:
        save_json(
            options.json,
            {"bytes": [asdict(r) for r in rows], "launches": [asdict(r) for r in counts]},
        )
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
