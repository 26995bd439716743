"""The threads of the blocks that run at once, and counts of the barriers that they passed."""

from dataclasses import dataclass

import numpy as np

from ptx.numerics import UNSIGNED, Array, i4, u1, u4
from ptx.report import Report

UNKNOWN = 0xCD  # each byte of a register that nothing has set


@dataclass
class Lanes:
    """The threads of `blocks` blocks of `threads` threads; the first block has number `first`.

    Arrays have one element per thread. `checked` marks the threads of the blocks whose shared
    memory is searched for races.
    """

    report: Report
    first: int
    blocks: int
    threads: int
    checked: Array

    def __post_init__(self) -> None:
        self.count = self.blocks * self.threads
        self.everyone = np.arange(self.count)
        self.block = np.repeat(np.arange(self.blocks, dtype=i4), self.threads)
        self.tid = np.tile(np.arange(self.threads, dtype=u4), self.blocks)
        self.laneid = self.tid & u4(31)
        self.warp = (self.everyone // 32).astype(i4)
        self.in_grid = (self.everyone + self.first * self.threads).astype(i4)
        # Number of barriers that each block and each warp has passed.
        self.epoch = np.zeros(self.blocks, i4)
        self.warp_epoch = np.zeros(self.count // 32, i4)

    def of(self, mask: Array | None) -> Array:
        return self.everyone if mask is None else np.nonzero(mask)[0]

    def unknown(self, size: int, vector: int) -> list[Array]:
        """The results of a load before it: marked numbers, which a load with a fault keeps."""
        return [np.full(self.count * size, UNKNOWN, u1).view(UNSIGNED[size]) for _ in range(vector)]

    def check(
        self, bad: Array, kind: str, at: int, who: Array, where: Array, width: int, what: str
    ) -> None:
        """Report the accesses of `width` bytes at `where` by the threads `who` that are bad.

        `bad` may have one axis more than `where`, for the parts of an access.
        """
        if not bad.any():
            return
        bad = bad.any(-1) if bad.ndim > where.ndim else bad
        who, where = np.broadcast_to(who, where.shape)[bad], where[bad]
        block, thread = int(self.block[who[0]]) + self.first, int(self.tid[who[0]])
        example = f"block {block} thread {thread}: {width} bytes at {int(where[0]):#x} {what}"
        self.report.fault(kind, at, len(who), example)

    def whole(self, mask: Array | None, at: int, what: str, size: int = 32) -> None:
        """Report a warp, or a group of `size` threads, in which only some threads are active."""
        if mask is None:
            return
        active = mask.reshape(-1, size).sum(1)
        if ((active > 0) & (active < size)).any():
            self.report.fault("divergence", at, 1, f"{what} by part of {size} threads")

    def warp_barrier(self, mask: Array | None, at: int) -> None:
        self.whole(mask, at, "bar.warp.sync")
        self.warp_epoch[np.unique(self.warp[self.of(mask)])] += 1

    def block_barrier(self, blocks: Array) -> None:
        self.epoch[blocks] += 1
