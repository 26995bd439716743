"""Compile every launch that the presets' models make, with no GPU, and list its registers, spills,
shared memory, resident blocks, and the width of its memory accesses.

The launches are recorded from the models themselves (`recorded`): training steps, evaluation and
sampling at every level, for each kind of chain and dtype of networks; and a few more models that
users may choose. The presets' coupling networks are recorded apart from their models. Launches that
Triton compiles to one kernel are compiled once.

The exit code is 1 if a launch does not compile, spills, does not fit on a multiprocessor, or
accesses a state in smaller pieces than its layout allows. A layout allows the largest power of two
up to 16 bytes that divides its address and the bytes between the starts of its contiguous runs: P
elements (contiguous), or C and C // 2 elements (channels_last). Halves of 12 float32 channels start
every 24 bytes and allow 8. A 16-bit gradient that a kernel adds to a float32 one is read in pieces
of half the bytes, because a thread has as many elements of both. A tile of 16 channels and 32
columns leaves each of 128 threads 4 elements, which are 8 bytes in 16 bits.

A second run finds the compiled kernels in Triton's cache.
"""

import multiprocessing
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.output import command_parser, save_json, text_table
from benchmarks.reports import aot, recorded
from benchmarks.reports.cases import Case, operations
from benchmarks.reports.configuration import Configuration, states, widths
from benchmarks.reports.nvcc import NATIVE, compile_native
from benchmarks.reports.recorded import Recorded
from mflow_kernels.layers.networks import coupling_net, fused_params
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.runs.presets import PRESETS

CHANNELS = (2, 12, 24, 48, 96, 192, 384, 512)
NETWORK_CHANNELS = (6, 12, 21, 24, 48, 56)
NETWORK_WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
SCALES = (
    *map(ScaleFunction, recorded.OTHER_SCALES),
    ScaleFunction("sigmoid", eps=1e-3),
    ScaleFunction("tanh", order="scale-shift"),
)


def launches_of(size: str) -> Iterator[Recorded]:
    """Launches of models; for "full", also of single operators and of chains on more states."""
    models = recorded.quick_models() if size == "quick" else recorded.models()
    for model in models:
        yield from recorded.record(model)
    if size == "full":
        for case in full_cases():
            with torch.device("meta"):
                on_meta = list(operations(case))
            for operation in on_meta:
                name = f"{operation.name}, {operation.direction}"
                for launch in aot.capture(lambda op=operation: op.prepare()()):
                    yield Recorded(name, launch)


def network_launches(size: str, target: str) -> Iterator[Recorded]:
    """Launches of coupling networks, which have tiles of an architecture. AMD's have none."""
    if aot.is_amd(target):
        return
    networks = [(12, 128, BF16, (16, 16)), (12, 128, BF16, (20, 20))]
    if size != "quick":
        networks += preset_networks()
    if size == "full":
        networks += network_shapes()
    for network in networks:
        aot.choose_tiles_of(target)
        for launch in aot.capture(lambda network=network: run_network(*network)):
            yield Recorded(f"network of width {network[1]}", launch)


# Channels of the state, hidden channels, dtype, and sides of the images (none for vectors).
Network = tuple[int, int, torch.dtype, tuple[int, ...]]


def preset_networks() -> list[Network]:
    """The presets' networks that the kernels compute, in bfloat16 and in TF32."""
    found = set()
    for name, precision in product(PRESETS, ("bfloat16", "float32")):
        for n in chain.from_iterable(recorded.networks_of(name, precision=precision)):
            # The number of rows of the images changes no kernel.
            found.add((n.channels, n.width, n.dtype, (2, n.side) if n.side else ()))
    return sorted(found, key=str)


def network_shapes() -> Iterator[Network]:
    """One network for each choice of tiles, on images whose rows fill tiles and on others. A
    network with other channels uses the tiles of one of these."""
    for c, width, dtype in product(NETWORK_CHANNELS, NETWORK_WIDTHS, (BF16, FP16)):
        for side in (16, 20):
            yield c, width, dtype, (side, side)


