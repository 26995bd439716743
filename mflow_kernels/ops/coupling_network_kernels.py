"""Kernels of `coupling_network`, their tiles and their launches.

Kernels see images in channels_last as rows of pixels, (pixels, C), all samples one after the other.
They take weights as (out, taps, in) in the images' dtype, packed into one tensor. Tiles are chosen
so that none spills on sm_80, sm_90 and sm_100; `benchmarks.reports.static` compiles them.

A loop that uses an operand of a product again has `num_stages=1`. With a pipeline, Triton would
overwrite the operand with the next tile too early.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.launch import launch

# Arguments that depend on the size and number of the images. Triton must not specialize on them.
RUN_TIME = ["PIXELS", "H", "W", "TILES", "NUMBERS"]


@triton.jit
def neighbour(p, tap, H, W, SIGN: tl.constexpr, TAPS: tl.constexpr):
    """The neighbour of pixel p by tap `tap` of a 3x3 convolution, and whether it is in the image.

    With SIGN 1 it is the pixel that the tap reads for the result at p. With SIGN -1 it is the pixel
    whose result reads p through this tap.
    """
    if TAPS == 1:
        return p + 0 * tap, p + 0 * tap >= 0
    else:
        down, right = SIGN * (tap // 3 - 1), SIGN * (tap % 3 - 1)
        row, column = (p // W) % H + down, p % W + right
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        return p + down * W + right, inside


@triton.jit
def load_taps(
    x, p, valid, H, W, C: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr, K: tl.constexpr
):
    """Rows [P, K] with the nine neighbours of each valid pixel p: column tap * C + c."""
    k = tl.arange(0, K)
    tap, c = k // C, k % C
    source, inside = neighbour(p[:, None], tap[None, :], H, W, SIGN, TAPS)
    inside = inside & (tap[None, :] < TAPS) & valid[:, None]
    return tl.load(x + source.to(tl.int64) * C + c[None, :], mask=inside, other=0.0)


@triton.jit
def relu(x):
    """Keeps NaN, as torch's ReLU does; tl.maximum would hide that a network has diverged."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def load_w3(w3, d, C_OUT: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, j):
    """W3 (C_out, taps, width) as [J, D]: row j = tap * C_out + o."""
    tap, o = j // C_OUT, j % C_OUT
    at = w3 + (o * TAPS + tap)[:, None] * WIDTH + d[None, :]
    return tl.load(at, mask=(tap < TAPS)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def load_w3_rows(
    w3, d, j, column, C_OUT: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One column of the taps of W3 (C_out, taps, width), as [D, J] with j = row * C_out + o."""
    row, o = j // C_OUT, j % C_OUT
    tap = row * (TAPS // ROWS) + column
    at = w3 + (o * TAPS + tap)[None, :] * WIDTH + d[:, None]
    return tl.load(at, mask=(row < ROWS)[None, :] & (d < WIDTH)[:, None], other=0.0)


@triton.jit
def from_neighbour(x, p, W, STEP: tl.constexpr, P: tl.constexpr):
    """For each pixel p of a tile x [P, J], the row of the pixel STEP to its right; 0 outside the
    image."""
    if STEP == 0:
        return x
    else:
        source = tl.arange(0, P) + STEP
        column = p % W + STEP
        inside = (column >= 0) & (column < W)
        source = tl.minimum(tl.maximum(source, 0), P - 1)
        moved = tl.gather(x, tl.broadcast_to(source[:, None], x.shape), 0)
        return tl.where(inside[:, None], moved, 0.0)


@triton.jit(do_not_specialize=RUN_TIME)
def _network_kernel(
    x, w1, b1, w2, b2, w3, row_sums, h1, h2, PIXELS, H, W,
    C_IN: tl.constexpr, WIDTH: tl.constexpr, C_OUT: tl.constexpr, TAPS: tl.constexpr,
    HALO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Store the sums over the three taps in each row of W3, for one tile of pixels and one block of
    columns. Store h1 and h2 too if they are given.

    With HALO, the first and the last pixel of a tile belong to the neighbouring tiles; they are
    computed here only for the taps.
    """
    ROWS: tl.constexpr = 3 if TAPS == 9 else 1
    i = tl.arange(0, BLOCK_P)
    p = tl.program_id(0) * (BLOCK_P - 2 * HALO) - HALO + i
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    valid = (p >= 0) & (p < PIXELS)
    own = (valid & (i >= HALO) & (i < BLOCK_P - HALO))[:, None]
    at_hidden = p.to(tl.int64)[:, None] * WIDTH
    x_t = load_taps(x, p, valid, H, W, C_IN, TAPS, 1, BLOCK_X)
    i = tl.arange(0, BLOCK_X)
    sums_t = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h2_t = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for inner in range(0, WIDTH, BLOCK_K):
            k = inner + tl.arange(0, BLOCK_K)
            at_w1 = w1 + k[None, :] * (TAPS * C_IN) + i[:, None]
            w1_t = tl.load(at_w1, mask=(k < WIDTH)[None, :] & (i < TAPS * C_IN)[:, None], other=0.0)
            h1_t = tl.dot(x_t, w1_t)
            h1_t += tl.load(b1 + k, mask=k < WIDTH, other=0.0).to(tl.float32)[None, :]
            h1_t = relu(h1_t).to(x_t.dtype)
            if h1 is not None and (start == 0) & (tl.program_id(1) == 0):
                tl.store(h1 + at_hidden + k[None, :], h1_t, mask=own & (k < WIDTH)[None, :])
            at_w2 = w2 + d[None, :] * WIDTH + k[:, None]
            w2_t = tl.load(at_w2, mask=(d < WIDTH)[None, :] & (k < WIDTH)[:, None], other=0.0)
            h2_t = tl.dot(h1_t, w2_t, h2_t)
        h2_t += tl.load(b2 + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
        h2_r = relu(h2_t).to(x_t.dtype)
        if h2 is not None and tl.program_id(1) == 0:
            tl.store(h2 + at_hidden + d[None, :], h2_r, mask=own & (d < WIDTH)[None, :])
        for column in tl.static_range(TAPS // ROWS):
            w3_t = load_w3_rows(w3, d, j, column, C_OUT, WIDTH, TAPS, ROWS)
            taps_t = tl.dot(h2_r, w3_t)
            sums_t += from_neighbour(taps_t, p, W, column - TAPS // ROWS // 2, BLOCK_P)
    at_sums = row_sums + p.to(tl.int64)[:, None] * (ROWS * C_OUT) + j[None, :]
    tl.store(at_sums, sums_t, mask=own & (j < ROWS * C_OUT)[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def _sum_taps_kernel(
    taps, bias, y, PIXELS, H, W, C: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[p] = bias + the sum over parts and taps of taps[neighbour of p by this tap, part, tap].

    If TAPS is 3, the taps are the middle column of a 3x3 convolution.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < PIXELS)[:, None] & (c < C)[None, :]
    y_t = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tap in tl.static_range(TAPS):
        source, there = neighbour(p, 3 * tap + 1 if TAPS == 3 else tap, H, W, SIGN, TAPS)
        at = taps + source.to(tl.int64)[:, None] * (PARTS * TAPS * C) + tap * C + c[None, :]
        for part in tl.static_range(PARTS):
            at_part = at + part * (TAPS * C)
            y_t += tl.load(at_part, mask=inside & there[:, None], other=0.0).to(tl.float32)
    if bias is not None:
        y_t += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + p.to(tl.int64)[:, None] * C + c[None, :], y_t, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _dh2_kernel(
    dparams, h2, w3, dh2, dw3, db3, db2, NUMBERS, PIXELS, H, W, TILES,
    WIDTH: tl.constexpr, C_OUT: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Compute d h2 of a block of hidden channels, for every `splits`-th tile of pixels.

    Each program also stores partial sums of d W3 (C_out, taps, width), d b3 and d b2, in its own
    row of NUMBERS numbers.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_J)
    w3_t = load_w3(w3, d, C_OUT, WIDTH, TAPS, j)
    dw3_t = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    db3_t = tl.zeros([BLOCK_J], tl.float32)
    db2_t = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(split, TILES, splits):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < PIXELS)[:, None] & (d < WIDTH)[None, :]
        at = p.to(tl.int64)[:, None] * WIDTH + d[None, :]
        g_t = load_taps(dparams, p, p < PIXELS, H, W, C_OUT, TAPS, -1, BLOCK_J)
        h2_t = tl.load(h2 + at, mask=inside, other=0.0)
        dh2_t = tl.dot(g_t, w3_t)
        dh2_t = tl.where(h2_t.to(tl.float32) <= 0.0, 0.0, dh2_t)
        tl.store(dh2 + at, dh2_t, mask=inside)
        dw3_t = tl.dot(tl.trans(g_t), h2_t, dw3_t)
        db3_t += tl.sum(g_t.to(tl.float32), axis=0)
        db2_t += tl.sum(dh2_t, axis=0)
    row = split.to(tl.int64) * NUMBERS
    tap, o = j // C_OUT, j % C_OUT
    at_dw3 = dw3 + row + (o * TAPS + tap)[:, None] * WIDTH + d[None, :]
    tl.store(at_dw3, dw3_t, mask=(tap < TAPS)[:, None] & (d < WIDTH)[None, :])
    tl.store(db2 + row + d, db2_t, mask=d < WIDTH)
    if tl.program_id(1) == 0:
        # The middle tap reads every pixel of params once; the others miss pixels at a border.
        tl.store(db3 + row + o, db3_t, mask=tap == TAPS // 2)


@triton.jit(do_not_specialize=RUN_TIME)
def _dh1_kernel(
    dh2, h1, x, w1, w2, dx_taps, dw2, dw1, db1, NUMBERS, PIXELS, H, W, TILES,
    C_IN: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Compute d h1 of a block of hidden channels, for every `splits`-th tile of pixels.

    Each program stores the products of d h1 with the taps of W1, which are this block's part of
    d x, and partial sums of d W1 (width, taps, C_in) and d b1. If one block of BLOCK_K holds all
    hidden channels of d h2, it also stores partial sums of d W2.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_X)
    k = tl.arange(0, BLOCK_K)
    dw1_t = tl.zeros([BLOCK_D, BLOCK_X], tl.float32)
    db1_t = tl.zeros([BLOCK_D], tl.float32)
    if dw2 is not None:
        dw2_t = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for tile in range(split, TILES, splits):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        hidden = p.to(tl.int64)[:, None] * WIDTH
        inside = (p < PIXELS)[:, None] & (d < WIDTH)[None, :]
        h1_t = tl.load(h1 + hidden + d[None, :], mask=inside, other=0.0)
        dh1_t = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            o = start + k
            there = (p < PIXELS)[:, None] & (o < WIDTH)[None, :]
            dh2_t = tl.load(dh2 + hidden + o[None, :], mask=there, other=0.0)
            at_w2 = w2 + o[:, None] * WIDTH + d[None, :]
            w2_t = tl.load(at_w2, mask=(o < WIDTH)[:, None] & (d < WIDTH)[None, :], other=0.0)
            dh1_t = tl.dot(dh2_t, w2_t, dh1_t)
            if dw2 is not None:
                dw2_t = tl.dot(tl.trans(dh2_t), h1_t, dw2_t)
        dh1_t = tl.where(h1_t.to(tl.float32) <= 0.0, 0.0, dh1_t)
        db1_t += tl.sum(dh1_t, axis=0)
        dh1_r = dh1_t.to(h1_t.dtype)
        x_t = load_taps(x, p, p < PIXELS, H, W, C_IN, TAPS, 1, BLOCK_X)
        dw1_t = tl.dot(tl.trans(dh1_r), x_t, dw1_t)
        at_w1 = w1 + d[:, None] * (TAPS * C_IN) + i[None, :]
        w1_t = tl.load(at_w1, mask=(d < WIDTH)[:, None] & (i < TAPS * C_IN)[None, :], other=0.0)
        dx_t = tl.dot(dh1_r, w1_t)
        part = p.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        at_dx = dx_taps + part[:, None] * (TAPS * C_IN) + i[None, :]
        tl.store(at_dx, dx_t, mask=(p < PIXELS)[:, None] & (i < TAPS * C_IN)[None, :])
    row = split.to(tl.int64) * NUMBERS
    at_dw1 = dw1 + row + d[:, None] * (TAPS * C_IN) + i[None, :]
    tl.store(at_dw1, dw1_t, mask=(d < WIDTH)[:, None] & (i < TAPS * C_IN)[None, :])
    tl.store(db1 + row + d, db1_t, mask=d < WIDTH)
    if dw2 is not None:
        at_dw2 = dw2 + row + k[:, None] * WIDTH + d[None, :]
        tl.store(at_dw2, dw2_t, mask=(k < WIDTH)[:, None] & (d < WIDTH)[None, :])


class Shape(NamedTuple):
    """Sizes of a network and of the images that it works on."""

    pixels: int  # of all samples
    height: int
    image_width: int
    c_in: int
    c_out: int
    width: int  # hidden channels
    taps: int  # 9 for a 3x3 convolution, 1 for a linear layer

    @classmethod
    def of(cls, x: Tensor, width: int, c_out: int) -> "Shape":
        height, image_width = x.shape[2:] if x.dim() == 4 else (1, 1)
        pixels = x.shape[0] * height * image_width
        return cls(pixels, height, image_width, x.shape[1], c_out, width, 9 if x.dim() == 4 else 1)

    @property
    def tap_rows(self) -> int:
        """Rows of taps of a convolution."""
        return 3 if self.taps == 9 else 1

    @property
    def weights(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes of the weights as the kernels read them: (out, taps, in)."""
        return (
            (self.width, self.taps, self.c_in),
            (self.width, 1, self.width),
            (self.c_out, self.taps, self.width),
        )

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The weights W1, W2 and W3, (out, taps, in), as views of one tensor."""
        return self.shaped(packed.split([math.prod(shape) for shape in self.weights]))

    @property
    def sums(self) -> list[int]:
        """Sizes of the sums over pixels: d W1, d W2 (0 if no kernel computes it), d W3, d b1, d b2,
        d b3."""
        w1, w2, w3 = map(math.prod, self.weights)
        return [w1, w2 if self.width <= DW2_WIDTH else 0, w3, self.width, self.width, self.c_out]

    def shaped(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [w.view(shape) for w, shape in zip(weights, self.weights, strict=True)]

    def layers(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights (out, taps, in) with the axes that torch's layers have."""
        if self.taps == 1:
            return [w[:, 0] for w in weights]
        sides = zip(weights, (3, 1, 3), strict=True)
        return [w.unflatten(1, (side, side)).permute(0, 3, 1, 2) for w, side in sides]


def pack(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Pack the weights into one tensor of x's dtype, for `Shape.unpack`.

    This takes one launch if the weights of convolutions are in channels_last.
    """
    s = Shape.of(x, len(w1), len(w3))
    packed = x.new_empty(sum(w.numel() for w in (w1, w2, w3)))
    torch._foreach_copy_(s.layers(s.unpack(packed)), [w1, w2, w3])
    return packed


def empty_images(x: Tensor, channels: int) -> Tensor:
    """An empty tensor in channels_last, shaped like x except for the number of channels."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def rows(x: Tensor) -> Tensor:
    """Dense images as (pixels, channels)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _block(n: int, most: int = 1024) -> int:
    return min(most, max(16, triton.next_power_of_2(n)))


class Tile(NamedTuple):
    """Blocks of a launch: pixels, hidden channels of the result, hidden channels summed over,
    columns of taps; and its warps."""

    block_p: int
    block_d: int
    block_k: int
    block_j: int
    warps: int


# Up to this width a program has room for its columns of d W2; for wider networks a matrix product
# computes it, which reads d h2 and h1 once more.
DW2_WIDTH = 128


def forward_tile(s: Shape) -> Tile:
    columns = _block(s.tap_rows * s.c_out, 256)
    if s.width <= 128:
        block_d = _block(s.width)
        if columns > 64:
            return Tile(32 if columns > 128 else 64, block_d, 32, columns, 8)
        if columns > 32:  # 8 warps spill on sm_100
            return Tile(64, block_d, 32, columns, 4)
        return Tile(64, block_d, 64, columns, 8)
    if columns > 64:
        return Tile(32, 64 if columns > 128 else 128, 32, columns, 8)
    return Tile(64, 256, 64, columns, 8) if s.width <= 256 else Tile(64, 128, 32, columns, 8)


def halo(s: Shape, block_p: int) -> int:
    """Number of pixels at each end of a forward tile that belong to the neighbouring tiles.

    It is 0 if tiles consist of whole rows of the image.
    """
    return int(s.taps > 1 and block_p % s.image_width > 0)


def dh2_tile(s: Shape) -> Tile:
    block_j = _block(s.taps * s.c_out)
    return Tile(
        32 if block_j <= 128 else 16, _block(s.width, 64 if block_j <= 256 else 32), 0, block_j, 8
    )


def dh1_tile(s: Shape) -> Tile:
    block_k, block_x = _block(s.width, DW2_WIDTH), _block(s.taps * s.c_in)
    if s.width > DW2_WIDTH:
        return Tile(32, 128 if block_x <= 128 else 64, block_k, 0, 8)
    # Addresses of rows that start at a multiple of 16 bytes take fewer registers.
    fits_64 = block_x <= 128 or s.c_in % 8 == 0
    block_d = 128 if block_x <= 64 else 64 if fits_64 else 32
    return Tile(16, _block(s.width, block_d), block_k, 0, 8)


def launch_network(
    x: Tensor, packed: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Two launches: params and, if `keep`, h1 and h2."""
    s = Shape.of(x, len(b1), len(b3))
    w1, w2, w3 = s.unpack(packed)
    row_sums = empty_images(x, s.tap_rows * s.c_out)
    h1, h2 = (empty_images(x, s.width) if keep else None for _ in range(2))
    tile = forward_tile(s)
    edge = halo(s, tile.block_p)
    tiles = triton.cdiv(s.pixels, tile.block_p - 2 * edge)
    launch(_network_kernel, (tiles, triton.cdiv(s.tap_rows * s.c_out, tile.block_j)),
        x, w1, b1, w2, b2, w3, row_sums, h1, h2, s.pixels, s.height, s.image_width,
        C_IN=s.c_in, WIDTH=s.width, C_OUT=s.c_out, TAPS=s.taps, HALO=edge,
        BLOCK_P=tile.block_p, BLOCK_X=_block(s.taps * s.c_in), BLOCK_D=tile.block_d,
        BLOCK_K=tile.block_k, BLOCK_J=tile.block_j, num_warps=tile.warps,
    )  # fmt: skip
    return launch_sum_taps(row_sums, b3, x, s, s.c_out, s.tap_rows, 1, 1), h1, h2


def launch_sum_taps(
    taps: Tensor, bias: Tensor | None, x: Tensor, s: Shape, channels: int, count: int, sign: int,
    parts: int,
) -> Tensor:  # fmt: skip
    """One launch: the sum of each pixel's taps, (N, channels, *spatial)."""
    y = empty_images(x, channels)
    block_c = _block(channels, 64)
    block_p = 1024 // block_c
    launch(_sum_taps_kernel, (triton.cdiv(s.pixels, block_p), triton.cdiv(channels, block_c)),
        taps, bias, y, s.pixels, s.height, s.image_width, C=channels, TAPS=count, SIGN=sign,
        PARTS=parts, BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return y


PROGRAMS = 264  # programs of a launch that sums over pixels: two per multiprocessor (H100)


def launch_network_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches and one reduction of their partial sums; see `network_backward`."""
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    w1, w2, w3 = s.unpack(packed)
    sizes, numbers = s.sums, sum(s.sums)
    tile2, tile1 = dh2_tile(s), dh1_tile(s)
    blocks2, blocks1 = (triton.cdiv(s.width, tile.block_d) for tile in (tile2, tile1))
    tiles2, tiles1 = (triton.cdiv(s.pixels, tile.block_p) for tile in (tile2, tile1))
    # Partial sums take at most a quarter of the bytes of one hidden tensor.
    affordable = h1.nbytes // (4 * 4 * numbers)
    splits = max(1, min(tiles2, tiles1, PROGRAMS // min(blocks2, blocks1), affordable))
    partial = x.new_empty((splits, numbers), dtype=torch.float32)
    dw1, dw2, dw3, db1, db2, db3 = partial.split(sizes, dim=1)
    dh2 = torch.empty_like(h2)
    dx_taps = empty_images(x, blocks1 * s.taps * s.c_in)
    images = s.pixels, s.height, s.image_width
    launch(_dh2_kernel, (splits, blocks2),
        dparams, h2, w3, dh2, dw3, db3, db2, numbers, *images, tiles2,
        WIDTH=s.width, C_OUT=s.c_out, TAPS=s.taps, BLOCK_P=tile2.block_p,
        BLOCK_D=tile2.block_d, BLOCK_J=tile2.block_j, num_warps=tile2.warps, num_stages=1,
    )  # fmt: skip
    launch(_dh1_kernel, (splits, blocks1),
        dh2, h1, x, w1, w2, dx_taps, dw2 if s.sums[1] else None, dw1, db1, numbers, *images,
        tiles1,
        C_IN=s.c_in, WIDTH=s.width, TAPS=s.taps, BLOCK_P=tile1.block_p,
        BLOCK_D=tile1.block_d, BLOCK_K=tile1.block_k, BLOCK_X=_block(s.taps * s.c_in),
        num_warps=tile1.warps, num_stages=1,
    )  # fmt: skip
    dx = launch_sum_taps(dx_taps, None, x, s, s.c_in, s.taps, -1, blocks1)
    if s.sums[1]:
        return dx, partial.sum(0), partial.new_empty(0)
    return dx, partial.sum(0), product_in_float32(rows(dh2).t(), rows(h1))


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16-bit factors, not rounded to 16 bits."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
