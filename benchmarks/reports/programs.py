"""The products and memory accesses of one compiled launch, read from Triton's programs.

Products are read from TTGIR, which says how warps share a product: if all warps of a layout cover
more than its result, some repeat what others compute. Loads are read from TTIR, before loops are
pipelined. A loop with constant bounds repeats what it holds, and the loop over tiles of pixels
repeats it for each tile. Other loops count once.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.reports import aot

BITS = {"f64": 64, "f32": 32, "bf16": 16, "f16": 16, "i64": 64, "i32": 32, "i8": 8, "i1": 8}
LAYOUT = re.compile(
    r"(#mma\d*) = #ttg.nvidia_mma<\{versionMajor = (\d).*?warpsPerCTA = \[([\d, ]+)\], "
    r"instrShape = \[([\d, ]+)\]"
)
DOT = re.compile(
    r"= (?:ttng\.warp_group_dot|tt\.dot) .* : [^:]*?<(\d+)x(\d+)x\w+.* -> tensor<(\d+)x(\d+)x\w+, "
    r"(#mma\d*)>"
)
LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local) .* : tensor<([\dx]+)x!tt\.ptr<(\w+)>"
)
LOOP = re.compile(r"scf\.for \S+ = (\S+) to (\S+) step (\S+) ")


class Product(NamedTuple):
    """A product of (rows, inner) and (inner, columns)."""

    rows: int
    columns: int
    inner: int
    wgmma: bool
    repeated: float  # how many warps compute each number
    times: int  # how often all programs together compute it

    @property
    def multiplications(self) -> float:
        """Multiplications that the tensor cores are given."""
        return self.rows * self.columns * self.inner * self.repeated * self.times


def products(launch: aot.Launch, made: aot.Compiled) -> list[Product]:
    layouts = {
        m[1]: (int(m[2]), _numbers(m[3], ","), _numbers(m[4], ","))
        for m in LAYOUT.finditer(made.ttgir)
    }
    found = []
    for line, times in _repeated(launch, made.ttgir):
        if m := DOT.search(line):
            _, inner, rows, columns = map(int, m.groups()[:4])
            version, warps, shape = layouts[m[5]]
            cover = shape[0] * warps[0], shape[1] * warps[1]
            repeated = max(1, cover[0] / rows) * max(1, cover[1] / columns)
            found.append(Product(rows, columns, inner, version == 3, repeated, times))
    return found


def loaded(launch: aot.Launch, made: aot.Compiled) -> int:
    """Return the bytes that all programs load, masked places included."""
    return sum(
        math.prod(_numbers(m[1], "x")) * BITS[m[2]] // 8 * times
        for line, times in _repeated(launch, made.ttir)
        if (m := LOAD.search(line))
    )


def _repeated(launch: aot.Launch, program: str) -> Iterator[tuple[str, int]]:
    """Yield each line of a program, and how often all programs together run it."""
    constants = {
        m[1]: int(m[2]) for m in re.finditer(r"(%\S+) = arith\.constant (-?\d+) : i32", program)
    }
    programs = math.prod(launch.grid)
    times, stack = [programs], []
    for line in program.splitlines():
        if m := LOOP.search(line):
            if all(bound in constants for bound in m.groups()):
                start, end, step = (constants[bound] for bound in m.groups())
                times.append(times[-1] * -(-(end - start) // step))
            else:
                tiles = launch.bound.get("TILES", launch.grid[0])
                times.append(times[-1] * tiles // launch.grid[0])
            stack.append("loop")
        elif line.rstrip().endswith("{") or re.search(r"\{ *loc", line):
            stack.append("other")
        elif line.lstrip().startswith("}"):
            ended = stack.pop()
            if ended == "loop":
                times.pop()
            if line.rstrip().endswith("{"):
                stack.append(ended)
        yield line, times[-1]


def _numbers(text: str, separator: str) -> list[int]:
    return [int(n) for n in text.split(separator)]