def run_network(c: int, width: int, dtype: torch.dtype, sides: tuple[int, ...]) -> None:
    """Make every launch of a coupling network: forward with and without stored hidden tensors, and
    backward."""
    with torch.device("meta"):
        network = coupling_net(c // 2, 2 * (c - c // 2), width, len(sides))
        x = torch.empty(2, c // 2, *sides, dtype=dtype)
    if sides:
        network, x = (t.to(memory_format=torch.channels_last) for t in (network, x))
    x.requires_grad_()
    with torch.no_grad():
        fused_params(list(network), x)
    params = fused_params(list(network), x)
    if params is None:
        raise AssertionError(f"no kernels compute a network of {c} channels and width {width}")
    params.backward(torch.zeros_like(params))


def full_cases() -> Iterator[Case]:
    for last, c in product((False, True), CHANNELS):
        for params_dtype in (torch.float32, BF16):
            yield Case(c, channels_last=last, params_dtype=params_dtype)
        yield Case(c, channels_last=last, dtype=FP64, params_dtype=FP64)
        for side in (4, 6, 14, 7):
            yield Case(c, side=side, n=8, channels_last=last)
    for c, dtype in product((12, 48, 192), (BF16, FP16)):
        yield Case(c, dtype=dtype, params_dtype=dtype)
    for scale, c in product(SCALES, (24, 192)):
        yield Case(c, scale=scale)
    for c in (48, 192):
        yield Case(c, precision="tf32")


def configurations(size: str, targets: Sequence[str]) -> list[Configuration]:
    """One configuration for all launches that Triton compiles to one kernel. For each architecture,
    the quick set has one for each kernel: that with the most tensors."""
    found: dict[str, Configuration] = {}

    def add(made: Recorded, targets: Sequence[str]) -> None:
        model, launch = made
        allowed = widths(launch)
        same = found.setdefault(launch.key, Configuration(launch, model, allowed, set()))
        same.widths = {name: max(width, same.widths[name]) for name, width in allowed.items()}
        same.targets.update(targets)

    # Some operators have tiles of their own on GeForce cards and on sm_120, AMD's cards have other
    # instructions, and for networks most architectures have tiles of their own.
    kinds = {"sm_86": "geforce", "sm_89": "geforce", "sm_120": "sm_120"}
    groups: dict[str, list[str]] = {}
    for target in targets:
        kind = "amd" if aot.is_amd(target) else kinds.get(target, "nvidia")
        groups.setdefault(kind, []).append(target)
    for chosen in groups.values():
        aot.choose_tiles_of(chosen[0])
        for made in [*launches_of(size)]:  # `add` may change the architecture
            add(made, chosen)
    for target in targets:
        for made in network_launches(size, target):
            add(made, [target])
    if size == "quick":
        fullest = sorted(found.values(), key=lambda made: -len(made.absent))
        chosen = {(made.launch.kernel.__name__, t): made for made in fullest for t in made.targets}
        for one in fullest:
            one.targets = {t for (_, t), other in chosen.items() if other is one}
    return [one for one in found.values() if one.targets]


@dataclass
class Row:
    kernel: str
    variant: str
    model: str
    c: int | str
    p: int | str
    layout: str
    dtypes: str
    target: str
    registers: int
    spilled: int
    shared: int
    warps: int
    blocks: int
    share16: float | None  # share of the accesses to states that move 16 bytes
    faults: list[str]

    HEAD = ("kernel", "variant", "model", "C", "P", "layout", "dtypes", "target", "registers",
            "spilled B", "shared B", "warps", "blocks", "16 B", "")  # fmt: skip

    @property
    def cells(self) -> tuple[object, ...]:
        *cells, share, faults = asdict(self).values()
        return (*cells, "-" if share is None else f"{share:.0%}", "; ".join(faults))


_work: list[Configuration] = []  # inherited by the forked workers: launches cannot be pickled


def _row(
    named: tuple[Any, ...], target: str, made: aot.Compiled, share16: float | None = None
) -> Row:
    """`named` are the fields of a row up to `dtypes`."""
    usage = made.registers, made.spilled, made.shared, made.warps
    if made.error:
        return Row(*named, target, *usage, 0, share16, [f"not compiled: {made.error}"])
    blocks = aot.ARCHS[target].resident(made.registers, made.shared, made.warps)
    faults = ["spills"] if made.spilled else []
    faults += [] if blocks else ["does not fit"]
    return Row(*named, target, *usage, blocks, share16, faults)


def _compile(job: tuple[int, str]) -> Row:
    index, target = job
    one = _work[index]
    made = aot.compile_for(one.launch, target)
    accesses = {name: made.access.get(name, []) for name in states(one.launch)}
    widths = [width for access in accesses.values() for width in access]
    kernel = one.launch.kernel.__name__.strip("_")
    named = kernel, one.variant, one.model, one.c, one.p, one.layout, one.dtypes
    row = _row(named, target, made, sum(w >= 16 for w in widths) / len(widths) if widths else None)
    for name, allowed in sorted(one.widths.items()):
        if accesses[name] and min(accesses[name]) < allowed:
            row.faults.append(f"{name} by {min(accesses[name])} B, not {allowed}")
    return row


def _compile_native(job: tuple[str, str]) -> list[Row]:
    source, target = job
    return [
        _row((name, "csrc", "-", "-", "-", "any", ""), target, made)
        for name, made in compile_native(source, target)
    ]


def report(size: str, targets: Sequence[str], processes: int | None = None) -> list[Row]:
    torch.set_num_threads(1)  # no thread pool may exist when workers are forked
    _work[:] = configurations(size, targets)
    # The slowest first, so that the last worker does not finish alone.
    order = sorted(range(len(_work)), key=lambda i: -_work[i].c)
    jobs = [(i, target) for i in order for target in targets if target in _work[i].targets]
    nvidia = [target for target in targets if not aot.is_amd(target)]
    native = [(source, target) for source in NATIVE for target in nvidia]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        built = pool.map_async(_compile_native, native if shutil.which("nvcc") else [], 1)
        rows = pool.map(_compile, jobs, 1) + [row for part in built.get() for row in part]
    rows.sort(key=lambda r: (r.kernel, r.variant, str(r.c).zfill(4), str(r.p), r.layout, r.dtypes,
                             r.target.zfill(6)))  # fmt: skip
    return rows


def limits(targets: Sequence[str]) -> str:
    head = ("target", "registers", "threads", "blocks", "shared B", "shared B of a block")
    archs = [(t, aot.ARCHS[t]) for t in targets]
    rows = [(t, a.registers, a.threads, a.blocks, a.shared, a.shared_of_block) for t, a in archs]
    return text_table(head, rows)


def worst(rows: Sequence[Row]) -> list[str]:
    """The failed rows, then the extremes of the others."""
    failed = [row for row in rows if row.faults]
    by_registers = max(rows, key=lambda r: r.registers)
    by_blocks = min(rows, key=lambda r: r.blocks * r.warps)
    lines = [text_table(Row.HEAD, [row.cells for row in [*failed, by_registers, by_blocks]])]
    lines.append(
        f"worst: {len(failed)} of {len(rows)} configurations fail; at most "
        f"{by_registers.registers} registers; at least {by_blocks.blocks} blocks of "
        f"{by_blocks.warps} warps at once"
    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("benchmarks.reports.static", __doc__)
    parser.add_argument("--target", action="append", choices=list(aot.ARCHS),
                        help=f"may be repeated; default: {', '.join(aot.TARGETS)}")  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "one launch of each kernel; takes seconds"),
        ("full", "also each operator alone, at every width, layout and dtype; takes many minutes"),
    ):
        size.add_argument(f"--{name}", action="store_const", const=name, dest="size", help=text)
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one per core")
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows as JSON")
    options = parser.parse_args(arguments)
    targets = options.target or list(aot.TARGETS)
    rows = report(options.size or "standard", targets, options.jobs)
    print("One multiprocessor\n" + limits(targets) + "\n")
    print(text_table(Row.HEAD, [row.cells for row in rows]) + "\n")
    if not shutil.which("nvcc"):
        print("csrc: not compiled, nvcc was not found on PATH\n")
    print("\n".join(worst(rows)))
    if options.json:
        save_json(options.json, [asdict(row) for row in rows])
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
