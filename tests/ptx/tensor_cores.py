"""Products of tensor cores: mma of one warp, and wgmma of four, which runs asynchronously.

Terms are summed exactly, and the sum is rounded toward zero once per instruction, as a model of the
hardware. The layouts of fragments and matrix descriptors are those of the PTX ISA,
"Matrix multiply-accumulate operation" and "Asynchronous warpgroup-level matrix instructions".
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx.numerics import UNSIGNED, Array, as_tf32, f4, f8, i4, i8, toward_zero, u2, u4, u8, widened
from ptx.parser import Unsupported
from ptx.shared_memory import SharedMemory
from ptx.translator import SHARED_BASE

BYTES = {"tf32": 4, "bf16": 2, "f16": 2}
PITCHES = {1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's kind of swizzle


@dataclass
class Reading:
    """Shared memory that a product may still read."""

    grains: Array  # (groups, ...)
    first: Array  # the first thread of each group
    groups: Array  # number of groups of products that it had committed before


@dataclass
class Pending:
    group: int
    compute: Callable[[], None]


class TensorCores:
    """With `late`, a wgmma reads shared memory when it is waited for; otherwise when issued."""

    def __init__(self, shared: SharedMemory, late: bool) -> None:
        self.shared, self.lanes, self.late = shared, shared.lanes, late
        self.committed = np.zeros(self.lanes.count, i4)
        self.reading: list[Reading] = []
        self.pending: list[Pending] = []

    # Products of a warp

    def mma(
        self, shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array],
        mask: Array | None, at: int,
    ) -> list[Array]:  # fmt: skip
        """D = A B + C of each warp."""
        self.lanes.whole(mask, at, "mma")
        lane = np.arange(32)
        row, inside = lane // 4, lane % 4
        warps = self.lanes.count // 32

        def of(v: Array) -> Array:
            return np.asarray(v).reshape(warps, 32)

        if shape == "m8n8k4" and kind == "f64":
            left, right = np.empty((warps, 8, 4)), np.empty((warps, 4, 8))
            left[:, row, inside], right[:, inside, row] = of(a[0]), of(b[0])
            d = left @ right
            return [v + d[:, row, 2 * inside + i].reshape(-1) for i, v in enumerate(c)]
        if not shape.startswith("m16n8k") or kind not in ("f64", *BYTES):
            raise Unsupported(f"mma {shape} {kind}")
        k = int(shape.removeprefix("m16n8k"))
        left, right, d = np.empty((warps, 16, k)), np.empty((warps, k, 8)), np.empty((warps, 16, 8))
        for r, v in enumerate(a):
            for column, values in _columns(v, kind, inside):
                left[:, row + 8 * (r % 2), column + k // len(a) * 2 * (r // 2)] = of(values)
        for r, v in enumerate(b):
            for column, values in _columns(v, kind, inside):
                right[:, column + k // len(b) * r, row] = of(values)
        for i, v in enumerate(c):
            d[:, row + 8 * (i // 2), 2 * inside + i % 2] = of(v)
        d = d + left @ right
        d = d if kind == "f64" else toward_zero(d)
        return [d[:, row + 8 * (i // 2), 2 * inside + i % 2].reshape(-1) for i in range(4)]

    # Products of a group of four warps

    def wgmma(
        self, n: int, kind: str, c: list[Array], a: Array | list[Array], b: Array,
        a_transposed: bool, b_transposed: bool, keep: Array, mask: Array | None, at: int,
    ) -> list[Array]:  # fmt: skip
        """D = A B (+ D). B is in shared memory, given by a descriptor; A is too, or in registers.

        The hardware may read the whole group's operands for any thread, so the checks count every
        thread of the group as a reader.
        """
        self.lanes.whole(mask, at, "wgmma", 128)
        every = self.lanes.count // 128
        groups = np.arange(every)
        if mask is not None:
            groups = np.nonzero(mask.reshape(-1, 128).any(1))[0]
        lane, k = np.arange(128), 32 // BYTES[kind]
        row, inside = lane // 32 * 16 + lane % 32 // 4, lane % 4

        def of(v: Array) -> Array:
            return np.asarray(v).reshape(-1, 128)[groups]

        places = None
        if not isinstance(a, list):
            places = self._operand(of(a)[:, 0], 64, kind, a_transposed, groups, at)
        right = self._operand(of(b)[:, 0], n, kind, b_transposed, groups, at)
        out = [np.array(v, f4) for v in c]

        def compute() -> None:
            if places is None:
                left = np.empty((len(groups), 64, k))
                for r, v in enumerate(a):
                    for column, values in _columns(v, kind, inside):
                        left[:, row + 8 * (r % 2), column + k // 2 * (r // 2)] = of(values)
            else:
                left = self._values(places, kind)
            d = np.empty((len(groups), 64, n))
            for i, v in enumerate(c):
                column = i // 4 * 8 + 2 * inside + i % 2
                d[:, row + 8 * (i // 2 % 2), column] = np.where(of(keep), of(v), f4(0))
            d = toward_zero(d + left @ self._values(right, kind).transpose(0, 2, 1))
            for i, v in enumerate(out):
                column = i // 4 * 8 + 2 * inside + i % 2
                v.reshape(-1, 128)[groups] = d[:, row + 8 * (i // 2 % 2), column]

        if self.late and mask is None:  # the registers that hold `out` are filled by the wait
            self.pending.append(Pending(int(self.committed[0]), compute))
        else:
            compute()
        return out

    def _values(self, places: Array, kind: str) -> Array:
        bits = self.shared.data.view(UNSIGNED[BYTES[kind]])[places]
        return as_tf32(bits) if kind == "tf32" else widened(bits, kind)

    def _operand(
        self, descriptor: Array, n: int, kind: str, transposed: bool, groups: Array, at: int
    ) -> Array:
        """(groups, n, k) offsets of a matrix in shared memory, in words of its dtype."""
        size, block = BYTES[kind], self.lanes.block[groups * 128].astype(i8)
        off = _places(descriptor.astype(u8), n, size, transposed) - SHARED_BASE
        first = groups * 128
        outside = ((off < 0) | (off + size > self.shared.nbytes)).any((1, 2))
        if outside.any():
            what = f"past its {self.shared.nbytes} bytes, behind a descriptor of a matrix"
            where = off[outside].reshape(int(outside.sum()), -1).max(1)
            self.shared.fault("shared out of bounds", at, first[outside], where, size, what)
            off = np.clip(off, 0, self.shared.nbytes - size)
        off = off + (block * self.shared.pitch)[:, None, None]
        grains = (off // self.shared.grain)[..., None] + np.arange(
            max(1, size // self.shared.grain)
        )
        self._check(grains, off, size, first, at)
        return off // size

    def _check(self, grains: Array, off: Array, size: int, first: Array, at: int) -> None:
        shared = self.shared
        axes = (slice(None), None, None, None)

        def fault(kind: str, bad: Array, what: str) -> None:
            group, row, column, _ = np.nonzero(bad)
            if not len(group):
                return
            writer = int(shared.writer[grains][bad][0])
            what = f", which a product reads and {what.format(writer)}"
            shared.fault(kind, at, first[group], off[group, row, column], size, what)

        block, checked = self.lanes.block[first], self.lanes.checked[first][axes]
        recent = shared.write_epoch[grains] == self.lanes.epoch[block][axes]
        arriving, writer = shared.arriving[grains], shared.writer[grains]
        at_writer = (block * self.lanes.threads)[axes] + np.maximum(writer, 0)
        bare = (writer >= 0) & (shared.fences[at_writer] <= shared.write_fences[grains])
        fault("race", checked & recent, "thread {} wrote since the last barrier")
        fault("race", checked & arriving, "an asynchronous copy may still write")
        fault("race", checked & bare, "thread {} wrote with no proxy fence since")
        fault("uninitialized", ~shared.written[grains], "is uninitialized")
        if checked.any():
            self.reading.append(Reading(grains, first, self.committed[first].copy()))
            shared.in_product[grains] = True
            self._note_readers(grains, first)

    def _note_readers(self, grains: Array, first: Array) -> None:
        axes, shared = (slice(None), None, None, None), self.shared
        low = self.lanes.tid[first].astype(i4)[axes]
        shared.first_reader[grains], shared.last_reader[grains] = low, low + 127
        shared.read_epoch[grains] = self.lanes.epoch[self.lanes.block[first]][axes]
        shared.read_warp_epoch[grains] = 1 << 30  # no bar.warp.sync orders it

    def commit(self, mask: Array | None) -> None:
        self.committed[self.lanes.of(mask)] += 1

    def wait(self, pending: int, mask: Array | None) -> None:
        """Complete all but the last `pending` groups of products."""
        active = np.ones(self.lanes.count, bool) if mask is None else mask
        done_before = self.committed[0] - pending
        for product in self.pending:
            if product.group < done_before:
                product.compute()
        self.pending = [p for p in self.pending if p.group >= done_before]
        left = []
        for r in self.reading:
            done = active[r.first] & (r.groups < self.committed[r.first] - pending)
            self._note_readers(r.grains[done], r.first[done])
            if not done.all():
                left.append(Reading(r.grains[~done], r.first[~done], r.groups[~done]))
        self.reading = left
        self.shared.in_product[:] = False
        for r in left:
            self.shared.in_product[r.grains] = True


def _columns(register: Array, kind: str, inside: Array) -> list[tuple[Array, Array]]:
    """The values of a register of a fragment, and their columns in the fragment's first part."""
    if kind == "f64":
        return [(inside, register.view(f8))]
    if kind == "tf32":
        return [(inside, as_tf32(register))]
    halves = [(register >> u4(16 * h)).astype(u2) for h in range(2)]
    return [(2 * inside + h, widened(bits, kind)) for h, bits in enumerate(halves)]


