"""Runs a kernel over a grid: program counters, warps and barriers.

Each thread has a program counter. Among the basic blocks that threads have reached, the first one
in the program runs next, for all threads that have reached it. The machine runs several blocks of
the grid at once, with up to `AT_ONCE` threads in all.
"""

from bisect import bisect_left

import numpy as np

from ptx import arithmetic, memory_access  # noqa: F401 - register their instructions
from ptx.global_memory import GlobalMemory
from ptx.lanes import Lanes
from ptx.numerics import UNSIGNED, Array, i4, i8, u4
from ptx.parser import SIZES, Unsupported
from ptx.shared_memory import SharedMemory
from ptx.tensor_cores import TensorCores
from ptx.translator import Translator

AT_ONCE = 16384
STEPS = 2_000_000  # basic blocks that a batch may run before the kernel counts as endless
# Number of blocks, the first and last of the grid, whose shared memory is searched for races.
CHECKED_BLOCKS = 8


class Parameters:
    """The kernel's arguments, which threads read as a memory."""

    def __init__(self, lanes: Lanes, data: bytes) -> None:
        self.lanes, self.data = lanes, data

    def load(
        self, address: Array, size: int, vector: int, mask: Array | None, at: int
    ) -> list[Array]:
        lanes, width = self.lanes.of(mask), size * vector
        out = np.zeros((vector, self.lanes.count), UNSIGNED[size])
        where = address[lanes].astype(i8)
        good = (where >= 0) & (where + width <= len(self.data)) & (where % width == 0)
        self.lanes.check(~good, "out of bounds", at, lanes, where, width, "in the parameters")
        for place in np.unique(where[good]):  # several only if threads index an array
            words = np.frombuffer(self.data, UNSIGNED[size], vector, int(place))
            out[:, lanes[where == place]] = words[:, None]
        return list(out)


