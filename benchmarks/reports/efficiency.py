"""How well the launches of a preset's coupling networks would use a GPU, with no GPU.

Each launch of the networks that the kernels compute is recorded in the preset's sizes and compiled.
These are its columns:

    issued     multiplications that the tensor cores are given, divided by those of the formulas:
               padded channels, products computed again, and warps that repeat others
    wgmma      share of them by Hopper's wgmma; the others take mma.sync
    programs   of the grid
    regs, spilled, shared    of a program, from the machine code; blocks: how many fit at once
    waves      of programs on the card, and for each number of multiprocessors how full they are
    MB         bytes of its tensors, each once; L2: bytes that its programs load, and its results
    us         a lower bound of its time on the card, and what sets it; then the same for the
               formulas' multiplications and each byte once, on a card that is full (roofline)

The bound of a launch is the largest of four: the products of the busiest multiprocessor at its peak
rate (mma.sync reaches 0.63 of that on Hopper, arXiv 2402.13499), the bytes of the busiest one at 64
a clock, all bytes at the bandwidth of L2, and each tensor once at that of memory. Latency and the
time between launches are left out. It is not a measured time.

The last table adds up the network launches of a reversible training step. The product that computes
d W2 of wide networks is cuBLAS's, and is left out.

With --check FILE the exit code is 1 if a launch spills, has a larger bound than FILE records, or
issues more products; --record FILE writes such a file, and keeps what it has of other launches.
Launches in Gluon have names of their own, so one file serves all versions of Triton.
"""

import json
import math
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.reports import aot  # before anything of mflow_kernels

import torch  # isort: skip

from benchmarks.harness.output import command_parser, save_json, text_table
from benchmarks.reports.programs import loaded, products
from benchmarks.reports.recorded import Network, networks_of
from mflow_kernels.ops import coupling_network_launches as launches
from mflow_kernels.ops import coupling_network_tiles
from mflow_kernels.ops.coupling_network_tiles import Shape
from mflow_kernels.ops.written import written_arguments
from mflow_kernels.runs.presets import PRESETS
from mflow_kernels.training.account import nbytes
from mflow_kernels.training.cards import CARDS

MULTIPROCESSORS = (108, 114, 128, 132)  # A100, H100 PCIe, RTX 4090, H100 SXM


class Target(NamedTuple):
    """A card that an architecture is judged on. Bandwidths are in bytes a second."""

    card: str
    multiprocessors: int
    clock: float
    l2: float
    sync: float  # share of the products' peak that mma.sync reaches


# L2: measured on an H100 by Chips and Cheese; 5,120 bytes a clock on an A100 (NVIDIA's whitepaper).
TARGETS = {
    "sm_90": Target("H100", 132, 1.83e9, 5.5e12, 0.63),
    "sm_80": Target("A100", 108, 1.41e9, 7.2e12, 1.0),
}


@dataclass
class Row:
    """One launch. Times are in microseconds."""

    network: str
    launch: str
    tile: str
    issued: float
    useful: float
    wgmma: float
    programs: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    full: tuple[float, ...]  # by MULTIPROCESSORS
    waves: float
    moved: int
    requested: int
    bound: float
    limit: str
    roofline: float
    times: int  # in a reversible training step

    HEAD = ("network", "launch", "tile", "issued", "wgmma", "programs", "regs", "spilled",
            "shared KB", "blocks", "waves", *(f"full {n}" for n in MULTIPROCESSORS), "MB", "L2 MB",
            "us", "by", "roofline us")  # fmt: skip

    @property
    def key(self) -> str:
        return f"{self.network}, {self.launch}"

    @property
    def cells(self) -> tuple[object, ...]:
        return (
            self.network, self.launch, self.tile,
            f"{self.issued / self.useful:.2f}" if self.useful else "-",
            f"{self.wgmma:.0%}" if self.useful else "-", self.programs, self.registers,
            self.spilled, f"{self.shared / 1024:.0f}", self.blocks, f"{self.waves:.2f}",
            *(f"{share:.0%}" for share in self.full), f"{self.moved / 1e6:.0f}",
            f"{self.requested / 1e6:.0f}", f"{self.bound:.1f}", self.limit, f"{self.roofline:.1f}",
        )  # fmt: skip


