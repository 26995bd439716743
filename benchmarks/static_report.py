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

from benchmarks import _aot  # before anything of mflow_kernels

import torch  # isort: skip

from benchmarks._cases import SHORT, Case, operations
from benchmarks._nvcc import NATIVE, compile_native
from benchmarks._table import save, table
from mflow_kernels.ops import ScaleFunction

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
ALL = (*TRAINING, "inverse", "inverse backward")


def cases(size: str) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """What is run, and in which directions; duplicates cost nothing."""
    if size == "quick":
        yield Case(12), TRAINING
        yield Case(96, channels_last=True), ("forward",)
        return
    full = size == "full"
    for last in (False, True):
        for c in CHANNELS:
            yield Case(c, channels_last=last), ALL if full or c in (48, 192) else TRAINING
        for c in CHANNELS if full else (48, 192):  # the networks' output under autocast
            yield Case(c, channels_last=last, params_dtype=BF16), ALL if full else TRAINING
        for c in CHANNELS if full else (12, 192):  # tiles across samples
            yield Case(c, side=4, n=8, channels_last=last), TRAINING
        for c in (2, 12, 48, 96, 192, 512) if full else (12, 192):
            yield Case(c, channels_last=last, dtype=FP64, params_dtype=FP64), TRAINING
    for c, side in product((12, 48) if full else (12,), (6, 10, 5)):  # P not a multiple of 16
        yield Case(c, side=side, n=8), TRAINING
    for scale in SCALES:
        yield Case(24, scale=scale), ALL if full else ("forward", "forward backward")
    if full:
        for c, dtype in product((12, 48, 192), (BF16, FP16)):
            yield Case(c, dtype=dtype, params_dtype=dtype), TRAINING
        for c in (48, 192):
            yield Case(c, precision="tf32"), ALL
            yield Case(c, params_dtype=FP16, channels_last=True), TRAINING


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
            elif name.startswith("BLOCK") and isinstance(value, int):
                words.append(f"{name[6:].lower()}{value}")
        absent = [n for n, v in self.launch.bound.items() if v is None and n.islower()]
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
        runs = (case.c, case.c // 2, t.shape[1]) if case.channels_last else (case.p,)
        whole = all(run % lanes == 0 for run in runs)
        if whole and t.data_ptr() % 16 == 0 and all(s == 1 or s % lanes == 0 for s in t.stride()):
            allowed.add(name)
    return allowed


def configurations(size: str) -> list[Configuration]:
    found: dict[str, Configuration] = {}
    for case, directions in cases(size):
        for operation in operations(case):
            if operation.direction not in directions:
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
