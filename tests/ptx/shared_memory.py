"""Shared memory of the blocks that run: accesses, asynchronous copies, races and bank conflicts.

Two threads race if they access a location without a barrier of the block in between and at least
one of them writes; `bar.warp.sync` orders the threads of one warp. An asynchronous copy writes at
any time from its issue to its wait, and a product of a tensor core (`tensor_cores`) reads likewise.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from ptx.global_memory import GlobalMemory
from ptx.lanes import Lanes
from ptx.numerics import UNSIGNED, Array, i4, i8, same_values, u1, u2, u4
from ptx.parser import Unsupported
from ptx.translator import SHARED_BASE

NEVER = -1
WRITTEN = "which thread {writer} wrote since the last barrier"
ARRIVING = "where an asynchronous copy may still arrive"


class Access:
    """Valid accesses of `width` bytes at `offsets` into a memory's data, by the threads `who`.

    Other arrays have a last axis more, for the grains of an access.
    """

    def __init__(
        self, memory: "SharedMemory", at: int, who: Array, offsets: Array, width: int
    ) -> None:
        self.memory, self.at, self.who, self.offsets = memory, at, who, offsets
        self.width, self.lanes = width, memory.lanes
        self.data: Array | None = None  # that an asynchronous copy writes

    def part(self, which: Array) -> "Access":
        part = Access(self.memory, self.at, self.who[which], self.offsets[which], self.width)
        part.data = None if self.data is None else self.data[which]
        return part

    @cached_property
    def grains(self) -> Array:
        grain = self.memory.grain
        return (self.offsets // grain)[..., None] + np.arange(self.width // grain)

    @cached_property
    def tid(self) -> Array:
        return self.lanes.tid[self.who].astype(i4)[..., None]

    @cached_property
    def now(self) -> Array:
        return self.lanes.epoch[self.lanes.block[self.who]][..., None]

    @cached_property
    def warp_now(self) -> Array:
        return self.lanes.warp_epoch[self.lanes.warp[self.who]][..., None]

    @property
    def checked(self) -> Array:
        return self.lanes.checked[self.who]

    def check(self, bad: Array, kind: str, what: str) -> None:
        """Report the accesses with a bad grain. {writer}, {first} and {last} in `what` are the
        threads that wrote and read the first such grain."""
        if not bad.any():
            return
        m, grain = self.memory, self.grains[bad][0]
        what = what.format(
            writer=m.writer[grain], first=m.first_reader[grain], last=m.last_reader[grain]
        )
        where, what = self.offsets % m.pitch, f"in shared memory, {what}"
        self.lanes.check(bad, kind, self.at, self.who, where, self.width, what)


class Groups:
    """Asynchronous accesses in flight, in the groups that their threads commit."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.committed = lanes, np.zeros(lanes.count, i4)
        # With the number of groups that each thread had committed before.
        self.flying: list[tuple[Access, Array]] = []

    def add(self, access: Access) -> None:
        self.flying.append((access, self.committed[access.who.reshape(len(access.who))]))

    def commit(self, mask: Array | None) -> None:
        self.committed[self.lanes.of(mask)] += 1

    def wait(self, pending: int, mask: Array | None) -> list[Access]:
        """Remove and return all but the last `pending` groups of the threads' accesses."""
        active = np.ones(self.lanes.count, bool) if mask is None else mask
        finished, left = [], []
        for access, groups in self.flying:
            who = access.who.reshape(len(access.who))
            done = active[who] & (groups < self.committed[who] - pending)
            if done.any():
                finished.append(access.part(done))
            if not done.all():
                left.append((access.part(~done), groups[~done]))
        self.flying = left
        return finished


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
        self.copies = Groups(lanes)

    # Accesses

    def load(
        self, address: Array, size: int, vector: int, mask: Array | None, at: int
    ) -> list[Array]:
        out = self.lanes.unknown(size, vector)
        access = self._sound(address, size * vector, self.lanes.of(mask), at)
        self._read(access, out)
        return out

    def store(
        self, address: Array, size: int, values: list[Array], mask: Array | None, at: int
    ) -> None:
        self._write(self._sound(address, size * len(values), self.lanes.of(mask), at), values)

    def load_matrices(
        self, address: Array, n: int, transposed: bool, mask: Array | None, at: int
    ) -> list[Array]:
        """ldmatrix: n matrices of 8 x 8 16-bit words. A warp's threads hold the rows' addresses."""
        out = self.lanes.unknown(4, n)
        for value, access in zip(out, self._matrices(address, n, mask, at), strict=True):
            self._read(access, [value])
        return [_transposed(value) for value in out] if transposed else out

    def store_matrices(
        self, address: Array, transposed: bool, values: list[Array], mask: Array | None, at: int
    ) -> None:
        accesses = self._matrices(address, len(values), mask, at)
        for value, access in zip(values, accesses, strict=True):
            self._write(access, [_transposed(value) if transposed else value])

    def _matrices(self, address: Array, n: int, mask: Array | None, at: int) -> Iterator[Access]:
        """Each thread's word of each matrix. A warp's first 8 n threads hold rows' addresses."""
        self.lanes.whole(mask, at, "ldmatrix or stmatrix")
        lanes = self.lanes.of(mask)
        first = lanes[self.lanes.laneid[lanes] < 8 * n]
        where = address[first]
        self.lanes.check(where % u4(16) != 0, "misaligned", at, first, where, 16, "as a matrix row")
        self._count_banks(address, 16, first, at)
        rows = address.astype(i8).reshape(-1, 32)
        in_row = np.tile(np.arange(32) % 4 * 4, len(rows))
        for j in range(n):
            words = np.repeat(rows[:, 8 * j : 8 * j + 8], 4, axis=1).ravel() + in_row
            yield self._sound(words, 4, lanes, at)

    def _sound(self, address: Array, width: int, lanes: Array, at: int) -> Access:
        """The valid ones among the accesses of a request."""
        self._count_banks(address, width, lanes, at)
        off = address[lanes].astype(i8) - SHARED_BASE
        past, misaligned = (off < 0) | (off + width > self.nbytes), off % width != 0
        what = f"past its {self.nbytes} bytes"
        self.lanes.check(past, "shared out of bounds", at, lanes, off, width, what)
        self.lanes.check(misaligned, "misaligned", at, lanes, off, width, "in shared memory")
        good = ~(past | misaligned)
        off, lanes = off[good], lanes[good]
        off = off + self.lanes.block[lanes].astype(i8) * self.pitch
        return Access(self, at, lanes, off, width)

    def _read(self, access: Access, out: list[Array]) -> None:
        self._check_read(access.part(access.checked))
        access.check(~self.written[access.grains], "uninitialized", "which is uninitialized")
        size = out[0].dtype.itemsize
        words = self.data.view(UNSIGNED[size])
        for j, v in enumerate(out):
            v[access.who] = words[access.offsets // size + j]

    def _write(self, access: Access, values: list[Array]) -> None:
        size = access.width // len(values)
        words = self.data.view(UNSIGNED[size])
        new = np.stack([v[access.who] for v in values], 1)
        places = (access.offsets // size)[:, None] + np.arange(len(values))
        checked = access.checked
        some, each = access.part(checked), size // self.grain  # grains of a value
        same = np.repeat(same_values(words[places[checked]], new[checked]), each, axis=1)
        self._check_write(some, same)
        # Threads that write the same grain with this instruction.
        lost = self.writer[some.grains] != some.tid
        words[places] = new
        differ = np.repeat(~same_values(words[places[checked]], new[checked]), each, axis=1)
        some.check(lost & differ, "race", "which two threads write at once")
        self.written[access.grains] = True

    # Races

    def _since_barrier(self, access: Access) -> Array:
        """Grains that another thread wrote since the last barrier."""
        grains, tid = access.grains, access.tid
        writer = self.writer[grains]
        ordered = (writer // 32 == tid // 32) & (self.write_warp_epoch[grains] < access.warp_now)
        return (self.write_epoch[grains] == access.now) & (writer != tid) & ~ordered

    def _check_read(self, access: Access) -> None:
        grains, tid, now = access.grains, access.tid, access.now
        access.check(self._since_barrier(access), "race", WRITTEN)
        access.check(self.arriving[grains], "race", ARRIVING)
        valid = self.read_epoch[grains] == now
        low = np.where(valid, np.minimum(self.first_reader[grains], tid), tid)
        high = np.where(valid, np.maximum(self.last_reader[grains], tid), tid)
        # Numpy keeps the last value for a repeated index, and threads ascend along the axis. The
        # reversed order therefore keeps the first reader of a grain.
        self.first_reader[grains[::-1]] = low[::-1]
        self.last_reader[grains] = high
        self.read_epoch[grains] = now
        self.read_warp_epoch[grains] = access.warp_now

    def _check_write(self, access: Access, same_value: Array | bool) -> None:
        grains, tid = access.grains, access.tid
        low, high = self.first_reader[grains], self.last_reader[grains]
        read = (self.read_epoch[grains] == access.now) & ((low != tid) | (high != tid))
        one_warp = (low // 32 == tid // 32) & (high // 32 == tid // 32)
        read &= ~(one_warp & (self.read_warp_epoch[grains] < access.warp_now))
        access.check(read, "race", "which threads {first} to {last} read since the last barrier")
        access.check(self._since_barrier(access) & ~same_value, "race", WRITTEN)
        access.check(self.arriving[grains], "race", ARRIVING)
        access.check(
            self.in_product[grains], "race", "which an asynchronous product may still read"
        )
        self._note_writer(access)

    def _note_writer(self, access: Access) -> None:
        self.writer[access.grains], self.write_epoch[access.grains] = access.tid, access.now
        self.write_warp_epoch[access.grains] = access.warp_now
        self.write_fences[access.grains] = self.fences[access.who][..., None]

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
        if reading.any():
            word = min(size, 8)
            for j, v in enumerate(memory.load(source, word, size // word, reading, at)):
                data[reading, j * word : (j + 1) * word] = v[reading][:, None].view(u1)
        access = self._sound(to, size, lanes, at)
        self._check_write(access.part(access.checked), np.False_)
        self.arriving[access.grains] = True
        access.data = data[access.who]
        self.copies.add(access)

    def wait(self, pending: int, mask: Array | None) -> None:
        """Complete all but the last `pending` groups of the threads' copies."""
        for access in self.copies.wait(pending, mask):
            self.data[access.offsets[:, None] + np.arange(access.width)] = access.data
            self.arriving[access.grains] = False
            self.written[access.grains] = True
            self._note_writer(access)

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