def launches_of(n: Network) -> Iterator[tuple[str, aot.Launch]]:
    """The launches of a network in a reversible training step, and their names."""
    c_in, c_out = n.channels // 2, 2 * (n.channels - n.channels // 2)

    def images(channels: int) -> torch.Tensor:
        shape = n.batch, channels, n.side, n.side
        return torch.empty(shape, dtype=n.dtype, memory_format=torch.channels_last)

    s = Shape.of(images(c_in), n.width, c_out)
    packed = torch.empty(s.packed, dtype=n.dtype)
    b1, b2, b3 = torch.empty(n.width), torch.empty(n.width), torch.empty(c_out)
    x, h1, h2 = images(c_in), images(n.width), images(n.width)

    def step() -> None:
        launches.launch_network(x, packed, b1, b2, b3, False)
        launches.launch_network(x, packed, b1, b2, b3, True)
        launches.launch_network_backward(images(c_out), x, h1, h2, packed, True)

    with mock.patch.object(launches, "w2_gradient"):
        for launch in aot.capture(step):
            yield launch_name(launch), launch


def launch_name(launch: aot.Launch) -> str:
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    if name.startswith("hopper_"):
        name = f"{name.removeprefix('hopper_')} in Gluon"
    if launch.bound.get("h1") is not None and name.startswith("network"):
        return f"{name}, kept"
    if name == "sum_taps":
        return "sum of x's taps" if launch.bound["bias"] is None else "sum of rows"
    return name


def multiplications(launch: aot.Launch) -> int:
    """Return the multiplications of a launch's formulas, without those that programs repeat."""
    given = launch.bound
    if "PIXELS" not in given or "WIDTH" not in given:
        return 0
    width = int(given["WIDTH"])
    first, last = (
        width * int(given.get("TAPS", 9)) * int(given.get(name, 0)) for name in ("C_IN", "C_OUT")
    )
    name = launch.kernel.__name__.replace("_hopper", "")
    if name == "_network_kernel":
        products = first + width**2 + last
    elif name == "_dh2_kernel":
        products = 2 * last
    else:
        products = 2 * first + width**2 * (1 if given["dw2"] is None else 2)
    return int(given["PIXELS"]) * products


class Work(NamedTuple):
    """A launch to compile, and its programs on cards of `MULTIPROCESSORS`."""

    network: Network
    times: int
    name: str
    launch: aot.Launch
    target: str
    programs: tuple[int, ...]


def row(work: Work) -> Row:
    n, times, name, launch, target, on_cards = work
    made = aot.compile_for(launch, target)
    if made.error:
        raise RuntimeError(f"{n.name}, {name}: not compiled for {target}: {made.error}")
    t, given = TARGETS[target], launch.bound
    card = CARDS[t.card]
    found = products(launch, made)
    issued = sum(p.multiplications for p in found)
    by_wgmma = sum(p.multiplications for p in found if p.wgmma)
    useful = multiplications(launch)
    programs = math.prod(launch.grid)
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    outputs = zip(launch.kernel.arg_names, written_arguments(launch.kernel), strict=True)
    written = sum(nbytes(tensors[k]) for k, is_output in outputs if is_output and k in tensors)
    moved = sum(map(nbytes, tensors.values()))
    requested = max(loaded(launch, made) + written, moved)
    blocks = aot.ARCHS[target].resident(made.registers, made.shared, made.warps)
    # Tiles that the busiest program has, over the mean.
    uneven = 1.0
    if "TILES" in given:
        tiles = given["TILES"] / launch.grid[0]
        uneven = math.ceil(tiles) / tiles
    busiest = math.ceil(programs / t.multiprocessors) / programs * uneven
    rate = card.throughput[n.dtype] / 2
    seconds = issued / rate if t.sync == 1 else (by_wgmma + (issued - by_wgmma) / t.sync) / rate
    bounds = {
        "products": seconds * t.multiprocessors * busiest,
        "requests": requested * busiest / (64 * t.clock),
        "L2": requested / t.l2,
        "memory": moved / card.bandwidth,
    }
    limit = max(bounds, key=lambda name: bounds[name])
    tile = "x".join(
        str(given[f"BLOCK_{b}"]) for b in "PDKJRX" if given.get(f"BLOCK_{b}") is not None
    )
    return Row(
        n.name, name, tile, issued, useful, by_wgmma / issued if issued else 0.0, programs,
        made.registers, made.spilled, made.shared, blocks,
        tuple(_full(p, m * blocks) for p, m in zip(on_cards, MULTIPROCESSORS, strict=True)),
        programs / (t.multiprocessors * max(1, blocks)), moved, requested, bounds[limit] * 1e6,
        limit, max(moved / card.bandwidth, useful / rate) * 1e6, times,
    )  # fmt: skip