class Machine:
    """One launch, with `shared` bytes of dynamic shared memory. See `TensorCores` about `late`."""

    def __init__(
        self,
        translator: Translator,
        memory: GlobalMemory,
        parameters: bytes,
        grid: tuple[int, int, int],
        shared: int = 0,
        late: bool = False,
    ) -> None:
        self.kernel, self.translator = translator.kernel, translator
        self.global_memory, self.report, self.parameters = memory, memory.report, parameters
        self.grid, self.threads, self.late = grid, self.kernel.threads, late
        self.shared_bytes = shared
        self.starts = [start for start, _ in self.kernel.blocks]
        words = [4]
        for i in self.kernel.instructions:
            if i.name in ("ld", "st") and "shared" in i.parts:
                words.append(SIZES[i.type])
            elif i.name == "wgmma" and not {"tf32", "fence"} & set(i.parts):
                words.append(2)
        self.grain = min(words)  # bytes of shared memory that the checks treat as one location

    def run(self) -> None:
        total = int(np.prod(self.grid))
        at_once = max(1, AT_ONCE // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, total, at_once):
                self._batch(first, min(at_once, total - first), total)
        self.global_memory.finish()

    def _batch(self, first: int, blocks: int, total: int) -> None:
        number = np.repeat(np.arange(first, first + blocks), self.threads).astype(u4)
        near_end = number >= total - CHECKED_BLOCKS // 2
        checked = (number < CHECKED_BLOCKS // 2) | near_end
        lanes = self.lanes = Lanes(self.report, first, blocks, self.threads, checked)
        self.global_memory.lanes = lanes
        gx, gy = u4(self.grid[0]), u4(self.grid[1])
        self.special = {
            "tid": [lanes.tid, u4(0), u4(0)],
            "ntid": [u4(self.threads), u4(1), u4(1)],
            "ctaid": [number % gx, number // gx % gy, number // gx // gy],
            "nctaid": [u4(n) for n in self.grid],
        }
        self.param_memory = Parameters(lanes, self.parameters)
        self.shared_memory = SharedMemory(lanes, self.shared_bytes, self.grain)
        self.tensor_cores = TensorCores(self.shared_memory, self.late)
        registers = [
            lanes.unknown(width, 1)[0] if width else np.zeros(lanes.count, bool)
            for width in self.translator.widths
        ]
        end = len(self.kernel.blocks)
        at, waiting = np.zeros(lanes.count, i4), np.zeros(lanes.count, bool)
        for _ in range(STEPS):
            ready = (at < end) & ~waiting
            if not ready.any():
                if not waiting.any():
                    return
                self._release(at, waiting)
                continue
            now = int(at[ready].min())
            mask = ready & (at == now)
            self._block(now, mask, registers)
            self._jump(now, mask, at, waiting, registers)
        raise RuntimeError(f"{self.kernel.name} did not end within {STEPS} basic blocks")

    def _block(self, now: int, mask: Array, registers: list[Array]) -> None:
        full = bool(mask.all())
        warps = int(mask.reshape(-1, 32).any(1).sum())
        run = self.translator.block(now, not full)
        run(self, registers, self.translator.constants, None if full else mask)
        for at in range(*self.kernel.blocks[now]):
            self.report.warps[at] += warps

    def _jump(
        self, now: int, mask: Array, at: Array, waiting: Array, registers: list[Array]
    ) -> None:
        """Move the threads of `mask` from the end of a basic block to their next one."""
        last = self.kernel.instructions[self.kernel.blocks[now][1] - 1]
        at[mask] = now + 1
        if last.waits:
            if last.predicate is not None or last.args != ["0"]:  # of part of the block
                raise Unsupported(last.text)
            waiting |= mask
            return
        if not last.jumps:
            return
        if last.predicate is not None:
            p = registers[self.translator.index[last.predicate]]
            mask = mask & (~p if last.negated else p)
        if last.name == "bra":
            at[mask] = bisect_left(self.starts, self.kernel.labels[str(last.args[0])])
        else:
            at[mask] = len(self.kernel.blocks)

    def _release(self, at: Array, waiting: Array) -> None:
        """Let the waiting threads pass their barriers. Called when no thread can run."""
        here = waiting.reshape(-1, self.threads)
        places = np.where(here, at.reshape(-1, self.threads), -1)
        if ((places != places.max(1, keepdims=True)) & here).any():
            self.report.fault("barrier", None, 1, "threads of a block wait at different barriers")
        self.lanes.block_barrier(here.any(1))
        waiting[:] = False

    # Called by translated blocks

    def fit(self, x: Array, dtype: type) -> Array:
        """The bits of `x` for a register, one element per thread, extended by the type of `x`."""
        x = self.spread(np.asarray(x))
        if x.dtype == dtype:
            return x
        if x.dtype.itemsize == np.dtype(dtype).itemsize and dtype is not bool:
            return x.view(dtype)
        if x.dtype.kind == "f":
            raise Unsupported(f"{x.dtype} in a register of {np.dtype(dtype)}")
        return x.astype(dtype)

    def spread(self, x: Array) -> Array:
        return x if isinstance(x, np.ndarray) and x.ndim else np.full(self.lanes.count, x)

    def bits(self, x: Array) -> Array:
        return x.view(UNSIGNED[x.dtype.itemsize])

    def shuffle(
        self, mode: str, a: Array, b: Array, c: Array, mask: Array | None, at: int
    ) -> tuple[Array, Array]:
        """The value of another thread of the warp, and whether that thread exists."""
        self.lanes.whole(mask, at, "shfl.sync")
        lane = self.lanes.laneid.astype(i8)
        clamp, segment = c.astype(i8) & 31, (c.astype(i8) >> 8) & 31
        low = lane & segment
        high, b = low | (clamp & ~segment), b.astype(i8) & 31
        source = {"bfly": lane ^ b, "down": lane + b, "up": lane - b, "idx": low | (b & ~segment)}
        exists = source[mode] >= high if mode == "up" else source[mode] <= high
        return a[(self.lanes.everyone & ~31) + np.where(exists, source[mode], lane)], exists

    def sum_of_members(self, value: Array, members: Array, mask: Array | None, at: int) -> Array:
        """For each thread, the sum of the values of the threads of its warp that it names."""
        self.lanes.whole(mask, at, "redux.sync")
        named = (members[:, None] >> np.arange(32, dtype=u4)) & u4(1)
        values = np.repeat(value.reshape(-1, 32), 32, axis=0)
        return (named * values).sum(axis=1, dtype=u4)
