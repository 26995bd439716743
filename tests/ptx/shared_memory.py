"""Shared memory of the blocks that run: accesses, asynchronous copies, races and bank conflicts.

Two threads race if they access a location without a barrier of the block in between and at least
one of them writes; `bar.warp.sync` orders the threads of one warp. An asynchronous copy writes at
any time from its issue to its wait, and a product of a tensor core (`tensor_cores`) reads likewise.
"""

from dataclasses import dataclass

import numpy as np

from ptx.global_memory import UNKNOWN, GlobalMemory
from ptx.lanes import Lanes
from ptx.numerics import UNSIGNED, Array, i4, i8, same_values, u1, u2, u4
from ptx.parser import Unsupported
from ptx.translator import SHARED_BASE

NEVER = -1


@dataclass
class Copy:
    """Asynchronous copies in flight, one per thread."""

    lanes: Array
    offsets: Array
    size: int
    data: Array
    groups: Array  # number of groups that their threads had committed before


class SharedMemory:
    def __init__(self, lanes: Lanes, nbytes: int, grain: int) -> None:
        self.lanes, self.report, self.nbytes, self.grain = lanes, lanes.report, nbytes, grain
        self.pitch = -(-nbytes // 16) * 16  # bytes between the memories of neighbouring blocks
        self.data = np.full(lanes.blocks * self.pitch, 0xFF, u1)
        grains = len(self.data) // grain
        self.written = np.zeros(grains, bool)
        # The last writer of each grain, with its counts of barriers, warp barriers and fences when
        # it wrote.
        self.writer, self.write_epoch = np.full(grains, NEVER, i4), np.full(grains, NEVER, i4)
        self.write_warp_epoch, self.write_fences = np.zeros(grains, i4), np.zeros(grains, i4)
        # The first and last thread among a grain's readers since the last barrier.
        self.read_epoch, self.read_warp_epoch = np.full(grains, NEVER, i4), np.zeros(grains, i4)
        self.first_reader, self.last_reader = np.zeros(grains, i4), np.zeros(grains, i4)
        # Whether an asynchronous copy to a grain, or a product that reads it, is in flight.
        self.arriving, self.in_product = np.zeros(grains, bool), np.zeros(grains, bool)
        self.fences = np.zeros(lanes.count, i4)  # fences between a thread's stores and tensor cores
        self.copies: list[Copy] = []
        self.committed = np.zeros(lanes.count, i4)

    def grains(self, offsets: Array, width: int) -> Array:
        return (offsets // self.grain)[:, None] + np.arange(width // self.grain)

    def fault(self, kind: str, at: int, who: Array, off: Array, width: int, what: str) -> None:
        self.lanes.fault(kind, at, who, off % self.pitch, width, f"in shared memory{what}")

    # Accesses

    def load(
        self, address: Array, size: int, vector: int, mask: Array | None, at: int
    ) -> list[Array]:
        lanes = self.lanes.of(mask)
        unknown = UNKNOWN & ((1 << 8 * size) - 1)
        out = [np.full(self.lanes.count, unknown, UNSIGNED[size]) for _ in range(vector)]
        self._count_banks(address, size * vector, lanes, at)
        off, lanes = self._sound(address, size * vector, lanes, at)
        for j, v in enumerate(self._read(off, size, vector, lanes, at)):
            out[j][lanes] = v
        return out

    def store(
        self, address: Array, size: int, values: list[Array], mask: Array | None, at: int
    ) -> None:
        lanes, width = self.lanes.of(mask), size * len(values)
        self._count_banks(address, width, lanes, at)
        off, lanes = self._sound(address, width, lanes, at)
        self._write(off, size, [v[lanes] for v in values], lanes, at)

    def load_matrices(
        self, address: Array, n: int, transposed: bool, mask: Array | None, at: int
    ) -> list[Array]:
        """ldmatrix: n matrices of 8 x 8 16-bit words. A warp's threads hold the rows' addresses."""
        self.lanes.whole(mask, at, "ldmatrix")
        lanes = self.lanes.of(mask)
        self._check_rows(address, n, lanes, at)
        out = []
        for words in self._matrix_words(address, n):
            off, who = self._sound(words, 4, lanes, at)
            value = np.full(self.lanes.count, UNKNOWN & 0xFFFFFFFF, u4)
            value[who] = self._read(off, 4, 1, who, at)[0]
            out.append(_transposed(value) if transposed else value)
        return out

    def store_matrices(
        self, address: Array, transposed: bool, values: list[Array], mask: Array | None, at: int
    ) -> None:
        self.lanes.whole(mask, at, "stmatrix")
        lanes = self.lanes.of(mask)
        self._check_rows(address, len(values), lanes, at)
        words = self._matrix_words(address, len(values))
        for where, value in zip(words, values, strict=True):
            off, who = self._sound(where, 4, lanes, at)
            self._write(off, 4, [(_transposed(value) if transposed else value)[who]], who, at)

    @staticmethod
    def _matrix_words(address: Array, n: int) -> list[Array]:
        """The address of each thread's word of each matrix."""
        rows = address.astype(i8).reshape(-1, 32)
        in_row = np.tile(np.arange(32) % 4 * 4, len(rows))
        return [np.repeat(rows[:, 8 * j : 8 * j + 8], 4, axis=1).ravel() + in_row for j in range(n)]

    def _check_rows(self, address: Array, n: int, lanes: Array, at: int) -> None:
        first = lanes[self.lanes.laneid[lanes] < 8 * n]
        misaligned = address[first] % u4(16) != 0
        if misaligned.any():
            who, where = first[misaligned], address[first][misaligned]
            self.lanes.fault("misaligned", at, who, where, 16, "as a row of a matrix")
        if at not in self.report.banks and len(first):
            warp = first[self.lanes.warp[first] == self.lanes.warp[first[0]]]
            waves = [_wavefronts(address[warp[8 * j : 8 * j + 8]], 16) for j in range(n)]
            self.report.banks[at] = (sum(waves), n)

    def _sound(self, address: Array, width: int, lanes: Array, at: int) -> tuple[Array, Array]:
        """Offsets into `data` of the valid accesses, and their threads."""
        off = address[lanes].astype(i8) - SHARED_BASE
        good = (off >= 0) & (off + width <= self.nbytes)
        if not good.all():
            what = f"past its {self.nbytes} bytes"
            self.lanes.fault("shared out of bounds", at, lanes[~good], off[~good], width, what)
        misaligned = off % width != 0
        if misaligned.any():
            self.fault("misaligned", at, lanes[misaligned], off[misaligned], width, "")
        good &= ~misaligned
        off, lanes = off[good], lanes[good]
        return off + self.lanes.block[lanes].astype(i8) * self.pitch, lanes

    def _read(self, off: Array, size: int, vector: int, lanes: Array, at: int) -> list[Array]:
        width = size * vector
        checked = self.lanes.checked[lanes]
        self._check_read(off[checked], width, lanes[checked], at)
        blank = ~self.written[self.grains(off, width)].all(1)
        if blank.any():
            what = ", which is uninitialized"
            self.fault("uninitialized", at, lanes[blank], off[blank], width, what)
        words = self.data.view(UNSIGNED[size])
        return [words[off // size + j] for j in range(vector)]

    def _write(self, off: Array, size: int, values: list[Array], lanes: Array, at: int) -> None:
        width = size * len(values)
        words, new = self.data.view(UNSIGNED[size]), np.stack(values, 1)
        places = (off // size)[:, None] + np.arange(len(values))
        checked = self.lanes.checked[lanes]
        some, who = off[checked], lanes[checked]
        each = size // self.grain  # grains of a value
        same = np.repeat(same_values(words[places[checked]], new[checked]), each, axis=1)
        self._check_write(some, width, who, at, same)
        # Threads that write the same grain with this instruction.
        lost = self.writer[self.grains(some, width)] != self.lanes.tid[who].astype(i4)[:, None]
        words[places] = new
        differ = np.repeat(~same_values(words[places[checked]], new[checked]), each, axis=1)
        bad = (lost & differ).any(1)
        if bad.any():
            self.fault("race", at, who[bad], some[bad], width, ", which two threads write at once")
        self.written[self.grains(off, width)] = True

    # Races

    def _since_barrier(self, at: Array, tid: Array, lanes: Array) -> Array:
        """Grains that another thread wrote since the last barrier."""
        now = self.lanes.epoch[self.lanes.block[lanes]][:, None]
        warp_now = self.lanes.warp_epoch[self.lanes.warp[lanes]][:, None]
        writer = self.writer[at]
        ordered = (writer // 32 == tid // 32) & (self.write_warp_epoch[at] < warp_now)
        return (self.write_epoch[at] == now) & (writer != tid) & ~ordered

    def _race_with_writer(
        self, bad: Array, grains: Array, off: Array, width: int, lanes: Array, at: int
    ) -> None:
        who = bad.any(1)
        if who.any():
            writer = int(self.writer[grains][bad][0])
            what = f", which thread {writer} wrote since the last barrier"
            self.fault("race", at, lanes[who], off[who], width, what)

    def _check_read(self, off: Array, width: int, lanes: Array, at: int) -> None:
        grains, tid = self.grains(off, width), self.lanes.tid[lanes].astype(i4)[:, None]
        bad = self._since_barrier(grains, tid, lanes)
        self._race_with_writer(bad, grains, off, width, lanes, at)
        in_flight = self.arriving[grains].any(1)
        if in_flight.any():
            what = ", where an asynchronous copy may still arrive"
            self.fault("race", at, lanes[in_flight], off[in_flight], width, what)
        now = self.lanes.epoch[self.lanes.block[lanes]][:, None]
        valid = self.read_epoch[grains] == now
        low = np.where(valid, np.minimum(self.first_reader[grains], tid), tid)
        high = np.where(valid, np.maximum(self.last_reader[grains], tid), tid)
        # Numpy keeps the last value for a repeated index, and threads ascend along the axis. The
        # reversed order therefore keeps the first reader of a grain.
        self.first_reader[grains[::-1]] = low[::-1]
        self.last_reader[grains] = high
        self.read_epoch[grains] = now
        self.read_warp_epoch[grains] = self.lanes.warp_epoch[self.lanes.warp[lanes]][:, None]

    def _check_write(
        self, off: Array, width: int, lanes: Array, at: int, same_value: Array
    ) -> None:
        grains, tid = self.grains(off, width), self.lanes.tid[lanes].astype(i4)[:, None]
        now = self.lanes.epoch[self.lanes.block[lanes]][:, None]
        warp_now = self.lanes.warp_epoch[self.lanes.warp[lanes]][:, None]
        low, high = self.first_reader[grains], self.last_reader[grains]
        read = (self.read_epoch[grains] == now) & ((low != tid) | (high != tid))
        one_warp = (low // 32 == tid // 32) & (high // 32 == tid // 32)
        read &= ~(one_warp & (self.read_warp_epoch[grains] < warp_now))
        if read.any():
            who, readers = read.any(1), (int(low[read][0]), int(high[read][0]))
            what = ", which threads {} to {} read since the last barrier".format(*readers)
            self.fault("race", at, lanes[who], off[who], width, what)
        twice = self._since_barrier(grains, tid, lanes)
        self._race_with_writer(twice & ~same_value, grains, off, width, lanes, at)
        for busy, what in (
            (self.arriving, ", where an asynchronous copy may still arrive"),
            (self.in_product, ", which an asynchronous product may still read"),
        ):
            who = busy[grains].any(1)
            if who.any():
                self.fault("race", at, lanes[who], off[who], width, what)
        self._note_writer(grains, lanes)

    def _note_writer(self, grains: Array, lanes: Array) -> None:
        self.writer[grains] = self.lanes.tid[lanes].astype(i4)[:, None]
        self.write_epoch[grains] = self.lanes.epoch[self.lanes.block[lanes]][:, None]
        self.write_warp_epoch[grains] = self.lanes.warp_epoch[self.lanes.warp[lanes]][:, None]
        self.write_fences[grains] = self.fences[lanes][:, None]

    def proxy_fence(self, mask: Array | None) -> None:
        self.fences[self.lanes.of(mask)] += 1

    # Asynchronous copies

    def copy_async(
        self, memory: GlobalMemory, to: Array, source: Array, size: int, taken: Array,
        mask: Array | None, at: int,
    ) -> None:  # fmt: skip
        """cp.async: reads `taken` of `size` bytes, possibly none; the rest becomes zero."""
        lanes = self.lanes.of(mask)
        data = np.zeros((self.lanes.count, size), u1)
        reading = np.zeros(self.lanes.count, bool)
        reading[lanes] = taken[lanes] > 0
        if (taken[reading] != size).any():
            raise Unsupported("cp.async that reads part of its bytes")
        self._count_banks(to, size, lanes, at)
        if reading.any():
            word = min(size, 8)
            for j, v in enumerate(memory.load(source, word, size // word, reading, at)):
                data[reading, j * word : (j + 1) * word] = v[reading][:, None].view(u1)
        off, lanes = self._sound(to, size, lanes, at)
        checked = self.lanes.checked[lanes]
        different = np.zeros((int(checked.sum()), size // self.grain), bool)
        self._check_write(off[checked], size, lanes[checked], at, different)
        self.arriving[self.grains(off, size)] = True
        self.copies.append(Copy(lanes, off, size, data[lanes], self.committed[lanes].copy()))

    def commit(self, mask: Array | None) -> None:
        self.committed[self.lanes.of(mask)] += 1

    def wait(self, pending: int, mask: Array | None) -> None:
        """Complete all but the last `pending` groups of the threads' copies."""
        active = np.ones(self.lanes.count, bool) if mask is None else mask
        left = []
        for copy in self.copies:
            lanes, size = copy.lanes, copy.size
            done = active[lanes] & (copy.groups < self.committed[lanes] - pending)
            if done.any():
                self.data[copy.offsets[done][:, None] + np.arange(size)] = copy.data[done]
                grains = self.grains(copy.offsets[done], size)
                self.arriving[grains] = False
                self.written[grains] = True
                self._note_writer(grains, lanes[done])
            if not done.all():
                rest = ~done
                left.append(
                    Copy(lanes[rest], copy.offsets[rest], size, copy.data[rest], copy.groups[rest])
                )
        self.copies = left

    # Bank conflicts

    def _count_banks(self, address: Array, width: int, lanes: Array, at: int) -> None:
        """Count the wavefronts of the first warp that runs an instruction, 128 bytes each."""
        if at in self.report.banks or not len(lanes):
            return
        mine = lanes[self.lanes.warp[lanes] == self.lanes.warp[lanes[0]]]
        at_once = 32 * 4 // max(width, 4)
        phase = self.lanes.laneid[mine] // at_once
        waves = [_wavefronts(address[mine[phase == one]], width) for one in np.unique(phase)]
        self.report.banks[at] = (sum(waves), len(waves))


def _wavefronts(address: Array, width: int) -> int:
    words = np.unique((address.astype(i8)[:, None] + np.arange(0, max(width, 4), 4)) // 4)
    return int(np.bincount(words % 32).max())


def _transposed(value: Array) -> Array:
    halves = np.ascontiguousarray(value).view(u2).reshape(-1, 8, 8)
    return np.ascontiguousarray(halves.transpose(0, 2, 1)).reshape(-1).view(u4)