def _full(programs: int, slots: int) -> float:
    """Share of the slots that have a program, over all waves."""
    return programs / (slots * -(-programs // slots)) if slots else 0.0


_work: list[Work] = []  # inherited by the forked workers


def _row(index: int) -> Row:
    return row(_work[index])


def works(n: Network, times: int, target: str) -> list[Work]:
    """The launches of a network on the card of `target`."""
    aot.choose_tiles_of(target)

    def on(count: int) -> list[tuple[str, aot.Launch]]:
        # Launchers ask the device for its number of multiprocessors.
        with mock.patch.object(coupling_network_tiles, "multiprocessors", return_value=count):
            return list(launches_of(n))

    others = zip(*([math.prod(launch.grid) for _, launch in on(m)] for m in MULTIPROCESSORS),
                 strict=True)  # fmt: skip
    found = zip(on(TARGETS[target].multiprocessors), others, strict=True)
    return [Work(n, times, name, launch, target, counts) for (name, launch), counts in found]


def report(wanted: Mapping[Network, int], target: str, processes: int | None = None) -> list[Row]:
    """One row for each launch of these networks, given with how often a step has them."""
    torch.set_num_threads(1)  # no thread pool may exist when workers are forked
    _work[:] = [work for n, times in wanted.items() for work in works(n, times, target)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_row, range(len(_work)), 1)


def totals(rows: Sequence[Row]) -> str:
    """One line for each network: a step's products and bounds, and the launch that takes most."""
    lines, whole = [], [0.0, 0.0]
    for name in dict.fromkeys(row.network for row in rows):
        own = [row for row in rows if row.network == name]
        bound, roofline = (sum(getattr(r, k) for r in own) / 1e3 for k in ("bound", "roofline"))
        issued, useful = (sum(getattr(r, k) for r in own) for k in ("issued", "useful"))
        worst, times = max(own, key=lambda r: r.bound - r.roofline), own[0].times
        lines.append(
            (name, times, f"{issued / useful:.2f}", f"{bound * times:.1f}",
             f"{roofline * times:.1f}", f"{bound / roofline:.2f}", worst.launch)
        )  # fmt: skip
        whole = [whole[0] + bound * times, whole[1] + roofline * times]
    lines.append(
        ("all", "", "", f"{whole[0]:.1f}", f"{whole[1]:.1f}", f"{whole[0] / whole[1]:.2f}", "")
    )
    head = ("network", "times", "issued", "ms", "roofline ms", "ratio", "furthest from it")
    return text_table(head, lines)


def check(rows: Sequence[Row], recorded: dict[str, Any]) -> list[str]:
    """List the figures that exceed the recorded ones by more than their rounding."""
    worse = []
    for made in rows:
        if made.spilled:
            worse.append(f"{made.key}: spills {made.spilled} bytes")
        for name, figure in recorded.get(made.key, {}).items():
            if record([made])[made.key][name] > figure * 1.001:
                worse.append(f"{made.key}: {name} exceeds {figure}")
    unknown = [made.key for made in rows if made.key not in recorded]
    return worse + [f"{key}: not recorded" for key in unknown]


def record(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    return {
        r.key: {
            "issued": round(r.issued / r.useful, 3) if r.useful else 0.0,
            "bound": round(r.bound, 2),
            "L2 bytes": r.requested,
        }
        for r in rows
    }


QUICK = {
    Network(128, side, channels, width, torch.bfloat16): 1
    for side, channels, width in ((32, 12, 128), (8, 48, 512))
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.reports.efficiency", __doc__)
    parser.add_argument("--preset", choices=PRESETS, default="celeba64")
    parser.add_argument("--width", type=int, nargs="+", help="default: the preset's")
    parser.add_argument("--target", choices=tuple(TARGETS), default="sm_90")
    parser.add_argument("--quick", action="store_true", help="two networks only, in seconds")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one per core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all rows as JSON")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail if a launch is worse")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what --check reads")
    options = parser.parse_args(arguments)
    failed = False
    for width in options.width or [None]:
        changed = {} if width is None else {"width": width}
        wanted = QUICK if options.quick else networks_of(options.preset, **changed)[0]
        rows = report(wanted, options.target, options.jobs)
        print(text_table(Row.HEAD, [made.cells for made in rows]), end="\n\n")
        print(totals(rows), end="\n\n")
        if options.json:
            save_json(options.json, [asdict(made) for made in rows])
        if options.record:
            before = json.loads(options.record.read_text()) if options.record.exists() else {}
            save_json(options.record, before | record(rows))
        worse = check(rows, json.loads(options.check.read_text())) if options.check else []
        print("\n".join(worse), end="\n" if worse else "")
        failed |= bool(worse)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
