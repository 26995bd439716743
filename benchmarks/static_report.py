"""Compile every kernel configuration that the launch tables choose, with no GPU, and say how it
fits: registers, spills, shared memory, resident blocks, and the width of its memory accesses.

Exit code 1 where a configuration does not compile, spills, does not fit on a multiprocessor, or
reads or writes a state in pieces of less than 16 bytes although its sizes allow 16. They do where
every run of 16 bytes starts at a multiple of 16 from an aligned base: contiguous, with P a multiple
of the elements in 16 bytes; channels_last, with C and C // 2 multiples of them.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks import _aot  # before anything of mflow_kernels

import torch  # isort: skip

from benchmarks._cases import SHORT, Case, operations
from benchmarks._nvcc import NATIVE, compile_native
from benchmarks._table import save, table
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.ops._launch import Columns

CHANNELS = (2, 12, 24, 48, 96, 192, 384, 512)
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
SCALES = (
    ScaleFunction("sigmoid"),
    ScaleFunction("sigmoid", eps=1e-3),
    ScaleFunction("exp"),
    ScaleFunction("atan"),
    ScaleFunction("tanh", order="scale-shift"),
)
TRAINING = ("forward", "forward backward")
INVERSE = ("inverse", "inverse backward")
CHAIN = ("reversible chain",)  # what a model trains with
OPERATORS = ("actnorm", "conv1x1", "affine_coupling", "coupling_conv1x1")
CHAINS_THAT_STORE = ("stored chain", "checkpointed chain")
EVERY = (*OPERATORS, *CHAIN, *CHAINS_THAT_STORE)


class Run(NamedTuple):
    """Operations of `_cases` on a case, and in which directions; what compiles alike costs once."""

    case: Case
    operations: tuple[str, ...]
    directions: tuple[str, ...] = TRAINING


def runs(size: str) -> Iterator[Run]:
    if size == "quick":
        yield Run(Case(12), (*OPERATORS, *CHAIN))
        yield Run(Case(96, channels_last=True), CHAIN, ("forward",))
    elif size == "full":
        yield from full_runs()
    else:
        yield from standard_runs()


def standard_runs() -> Iterator[Run]:
    """Every width, layout, dtype, tiling and direction, but not each with each."""
    for c in CHANNELS:
        for last in (False, True) if c in (12, 48, 96, 192) else (c in (24, 384),):
            yield Run(Case(c, channels_last=last), CHAIN)
    for c in (48, 192):
        yield Run(Case(c, channels_last=True), CHAINS_THAT_STORE)
        yield Run(Case(c, channels_last=c == 48, params_dtype=BF16), CHAIN)  # as under autocast
    yield Run(Case(12), OPERATORS)
    yield Run(Case(48, channels_last=True), OPERATORS)
    yield Run(Case(48, channels_last=True), CHAIN, INVERSE)
    for c, last in ((12, False), (192, True)):
        yield Run(Case(c, side=4, n=8, channels_last=last), CHAIN)  # tiles across samples
        yield Run(Case(c, channels_last=last, dtype=FP64, params_dtype=FP64), CHAIN)
    # Sizes that are multiples of 4 but not of 16, of which Triton would know by itself; and odd P.
    for c, side, last in ((12, 6, False), (12, 14, False), (24, 7, True), (12, 7, False)):
        yield Run(Case(c, side=side, n=8, channels_last=last), CHAIN)
    for scale in SCALES:
        yield Run(Case(24, scale=scale), ("affine_coupling",))


def full_runs() -> Iterator[Run]:
    every = (*TRAINING, *INVERSE)
    for last, c in product((False, True), CHANNELS):
        for params_dtype in (torch.float32, BF16):
            yield Run(Case(c, channels_last=last, params_dtype=params_dtype), EVERY, every)
        yield Run(Case(c, channels_last=last, dtype=FP64, params_dtype=FP64), EVERY)
        for side in (4, 6, 14, 7):
            yield Run(Case(c, side=side, n=8, channels_last=last), EVERY)
    for c, dtype in product((12, 48, 192), (BF16, FP16)):
        yield Run(Case(c, dtype=dtype, params_dtype=dtype), EVERY)
    for scale, c in product(SCALES, (24, 192)):
        yield Run(Case(c, scale=scale), EVERY, every)
    for c in (48, 192):
        yield Run(Case(c, precision="tf32"), OPERATORS, every)


@dataclass
class Configuration:
    """Launches that compile to one kernel, and what is asked of its accesses."""

    launch: _aot.Launch
    case: Case
    wide: set[str]  # arguments whose sizes allow 16-byte accesses

    @property
    def variant(self) -> str:
        """The choices that were made at compile time, besides sizes."""
        words = []
        for name, value in self.launch.kwargs.items():
            if value is True:
                words.append(name.lower())
            elif isinstance(value, ScaleFunction):
                eps = f"+{value.eps:g}" if value.eps else ""
                words.append(f"{value.kind}{eps}{'' if value.order == 'shift-scale' else ' s-s'}")
            elif isinstance(value, Columns):
                words += [f"p{value.block}", *(["flat"] if value.flat else [])]
            elif name.startswith("BLOCK") and isinstance(value, int):
                words.append(f"{name[6:].lower()}{value}")
        absent = [
            name
            for name, value in self.launch.bound.items()
            if value is None and name.islower() and not name.endswith("_strides")
        ]
        return " ".join([*words, *(f"-{name}" for name in absent)])

    @property
    def dtypes(self) -> str:
        return "+".join(
            dict.fromkeys(SHORT[t.dtype] for t in _aot.pixel_tensors(self.launch).values())
        )


def wide(launch: _aot.Launch, case: Case) -> set[str]:
    """The tensors with pixels whose sizes allow 16-byte accesses."""
    allowed = set()
    for name, t in _aot.pixel_tensors(launch).items():
        lanes = 16 // t.element_size()
        # What must be whole multiples: runs of neighbours in memory, and the steps between runs.
        if case.channels_last:
            steps = (case.c, case.c // 2, t.shape[1], t.stride(0), t.stride(3))
        else:
            steps = (case.p, t.stride(0), t.stride(1))
        if all(step % lanes == 0 for step in steps) and t.data_ptr() % 16 == 0:
            allowed.add(name)
    return allowed


def configurations(size: str) -> list[Configuration]:
    found: dict[str, Configuration] = {}
    for case, names, directions in runs(size):
        for operation in operations(case):
            if operation.name not in names or operation.direction not in directions:
                continue
            for launch in _aot.capture(lambda op=operation: op.prepare()()):
                allowed = wide(launch, case)
                found.setdefault(launch.key, Configuration(launch, case, allowed)).wide |= allowed
    return list(found.values())


@dataclass
class Row:
    kernel: str
    variant: str
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
    share16: float | None  # of the accesses to tensors with pixels
    faults: list[str]

    HEAD = (
        "kernel", "variant", "C", "P", "layout", "dtypes", "target", "registers", "spilled B",
        "shared B", "warps", "blocks", "16 B", "",
    )  # fmt: skip

    @property
    def cells(self) -> tuple[object, ...]:
        *told, share, faults = asdict(self).values()
        return (*told, "-" if share is None else f"{share:.0%}", "; ".join(faults))


_work: list[Configuration] = []  # inherited by the forked workers: launches cannot be pickled


def _compile(job: tuple[int, str]) -> Row:
    index, target = job
    configuration = _work[index]
    launch, case = configuration.launch, configuration.case
    made = _aot.compile_for(launch, target)
    pixels = {n: made.access.get(n, []) for n in _aot.pixel_tensors(launch)}
    widths = [width for access in pixels.values() for width in access]
    blocks = (
        0 if made.error else _aot.ARCHS[target].resident(made.registers, made.shared, made.warps)
    )
    faults = [made.error] if made.error else []
    if made.spilled:
        faults.append("spills")
    if not made.error and not blocks:
        faults.append("does not fit")
    for name in sorted(configuration.wide):
        if pixels[name] and min(pixels[name]) < 16:
            faults.append(f"{name} by {min(pixels[name])} B")
    return Row(
        launch.kernel.__name__.strip("_"), configuration.variant, case.c, case.p, case.layout,
        configuration.dtypes, target, made.registers, made.spilled, made.shared, made.warps, blocks,
        sum(w >= 16 for w in widths) / len(widths) if widths else None, faults,
    )  # fmt: skip


def _compile_native(job: tuple[str, str]) -> list[Row]:
    source, target = job
    rows = []
    for name, made in compile_native(source, target):
        blocks = _aot.ARCHS[target].resident(made.registers, made.shared, made.warps)
        faults = ["spills"] if made.spilled else []
        faults += [] if blocks else ["does not fit"]
        row = Row(
            name, "csrc", "-", "-", "any", "", target, made.registers, made.spilled, made.shared,
            made.warps, blocks, None, faults,
        )  # fmt: skip
        rows.append(row)
    return rows


def report(size: str, targets: Sequence[str]) -> list[Row]:
    torch.set_num_threads(1)  # no thread pool may exist when workers are forked
    _work[:] = configurations(size)
    # The slowest first, so that the last worker does not finish alone.
    order = sorted(range(len(_work)), key=lambda i: -_work[i].case.c)
    jobs = [(i, target) for i in order for target in targets]
    native = [(source, target) for source in NATIVE for target in targets]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        built = pool.map_async(_compile_native, native if shutil.which("nvcc") else [], 1)
        rows = pool.map(_compile, jobs, 1) + [row for part in built.get() for row in part]
    rows.sort(key=lambda r: (r.kernel, r.variant, str(r.c).zfill(4), str(r.p), r.layout, r.dtypes,
                             int(r.target[3:])))  # fmt: skip
    return rows


def limits(targets: Sequence[str]) -> str:
    head = ("target", "registers", "threads", "blocks", "shared B", "shared B of a block")
    values = [(t, _aot.ARCHS[t]) for t in targets]
    return table(
        head,
        [(t, a.registers, a.threads, a.blocks, a.shared, a.shared_of_block) for t, a in values],
    )


def worst(rows: Sequence[Row]) -> list[str]:
    """The failed rows, then the extremes of the others."""
    failed = [row for row in rows if row.faults]
    by_registers = max(rows, key=lambda r: r.registers)
    by_blocks = min(rows, key=lambda r: r.blocks * r.warps)
    lines = [table(Row.HEAD, [row.cells for row in [*failed, by_registers, by_blocks]])]
    lines.append(f"worst: {len(failed)} of {len(rows)} configurations fail; at most "
                 f"{by_registers.registers} registers; at least {by_blocks.blocks} blocks of "
                 f"{by_blocks.warps} warps at once")  # fmt: skip
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target", action="append", choices=list(_aot.ARCHS), help="may be repeated; default: all"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_const", const="quick", dest="size", help="two widths, seconds"
    )
    size.add_argument(
        "--full", action="store_const", const="full", dest="size",
        help="the whole product of widths, layouts, dtypes and directions, many minutes",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows as JSON")
    options = parser.parse_args(arguments)
    targets = options.target or list(_aot.ARCHS)
    rows = report(options.size or "standard", targets)
    print("One multiprocessor\n" + limits(targets) + "\n")
    print(table(Row.HEAD, [row.cells for row in rows]) + "\n")
    if not shutil.which("nvcc"):
        print("csrc: not compiled, nvcc was not found on PATH\n")
    print("\n".join(worst(rows)))
    if options.json:
        save(options.json, [asdict(row) for row in rows])
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
