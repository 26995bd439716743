"""Products of tensor cores: mma of one warp, and wgmma of four, which runs asynchronously.

Terms are summed exactly, and the sum is rounded toward zero once per instruction, as a model of the
hardware. The layouts of fragments and matrix descriptors are those of the PTX ISA,
"Matrix multiply-accumulate operation" and "Asynchronous warpgroup-level matrix instructions".
"""

import re
from collections.abc import Callable

import numpy as np

from ptx.numerics import UNSIGNED, Array, as_tf32, f4, f8, i8, toward_zero, u2, u4, u8, widened
from ptx.parser import Unsupported
from ptx.shared_memory import Access, Groups, SharedMemory
from ptx.translator import SHARED_BASE

BYTES = {"tf32": 4, "bf16": 2, "f16": 2}
PITCHES = {1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's kind of swizzle


class TensorCores:
    """With `late`, a wgmma reads shared memory when it is waited for; otherwise when issued."""

    def __init__(self, shared: SharedMemory, late: bool) -> None:
        self.shared, self.lanes, self.late = shared, shared.lanes, late
        self.products = Groups(self.lanes)  # that may still read shared memory
        self.pending: list[tuple[int, Callable[[], None]]] = []  # with the number of their group

    def mma(
        self, shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array],
        mask: Array | None, at: int,
    ) -> list[Array]:  # fmt: skip
        """D = A B + C of each warp."""
        self.lanes.whole(mask, at, "mma")
        found = re.fullmatch(r"m(8|16)n8k(\d+)", shape)
        if found is None or kind not in ("f64", *BYTES):
            raise Unsupported(f"mma {shape} {kind}")
        m, k = map(int, found.groups())
        fragment = Fragment(32, np.arange(self.lanes.count // 32))
        # The transpose of B has the layout of eight rows of A, with all its columns apart.
        right = fragment.matrix(b, kind, 8, k).transpose(0, 2, 1)
        d = fragment.sums(c, m, 8) + fragment.matrix(a, kind, m, k) @ right
        out = [np.empty_like(v) for v in c]
        fragment.write(out, d if kind == "f64" else toward_zero(d))
        return out

    def wgmma(
        self, n: int, kind: str, c: list[Array], a: Array | list[Array], b: Array,
        a_transposed: bool, b_transposed: bool, keep: Array, mask: Array | None, at: int,
    ) -> list[Array]:  # fmt: skip
        """D = A B (+ D) of groups of four warps. B is in shared memory, given by a descriptor; A is
        too, or in registers.

        The hardware may read the whole group's operands for any thread, so the checks count every
        thread of the group as a reader.
        """
        self.lanes.whole(mask, at, "wgmma", 128)
        groups = np.arange(self.lanes.count // 128)
        if mask is not None:
            groups = np.nonzero(mask.reshape(-1, 128).any(1))[0]
        fragment = Fragment(128, groups)
        places = None
        if not isinstance(a, list):
            places = self._operand(a, 64, kind, a_transposed, groups, at)
        right = self._operand(b, n, kind, b_transposed, groups, at)
        out = [np.array(v, f4) for v in c]

        def compute() -> None:
            if places is None:
                left = fragment.matrix(a, kind, 64, 32 // BYTES[kind])
            else:
                left = self._values(places, kind)
            d = fragment.sums([np.where(keep, v, f4(0)) for v in c], 64, n)
            d = d + left @ self._values(right, kind).transpose(0, 2, 1)
            fragment.write(out, toward_zero(d))

        if self.late and mask is None:  # the registers that hold `out` are filled by the wait
            self.pending.append((int(self.products.committed[0]), compute))
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
        shared, size, first = self.shared, BYTES[kind], (groups * 128)[:, None, None]
        off = _places(descriptor[groups * 128].astype(u8), n, size, transposed) - SHARED_BASE
        outside = (off < 0) | (off + size > shared.nbytes)
        what = f"past its {shared.nbytes} bytes, behind a descriptor of a matrix"
        self.lanes.check(outside, "shared out of bounds", at, first, off, size, what)
        off = np.where(outside, 0, off) + self.lanes.block[first].astype(i8) * shared.pitch
        self._check(Access(shared, at, first, off, size))
        return off // size

    def _check(self, access: Access) -> None:
        shared, grains, checked = self.shared, access.grains, access.checked[..., None]
        writer = shared.writer[grains]
        at_writer = access.who[..., None] - access.tid + np.maximum(writer, 0)
        bare = (writer >= 0) & (shared.fences[at_writer] <= shared.write_fences[grains])
        recent = shared.write_epoch[grains] == access.now
        for kind, bad, what in (
            ("race", checked & recent, "thread {writer} wrote since the last barrier"),
            ("race", checked & shared.arriving[grains], "an asynchronous copy may still write"),
            ("race", checked & bare, "thread {writer} wrote with no proxy fence since"),
            ("uninitialized", ~shared.written[grains], "is uninitialized"),
        ):
            access.check(bad, kind, f"which a product reads and {what}")
        if checked.any():
            self.products.add(access)
            shared.in_product[grains] = True
            self._note_readers(access)

    def _note_readers(self, access: Access) -> None:
        shared, grains, low = self.shared, access.grains, access.tid
        shared.first_reader[grains], shared.last_reader[grains] = low, low + 127
        shared.read_epoch[grains] = access.now
        shared.read_warp_epoch[grains] = 1 << 30  # no bar.warp.sync orders it

    def wait(self, pending: int, mask: Array | None) -> None:
        """Complete all but the last `pending` groups of products."""
        done_before = self.products.committed[0] - pending
        for group, compute in self.pending:
            if group < done_before:
                compute()
        self.pending = [p for p in self.pending if p[0] >= done_before]
        for access in self.products.wait(pending, mask):
            self._note_readers(access)
        self.shared.in_product[:] = False
        for access, _ in self.products.flying:
            self.shared.in_product[access.grains] = True


class Fragment:
    """Matrices in the registers of `groups`, each of `size` threads. A register of a thread holds
    values of one row of each."""

    def __init__(self, size: int, groups: Array) -> None:
        self.size, self.groups = size, groups
        lane = np.arange(size)
        self.row, self.inside = lane // 32 * 16 + lane % 32 // 4, lane % 4

    def _of(self, register: Array) -> Array:
        return register.reshape(-1, self.size)

    def matrix(self, registers: list[Array], kind: str, rows: int, k: int) -> Array:
        """(groups, rows, k): A, or the transpose of B if it has 8 rows."""
        out = np.empty((len(self.groups), rows, k))
        high = 1 if rows == 8 else 2  # registers of neighbouring rows come first
        for r, v in enumerate(registers):
            first = k * high // len(registers) * (r // high)
            for column, values in self._columns(v, kind):
                out[:, self.row + 8 * (r % high), first + column] = self._of(values)[self.groups]
        return out

    def _columns(self, register: Array, kind: str) -> list[tuple[Array, Array]]:
        """The values of a register, and their columns in the first part."""
        if kind == "f64":
            return [(self.inside, register.view(f8))]
        if kind == "tf32":
            return [(self.inside, as_tf32(register))]
        halves = [(register >> u4(16 * h)).astype(u2) for h in range(2)]
        return [(2 * self.inside + h, widened(bits, kind)) for h, bits in enumerate(halves)]

    def _sum_at(self, i: int) -> tuple[slice, Array, Array]:
        """The place of the sum that register `i` holds."""
        return slice(None), self.row + 8 * (i // 2 % 2), i // 4 * 8 + 2 * self.inside + i % 2

    def sums(self, registers: list[Array], rows: int, n: int) -> Array:
        out = np.empty((len(self.groups), rows, n))
        for i, v in enumerate(registers):
            out[self._sum_at(i)] = self._of(v)[self.groups]
        return out

    def write(self, registers: list[Array], values: Array) -> None:
        for i, v in enumerate(registers):
            self._of(v)[self.groups] = values[self._sum_at(i)]


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