def _places(descriptor: Array, n: int, size: int, transposed: bool) -> Array:
    """(groups, n, k) addresses of a matrix with contiguous rows; contiguous columns if it is
    transposed."""

    def field(bit: int) -> Array:
        return (((descriptor >> u8(bit)) & u8(0x3FFF)).astype(i8) << 4)[:, None, None]

    start, lead, stride = field(0), field(16), field(32)
    if ((descriptor >> u8(49)) & u8(7)).any():
        raise Unsupported("base offset of a matrix descriptor")
    swizzle = int(descriptor[0] >> u8(62))
    row, k = np.arange(n)[None, :, None], np.arange(32 // size)[None, None, :]
    if not transposed:
        if swizzle == 0:
            return start + row // 8 * stride + row % 8 * 16 + k * size // 16 * lead + k * size % 16
        pitch = PITCHES[swizzle]
        where = start + row // 8 * stride + row % 8 * pitch + k * size
    else:
        if swizzle == 0:
            raise Unsupported("transposed matrix with no swizzle")
        pitch = PITCHES[swizzle]
        across = pitch // size  # rows whose values are contiguous
        where = start + row // across * lead + row % across * size
        where = where + k // 8 * stride + k % 8 * pitch
    return where ^ (((where >> 7) & (pitch // 16 - 1)) << 4)
