r"""The coupling network of Glow as one operator: 3x3, 1x1 and 3x3 convolutions with ReLU between.

    h1 = relu(W1 * x + b1),   h2 = relu(W2 h1 + b2),   params = W3 * h2 + b3

where * is a 3x3 convolution with zero padding (Glow, arXiv 1807.03039, section 4). With TAPS = 1 in
place of 9 all three are linear layers on vectors (N, C).

The forward launch keeps h1 and h2 on the chip. It multiplies h2 of a pixel by all nine taps of W3
and writes the products, `taps` (pixels, 9 * C_out); a second launch adds each pixel's nine taps
from its neighbours. A hidden tensor H has `width` numbers a pixel; for narrow states `taps` has
fewer. The backward pass needs h1 and h2: the forward launch stores them where gradients will be
asked for.

Gradients, with g = d loss / d params:
    d h2 = [h2 > 0] (W3^T * g),   d h1 = [h1 > 0] (W2^T d h2),   d x = W1^T * d h1
    d W3, d W2, d W1, d b3, d b2, d b1: sums over pixels of products of the above

One launch computes d h2, another d h1 and its product with the taps of W1; each also computes the
gradients of the weights whose operands are on the chip then, as partial sums that one reduction
adds in a fixed order: the same bits on every run. A third launch adds the taps of d x.

Shapes: x (N, C_in, H, W) and params (N, C_out, H, W) in channels_last, or (N, C); weights as
torch.nn.Conv2d and torch.nn.Linear have them.
dtypes: the kernels take bfloat16 and float16. Products are summed in float32; `taps` and the hidden
tensors have x's dtype. Tiles of float32 numbers do not fit the shared memory: the reference
computes those networks.
Bytes at least, in hidden tensors H: forward none, or 2 H written where gradients will be asked for;
backward h2 read, d h2 written, d h2 and h1 read: 4 H, and 2 H more past DW2_WIDTH. cuDNN's
convolutions, each with a pass for its bias and one for ReLU, take 12 H and 16 H.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mflow_kernels.ops.fastest import fused_is_faster, requested
from mflow_kernels.ops.launch import (
    accumulator,
    launch,
    transformed,
    uses_triton,
    without_autocast,
)
from mflow_kernels.ops.registration import register


def coupling_network_ref(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """params, h1 and h2."""
    h1 = _layer(x, w1, b1).relu_()
    h2 = _layer(h1, w2, b2).relu_()
    return _layer(h2, w3, b3), h1, h2


def coupling_network_backward_ref(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> tuple[Tensor, ...]:
    """d x, d W1, d b1, d W2, d b2, d W3, d b3."""
    dh2, dw3, db3 = _layer_backward(dparams, h2, w3)
    dh1, dw2, db2 = _layer_backward(dh2.masked_fill_(h2 <= 0, 0), h1, w2)
    dx, dw1, db1 = _layer_backward(dh1.masked_fill_(h1 <= 0, 0), x, w1)
    return dx, dw1, db1, dw2, db2, dw3, db3


def _layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b) if x.dim() == 2 else F.conv2d(x, w, b, padding=w.shape[2] // 2)


def _layer_backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() == 2:
        return dy @ w, dy.t() @ x, dy.sum(0)
    padding = [w.shape[2] // 2] * 2
    return torch.ops.aten.convolution_backward(
        dy, x, w, [len(w)], [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, True]
    )


# Arguments that follow the images' size and number: Triton compiles for no value of theirs.
RUN_TIME = ["PIXELS", "H", "W", "TILES", "NUMBERS"]


@triton.jit
def neighbour(p, tap, H, W, SIGN: tl.constexpr, TAPS: tl.constexpr):
    """The pixel that tap `tap` of a 3x3 convolution reads at pixel p (SIGN 1), or the pixel whose
    result reads p by this tap (SIGN -1); and whether it lies in the same image."""
    if TAPS == 1:
        return p + 0 * tap, p + 0 * tap >= 0
    else:
        down, right = SIGN * (tap // 3 - 1), SIGN * (tap % 3 - 1)
        row, column = (p // W) % H + down, p % W + right
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        return p + down * W + right, inside


@triton.jit
def load_taps(
    x, p, PIXELS, H, W, C: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr, K: tl.constexpr
):
    """The nine neighbours of pixels p as rows: [P, K], column tap * C + c."""
    k = tl.arange(0, K)
    tap, c = k // C, k % C
    source, inside = neighbour(p[:, None], tap[None, :], H, W, SIGN, TAPS)
    inside = inside & (tap[None, :] < TAPS) & (p[:, None] < PIXELS)
    return tl.load(x + source.to(tl.int64) * C + c[None, :], mask=inside, other=0.0)


@triton.jit
def relu(x):
    """As torch's, which keeps NaN; tl.maximum would hide that a network has diverged."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def load_w3(w3, d, C_OUT: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, j):
    """W3 (C_out, taps, width) as [J, D]: row j = tap * C_out + o."""
    tap, o = j // C_OUT, j % C_OUT
    at = w3 + (o * TAPS + tap)[:, None] * WIDTH + d[None, :]
    return tl.load(at, mask=(tap < TAPS)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=RUN_TIME)
