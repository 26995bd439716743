"""Measure every operator, forward, inverse and backward, at the state shapes of Glow's levels.

Each is compared with its reference in eager torch and with that reference under torch.compile. All
three are first checked against float64.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from statistics import median_high

import torch

from benchmarks.harness.measurements import Call, launches, peak_bytes
from benchmarks.harness.operators import Function, Operation, Shape, directions, operations
from benchmarks.harness.session import Bench, Group, Measured, Missing, measured_row
from benchmarks.harness.table import OPERATORS

test_operator = measured_row
ROUNDS = 7
VARIANTS = ("mflow_kernels", "eager", "compiled")
OPERATIONS = [(row.name, direction) for row in OPERATORS for direction in directions(row)]


def shapes(size: str, gpu: bool) -> list[Shape]:
    """Return the shapes. Without --full, torch.compile runs at the first shape only."""
    if size == "tiny":
        return [Shape(16, 1, 2, True)]
    batches = {64: 64, 256: 16, 1024: 2} if gpu else {64: 8, 256: 2, 1024: 1}
    if size == "full":
        levels = {64: 4, 256: 6, 1024: 6}
        every = [(px, level, last) for last in (True, False)
                 for px in batches for level in range(1, levels[px] + 1)]  # fmt: skip
    elif gpu:
        every = [(256, 1, True), (256, 3, True), (256, 6, True), (64, 1, True), (1024, 1, True)]
    else:
        every = [(64, 1, True), (64, 3, True), (256, 1, True), (256, 6, True)]
    return [Shape(px, level, batches[px], last) for px, level, last in every]


def groups(size: str, gpu: bool) -> Iterator[Group]:
    grid = shapes(size, gpu)
    for shape in grid:
        for name, direction in OPERATIONS:
            # Compiling takes seconds per operator, so a rehearsal compiles only one.
            one = size != "tiny" or (name, direction) == ("actnorm", "forward")
            compiles = size == "full" or (shape == grid[0] and one)

            def measured(
                bench: Bench, shape=shape, key=(name, direction), compiles=compiles
            ) -> Measured:
                return measure(bench, _table(shape, bench.device)[key], shape, compiles)

            words = (shape.id, name, direction)
            yield Group(f"{name} {direction}, {shape}", words, VARIANTS, measured)


@cache
def _table(shape: Shape, device: torch.device) -> dict[tuple[str, str], Operation]:
    _table.cache_clear()  # one shape's inputs at a time
    return {(op.name, op.direction): op for op in operations(shape, device)}


def _compiled(reference: Function, device: torch.device) -> Function:
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise Missing("torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    return torch.compile(reference, dynamic=False)


def measure(bench: Bench, op: Operation, shape: Shape, compiles: bool) -> Measured:
    measured = Measured()
    exact = op.exact()

    def make(variant: str) -> Callable[[], Call]:
        if variant == "compiled" and not compiles:
            raise Missing("torch.compile runs at the first shape only, without --full")
        function = op.function if variant == "mflow_kernels" else op.operator.expected
        function = _compiled(function, bench.device) if variant == "compiled" else function
        op.check(function, exact)
        return lambda: op.prepare(function)

    prepares = measured.compare(bench, VARIANTS, make, ROUNDS, flush=True)
    if bench.check_only:
        return measured
    for variant, prepare in prepares.items():
        rate = op.fewest / median_high(measured.seconds[variant])
        measured.extra[variant] = {
            "operator": op.name,
            "direction": op.direction,
            "shape": str(shape),
            "bytes": op.fewest,
            "bytes_per_second": rate,
            "share_of_copy_bandwidth": rate / bench.environment["copy_bytes_per_second"],
            "peak_bytes": peak_bytes(prepare(), bench.device),
            "launches": launches(prepare(), bench.device),
        }
    return measured
