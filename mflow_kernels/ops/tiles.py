"""Tiles of columns, and the ledger of log-determinants that they write.

A *column* is one pixel of one sample. A program of a kernel works on a tile of columns. If a sample
has fewer pixels than a tile, tiles run across samples (`Columns.flat`), so that (N, C) vectors fill
the lanes too. N and P are arguments at run time; the compiler knows a divisor of P
(`Columns.unit`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.addresses import multiple
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.launch import uses_triton
from mflow_kernels.ops.layouts import channels_first, pixels


def elementwise_tile(x: Tensor) -> tuple[int, int]:
    """Channels and columns of an elementwise program's tile.

    A tile has 1,024 elements (512 of float64, which needs twice the registers) and is longest along
    the axis that is contiguous in memory.
    """
    elements = 512 if x.dtype == torch.float64 else 1024
    if channels_first(x):
        return 4, elements // 4
    block_c = min(64, 1 << (x.shape[1] - 1).bit_length())
    return block_c, max(16, elements // block_c)


class Columns(NamedTuple):
    """The compile-time constants of a kernel's tiles of columns.

    Attributes:
        block: number of columns of a tile.
        flat: whether tiles run across samples.
        unit: a power of two that P is a multiple of, up to 8.
    """

    block: int
    flat: bool
    unit: int


class Tiles(NamedTuple):
    """The tiles of N x P columns.

    Attributes:
        programs: number of tiles, one program each.
        ledger: entries of a sample's row in the ledger.
        columns: the compile-time constants.
    """

    programs: int
    ledger: int
    columns: Columns


def tile_columns(n: int, p: int, block: int) -> Tiles:
    columns = Columns(block, p < block, math.gcd(p, 8))
    if columns.flat:
        if n * p > 2**31 - block:  # kernels number these columns in 32 bits
            raise ValueError(
                f"x: expected at most {2**31 - block} pixels in the batch, got {n} samples of {p} "
                "pixels"
            )
        return Tiles(-(-n * p // block), p, columns)
    per_sample = -(-p // block)
    return Tiles(n * per_sample, per_sample, columns)


def ledger_columns(x: Tensor, block: int) -> int:
    """T of the ledger (N, T) that a launch on x writes if its tiles have `block` columns."""
    if not uses_triton(x):
        return 1
    return tile_columns(x.shape[0], pixels(x), block).ledger


@triton.jit
def columns(tile, N, P, COLUMNS: tl.constexpr):
    """Sample and pixel of each column of a tile, and whether the column exists."""
    BLOCK: tl.constexpr = COLUMNS.block
    P = multiple(P, COLUMNS.unit)
    if COLUMNS.flat:
        j = tile * BLOCK + tl.arange(0, BLOCK)
        return (j // P).to(tl.int64), j % P, j < N * P
    else:
        tiles = tl.cdiv(P, BLOCK)
        p = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
        n = tl.full([BLOCK], tile // tiles, tl.int64)
        return n, p, p < P


@triton.jit
def write_ledger(ledger, log_s, tile, N, P, COLUMNS: tl.constexpr):
    """Store the sum of a tile's log s (channels by columns) in the tile's ledger entry."""
    if COLUMNS.flat:
        j = tile * COLUMNS.block + tl.arange(0, COLUMNS.block)
        tl.store(ledger + j, tl.sum(log_s, axis=0), mask=j < N * P)
    else:
        tl.store(ledger + tile, tl.sum(log_s))


@triton.jit
def read_ledger(dledger, dledger_strides, n, p, valid, COLUMNS: tl.constexpr):
    """For each column, the gradient of the ledger entry that holds its log s."""
    if COLUMNS.flat:
        t = p
    else:
        t = p // COLUMNS.block
    at_t = dledger + n * dledger_strides[0] + t * dledger_strides[1]
    return tl.load(at_t, mask=valid, other=0.0)