def _network_kernel(
    x, w1, b1, w2, b2, w3, taps, h1, h2, PIXELS, H, W,
    C_IN: tl.constexpr, WIDTH: tl.constexpr, C_OUT: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """taps of one tile of pixels and one block of columns; h1 and h2 too where they are given."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    valid = (p < PIXELS)[:, None]
    at_hidden = p.to(tl.int64)[:, None] * WIDTH
    x_t = load_taps(x, p, PIXELS, H, W, C_IN, TAPS, 1, BLOCK_X)
    i = tl.arange(0, BLOCK_X)
    taps_t = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
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
                tl.store(h1 + at_hidden + k[None, :], h1_t, mask=valid & (k < WIDTH)[None, :])
            at_w2 = w2 + d[None, :] * WIDTH + k[:, None]
            w2_t = tl.load(at_w2, mask=(d < WIDTH)[None, :] & (k < WIDTH)[:, None], other=0.0)
            h2_t = tl.dot(h1_t, w2_t, h2_t)
        h2_t += tl.load(b2 + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
        h2_r = relu(h2_t).to(x_t.dtype)
        if h2 is not None and tl.program_id(1) == 0:
            tl.store(h2 + at_hidden + d[None, :], h2_r, mask=valid & (d < WIDTH)[None, :])
        w3_t = tl.trans(load_w3(w3, d, C_OUT, WIDTH, TAPS, j))
        taps_t = tl.dot(h2_r, w3_t, taps_t)
    at_taps = taps + p.to(tl.int64)[:, None] * (TAPS * C_OUT) + j[None, :]
    tl.store(at_taps, taps_t, mask=valid & (j < TAPS * C_OUT)[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def _sum_taps_kernel(
    taps, bias, y, PIXELS, H, W, C: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[p] = bias + the sum over parts and taps of taps[neighbour of p by this tap, part, tap]."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < PIXELS)[:, None] & (c < C)[None, :]
    y_t = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tap in tl.static_range(TAPS):
        source, there = neighbour(p, tap, H, W, SIGN, TAPS)
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
    """d h2 of a block of hidden channels, over every `splits`-th tile of pixels, and this program's
    partial sums of d W3 (C_out, taps, width), d b3 and d b2, in its row of NUMBERS numbers."""
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
        g_t = load_taps(dparams, p, PIXELS, H, W, C_OUT, TAPS, -1, BLOCK_J)
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
        # The middle tap reads every pixel of params once; the others miss those at a border.
        tl.store(db3 + row + o, db3_t, mask=tap == TAPS // 2)


@triton.jit(do_not_specialize=RUN_TIME)
def _dh1_kernel(
    dh2, h1, x, w1, w2, dx_taps, dw2, dw1, db1, NUMBERS, PIXELS, H, W, TILES,
    C_IN: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """d h1 of a block of hidden channels, over every `splits`-th tile of pixels; its products with
    the taps of W1, which are this block's part of d x; and this program's partial sums of d W1
    (width, taps, C_in), d b1 and, where one block of BLOCK_K holds all hidden channels of d h2,
    d W2."""
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
        x_t = load_taps(x, p, PIXELS, H, W, C_IN, TAPS, 1, BLOCK_X)
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
    taps: int  # 9 of a 3x3 convolution, 1 of a linear layer

    @classmethod
    def of(cls, x: Tensor, width: int, c_out: int) -> "Shape":
        height, image_width = x.shape[2:] if x.dim() == 4 else (1, 1)
        pixels = x.shape[0] * height * image_width
        return cls(pixels, height, image_width, x.shape[1], c_out, width, 9 if x.dim() == 4 else 1)

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
        """Numbers in the sums over pixels: d W1, d W2 if in a kernel, d W3, d b1, d b2, d b3."""
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
    """The weights in x's dtype, as `Shape.unpack` finds them. One launch where those of
    convolutions are in channels_last."""
    s = Shape.of(x, len(w1), len(w3))
    packed = x.new_empty(sum(w.numel() for w in (w1, w2, w3)))
    torch._foreach_copy_(s.layers(s.unpack(packed)), [w1, w2, w3])
    return packed


def empty_images(x: Tensor, channels: int) -> Tensor:
    """Empty, shaped as x but for its channels, in channels_last."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _rows(x: Tensor) -> Tensor:
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
    columns = _block(s.taps * s.c_out)
    if s.width <= 128:
        return Tile(64, _block(s.width), 64 if columns <= 256 else 32, min(columns, 512), 8)
    block_d = 256 if columns <= 128 and s.width <= 256 else 128
    if columns > 256:
        return Tile(32, block_d, 32, 256, 8)
    return Tile(64, block_d, 64, columns, 8)


def dh2_tile(s: Shape) -> Tile:
    block_j = _block(s.taps * s.c_out)
    return Tile(
        32 if block_j <= 128 else 16, _block(s.width, 64 if block_j <= 256 else 32), 0, block_j, 8
    )


def dh1_tile(s: Shape) -> Tile:
    block_k, block_x = _block(s.width, DW2_WIDTH), _block(s.taps * s.c_in)
    if s.width > DW2_WIDTH:
        return Tile(32, 128 if block_x <= 128 else 64, block_k, 0, 8)
    return Tile(16, _block(s.width, 128 if block_x <= 64 else 64), block_k, 0, 8)


def launch_network(
    x: Tensor, packed: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Two launches: params, and h1 and h2 where `keep`."""
    s = Shape.of(x, len(b1), len(b3))
    w1, w2, w3 = s.unpack(packed)
    taps = empty_images(x, s.taps * s.c_out)
    h1, h2 = (empty_images(x, s.width) if keep else None for _ in range(2))
    tile = forward_tile(s)
    launch(_network_kernel,
        (triton.cdiv(s.pixels, tile.block_p), triton.cdiv(s.taps * s.c_out, tile.block_j)),
        x, w1, b1, w2, b2, w3, taps, h1, h2, s.pixels, s.height, s.image_width,
        C_IN=s.c_in, WIDTH=s.width, C_OUT=s.c_out, TAPS=s.taps,
        BLOCK_P=tile.block_p, BLOCK_X=_block(s.taps * s.c_in), BLOCK_D=tile.block_d,
        BLOCK_K=tile.block_k, BLOCK_J=tile.block_j, num_warps=tile.warps,
    )  # fmt: skip
    return launch_sum_taps(taps, b3, x, s, s.c_out, 1, 1), h1, h2


def launch_sum_taps(
    taps: Tensor, bias: Tensor | None, x: Tensor, s: Shape, channels: int, sign: int, parts: int
) -> Tensor:
    """One launch: the sum of each pixel's taps, shaped as x but for its channels."""
    y = empty_images(x, channels)
    block_c = _block(channels, 64)
    block_p = 1024 // block_c
    launch(_sum_taps_kernel, (triton.cdiv(s.pixels, block_p), triton.cdiv(channels, block_c)),
        taps, bias, y, s.pixels, s.height, s.image_width, C=channels, TAPS=s.taps, SIGN=sign,
        PARTS=parts, BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return y


PROGRAMS = 264  # of a launch that sums over pixels: two for each multiprocessor of an H100


def launch_network_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches and one sum of the partial sums: see `network_backward`."""
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
    dx = launch_sum_taps(dx_taps, None, x, s, s.c_in, -1, blocks1)
    if s.sums[1]:
        return dx, partial.sum(0), partial.new_empty(0)
    return dx, partial.sum(0), product_in_float32(_rows(dh2).t(), _rows(h1))


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16-bit factors, not rounded to 16 bits."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def supports(x: Tensor, w1: Tensor, w3: Tensor) -> bool:
    """Whether the kernels compute this network on the input x: in 16 bits, with a width of 16 to
    1,024, for images with at most 56 channels."""
    if not _by_kernels(x) or x.dim() not in (2, 4) or not x.numel():
        return False
    taps = 9 if x.dim() == 4 else 1
    return taps * w3.shape[0] <= 512 and taps * w1.shape[1] <= 256 and 16 <= len(w1) <= 1024


def prefers_fused(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether to compute this network by `coupling_network` and not by torch's own layers.

    By default the faster one in training on this card, measured at first use; $MFLOW_NETWORK, as
    "torch" or "fused", decides otherwise. One choice serves all directions: a reversible chain runs
    a network in its forward pass and again in its backward pass, and must get the same bits. A
    compiler fuses torch's layers itself: it gets them unless $MFLOW_NETWORK is "fused".
    """
    choice = requested()
    if torch.compiler.is_compiling():
        return choice == "fused"
    if choice != "auto" or not x.is_cuda:
        return choice != "torch"
    s = Shape.of(x, len(weights[0]), len(weights[4]))
    pixels = 1 << max(s.pixels - 1, 1).bit_length()  # one choice for batches of similar size
    key = f"{x.dtype}, {s.c_in}-{s.width}-{s.c_out}, {s.taps} taps, {pixels} pixels"
    return fused_is_faster(
        key,
        partial(_train, coupling_network, x, weights),
        partial(_train, lambda *given: coupling_network_ref(*given)[0], x, weights),
        x.device,
    )


def _train(run: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> None:
    """What one network does in a reversible training step."""
    x, *lowered = (t.detach().to(x.dtype).requires_grad_() for t in (x, *weights))
    with without_autocast(x):
        with torch.no_grad():
            run(x, *lowered)
        with torch.enable_grad():
            params = run(x, *lowered)
            torch.autograd.grad(params, (x, *lowered), torch.ones_like(params))


def _by_kernels(x: Tensor) -> bool:
    """Whether kernels compute a network of x; else the reference does. Tiles of float32 numbers do
    not fit the shared memory."""
    return uses_triton(x) and x.dtype in (torch.bfloat16, torch.float16)


def _dense(x: Tensor) -> Tensor:
    """x with its channels contiguous at each pixel."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def network_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """params; h1 and h2 where `keep`, else empty; and the weights as the kernels read them."""
    x = _dense(x)
    packed = pack(x, w1, w2, w3)
    if _by_kernels(x):
        params, h1, h2 = launch_network(x, packed, b1, b2, b3, keep)
    else:
        s = Shape.of(x, len(w1), len(w3))
        v1, v2, v3 = s.layers(s.unpack(packed))
        c1, c2, c3 = (b.to(x.dtype) for b in (b1, b2, b3))
        params, h1, h2 = map(_dense, coupling_network_ref(x, v1, c1, v2, c2, v3, c3))
    if h1 is None or h2 is None or not keep:
        h1, h2 = x.new_empty(0), x.new_empty(0)
    return params, h1, h2, packed


def network_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d x; the gradients that `Shape.sums` lists, one after the other; and d W2, empty if it is
    among those. Sums are in float32 (float64)."""
    x, dparams = _dense(x), _dense(dparams.to(x.dtype))
    with without_autocast(x):
        if _by_kernels(x):
            return launch_network_backward(dparams, x, h1, h2, packed)
        s = Shape.of(x, h1.shape[1], dparams.shape[1])
        weights = s.layers(s.unpack(packed))
        dx, dw1, db1, dw2, db2, dw3, db3 = coupling_network_backward_ref(
            dparams, x, h1, h2, *weights
        )
        apart = x.new_empty(0)
        if not s.sums[1]:
            dw2, apart = apart, _rows(dw2)
        sums = [*(_rows(dw).flatten() for dw in (dw1, dw2, dw3)), db1, db2, db3]
    wide = accumulator(x.dtype)
    return _dense(dx), torch.cat(sums).to(wide), apart.to(wide, copy=True)


def _fake(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    h1, h2 = (empty_images(x, len(w1)) if keep else x.new_empty(0) for _ in range(2))
    packed = x.new_empty(w1.numel() + w2.numel() + w3.numel())
    return empty_images(x, len(w3)), h1, h2, packed


def _fake_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    apart = 0 if s.sums[1] else (s.width, s.width)
    sums, dw2 = (x.new_empty(n, dtype=accumulator(x.dtype)) for n in (sum(s.sums), apart))
    return empty_images(x, s.c_in), sums, dw2


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, _ = inputs
    _, *kept = output
    ctx.dtypes = [p.dtype for p in parameters]
    ctx.save_for_backward(x, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # or autograd fills gradients of h1 and h2 with zeros


def _gradient(ctx: Any, dparams: Tensor | None, *_: Any, run: Any) -> tuple[Tensor | None, ...]:
    if dparams is None:
        return (None,) * 8
    x, h1, *_ = ctx.saved_tensors
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    dx, sums, apart = run(dparams, *ctx.saved_tensors)
    dw1, dw2, dw3, db1, db2, db3 = sums.split(s.sums)
    dw1, dw2, dw3 = s.layers(s.shaped([dw1, dw2 if s.sums[1] else apart, dw3]))
    gradients = zip((dw1, db1, dw2, db2, dw3, db3), ctx.dtypes, strict=True)
    return dx, *(g.to(dtype) for g, dtype in gradients), None


coupling_network_op, network_eager = register(
    "coupling_network",
    network_forward,
    network_backward,
    fake=_fake,
    fake_backward=_fake_backward,
    setup=_setup,
    gradient=_gradient,
)


def coupling_network(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> Tensor:
    """Glow's coupling network (arXiv 1807.03039, section 4), forward and backward in few launches.

    Args:
        x: (N, C_in, H, W), best in channels_last, or (N, C_in). Kernels compute it in bfloat16 and
            float16, torch's layers in float32 and float64.
        w1, b1: (width, C_in, 3, 3), or (width, C_in) for vectors, and (width,).
        w2, b2: (width, width, 1, 1) or (width, width), and (width,).
        w3, b3: (C_out, width, 3, 3) or (C_out, width), and (C_out,). Weights may be wider than x,
            as under autocast; they are rounded to its dtype, and their gradients are not.

    Returns:
        params (N, C_out, *spatial) in x's dtype.
    """
    given = (x, w1, b1, w2, b2, w3, b3)
    if transformed():
        return coupling_network_ref(*given)[0]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if torch.compiler.is_compiling():
        run = coupling_network_op
    else:
        run = network_eager if keep else network_forward
    return cast(Tensor, run(*given, keep)[0])
