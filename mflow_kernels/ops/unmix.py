r"""Un-mixing: backward through the 1x1 convolution of a step of flow that stored nothing.

The second launch of a step's way back, after `uncouple` and the network's own backward, which gave
a gradient dnet of y_a. With y = W x + bias and dy = (dy_a + dnet, dy_b),

    x = W^-1 (y - bias),   dx = W^T dy
    gram = sum over samples and pixels of dy (y - bias)^T,   d bias = sum of dy

and x_a, the input of the network before, in its dtype. dW = sum dy x^T = gram W^-T is C x C work,
left to the caller for all steps at once, in float64. Where the state before was kept x is not
rebuilt; gram is the same. Swap W and W^-1 to walk back through an inverse (sampling) chain. The
halves of y and dy are tensors of their own, as `uncouple` leaves them.

Shapes: states (N, C, *spatial), C_a = C // 2, C_b = C - C_a. dtypes: as `conv1x1`.
Bytes at least, in states: 2 (and dnet) read, 2 (and the network input) written. Up to C = 64 one
program does all three products of its pixels; past that, where arithmetic sets the pace, they do
not fit its registers: gram has programs of its own, which read y and dy once more, and each block
of 128 output channels reads its input again.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mflow_kernels.ops import _native
from mflow_kernels.ops._launch import (
    accumulator,
    columns,
    cut_net_input,
    dense_pixels,
    net_input,
    pixels,
    strides,
    tile_columns,
    uses_triton,
    without_autocast,
)
from mflow_kernels.ops._products import arithmetic

Halves = tuple[Tensor, Tensor]


class Unmixed(NamedTuple):
    """What the launch leaves: x (None where y was kept), dx, the network input x_a, and
    partial sums (splits, C, C) of gram and (splits, C) of d bias."""

    x: Tensor | None
    dx: Tensor
    net: Tensor | None
    gram: Tensor
    dbias: Tensor


def unmix_ref(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
) -> Unmixed:
    dtype, c = accumulator(y[1].dtype), weight.shape[0]
    shifted = torch.cat(y, dim=1).to(dtype)
    gradient = torch.cat(dy, dim=1).to(dtype)
    if dnet is not None:
        gradient[:, : c // 2] += dnet
    columns = [t.movedim(1, -1).reshape(-1, c) for t in (shifted, gradient)]
    y_p, dy_p = columns[0] - bias, columns[1]

    def state(rows: Tensor) -> Tensor:
        n, *spatial = y[1].shape[:1] + y[1].shape[2:]
        whole = rows.view(n, *spatial, c).movedim(-1, 1).to(y[1].dtype)
        return whole if channels_last or not spatial else whole.contiguous()

    with without_autocast(shifted):
        dx = state(dy_p @ weight)
        gram, dbias = (dy_p.t() @ y_p)[None], dy_p.sum(0)[None]
        if weight_inverse is None:
            return Unmixed(None, dx, None, gram, dbias)
        x = state(y_p @ weight_inverse.t())
    net = None if net_dtype is None else cut_net_input(x, net_dtype)
    return Unmixed(x, dx, net, gram, dbias)


@triton.jit
def _unmix_kernel(
    y_a, y_b, dy_a, dnet, dy_b, weight, weight_inverse, bias, x, dx, net, gram, dbias,
    N, P: tl.constexpr, TILES,
    y_a_n: tl.constexpr, y_a_c: tl.constexpr, y_a_p: tl.constexpr,
    y_b_n: tl.constexpr, y_b_c: tl.constexpr, y_b_p: tl.constexpr,
    dy_a_n: tl.constexpr, dy_a_c: tl.constexpr, dy_a_p: tl.constexpr,
    dnet_n: tl.constexpr, dnet_c: tl.constexpr, dnet_p: tl.constexpr,
    dy_b_n: tl.constexpr, dy_b_c: tl.constexpr, dy_b_p: tl.constexpr,
    x_n: tl.constexpr, x_c: tl.constexpr, x_p: tl.constexpr,
    dx_n: tl.constexpr, dx_c: tl.constexpr, dx_p: tl.constexpr,
    net_n: tl.constexpr, net_c: tl.constexpr, net_p: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, MIXERS: tl.constexpr,
    GRAM_BLOCKS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The first MIXERS programs of axis 1 each give BLOCK_O channels of x and dx; where they see
    all channels at once (one mixer, one block of input channels) they form gram on the way, else
    the programs after them do."""
    program, programs, role = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    if role < MIXERS:
        o = role * BLOCK_O + tl.arange(0, BLOCK_O)
        if GRAM_BLOCKS == 0:
            gram_t = tl.zeros([BLOCK_O, BLOCK_C], DTYPE)
            dbias_t = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
        for tile in range(program, TILES, programs):
            n, p, valid = columns(tile, N, P, BLOCK_P, FLAT)
            x_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
            dx_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                at_w = weight + c[None, :] * C + o[:, None]
                inside = (o[:, None] < C) & (c[None, :] < C)
                w_t = tl.load(at_w, mask=inside, other=0.0)
                dy_t = _load_gradient_halves(
                    dy_a, dnet, dy_b, n, c, p, valid, C, dy_a_n, dy_a_c, dy_a_p,
                    dnet_n, dnet_c, dnet_p, dy_b_n, dy_b_c, dy_b_p, DTYPE,
                )  # fmt: skip
                dx_t = tl.dot(w_t, dy_t, dx_t, input_precision=PRECISION, out_dtype=DTYPE)
                if (x is not None) or (GRAM_BLOCKS == 0):
                    y_t = _load_shifted_halves(
                        y_a, y_b, bias, n, c, p, valid, C, y_a_n, y_a_c, y_a_p,
                        y_b_n, y_b_c, y_b_p, DTYPE,
                    )  # fmt: skip
                if x is not None:
                    at_w = weight_inverse + o[:, None] * C + c[None, :]
                    w_t = tl.load(at_w, mask=inside, other=0.0)
                    x_t = tl.dot(w_t, y_t, x_t, input_precision=PRECISION, out_dtype=DTYPE)
                if GRAM_BLOCKS == 0:
                    gram_t = tl.dot(
                        dy_t, tl.trans(y_t), gram_t, input_precision=PRECISION, out_dtype=DTYPE
                    )
                    dbias_t += dy_t
            inside = (o[:, None] < C) & valid[None, :]
            tl.store(dx + n[None, :] * dx_n + o[:, None] * dx_c + p[None, :] * dx_p, dx_t, inside)
            if x is not None:
                tl.store(x + n[None, :] * x_n + o[:, None] * x_c + p[None, :] * x_p, x_t, inside)
            if net is not None:
                is_a = (o[:, None] < C // 2) & valid[None, :]
                at_net = net + n[None, :] * net_n + o[:, None] * net_c + p[None, :] * net_p
                tl.store(at_net, x_t, is_a)
        if GRAM_BLOCKS == 0:
            _store_gram(gram, dbias, gram_t, dbias_t, program, o, o, C)
    elif GRAM_BLOCKS != 0:
        block = role - MIXERS
        o = (block // GRAM_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        c = (block % GRAM_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        gram_t = tl.zeros([BLOCK_O, BLOCK_O], DTYPE)
        dbias_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
        for tile in range(program, TILES, programs):
            n, p, valid = columns(tile, N, P, BLOCK_P, FLAT)
            dy_t = _load_gradient_halves(
                dy_a, dnet, dy_b, n, o, p, valid, C, dy_a_n, dy_a_c, dy_a_p,
                dnet_n, dnet_c, dnet_p, dy_b_n, dy_b_c, dy_b_p, DTYPE,
            )  # fmt: skip
            y_t = _load_shifted_halves(
                y_a, y_b, bias, n, c, p, valid, C, y_a_n, y_a_c, y_a_p,
                y_b_n, y_b_c, y_b_p, DTYPE,
            )  # fmt: skip
            gram_t = tl.dot(dy_t, tl.trans(y_t), gram_t, input_precision=PRECISION, out_dtype=DTYPE)
            dbias_t += dy_t
        # Programs of one block of rows sum the same dy: they store the same d bias.
        _store_gram(gram, dbias, gram_t, dbias_t, program, o, c, C)


@triton.jit
def _load_gradient_halves(
    dy_a, dnet, dy_b, n, c, p, valid, C: tl.constexpr, a_n, a_c, a_p: tl.constexpr,
    net_n, net_c, net_p: tl.constexpr, b_n, b_c, b_p: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    is_a = (c[:, None] < C // 2) & valid[None, :]
    dy_t = _load_halves(dy_a, dy_b, n, c, p, valid, C, a_n, a_c, a_p, b_n, b_c, b_p, DTYPE)
    if dnet is not None:
        at = dnet + n[None, :] * net_n + c[:, None] * net_c + p[None, :] * net_p
        dy_t += tl.load(at, mask=is_a, other=0.0).to(DTYPE)
    return dy_t


@triton.jit
def _load_shifted_halves(
    y_a, y_b, bias, n, c, p, valid, C: tl.constexpr, a_n, a_c, a_p: tl.constexpr,
    b_n, b_c, b_p: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    y_t = _load_halves(y_a, y_b, n, c, p, valid, C, a_n, a_c, a_p, b_n, b_c, b_p, DTYPE)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    # Columns that do not exist must stay zero: gram sums over them.
    return tl.where(valid[None, :], y_t - shift[:, None], 0.0)


@triton.jit
def _load_halves(
    a, b, n, c, p, valid, C: tl.constexpr, a_n, a_c, a_p: tl.constexpr,
    b_n, b_c, b_p: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of the state whose channels below C // 2 are `a` and whose others are `b`."""
    C_A: tl.constexpr = C // 2
    is_a = (c[:, None] < C_A) & valid[None, :]
    is_b = (c[:, None] >= C_A) & (c[:, None] < C) & valid[None, :]
    at_a = a + n[None, :] * a_n + c[:, None] * a_c + p[None, :] * a_p
    at_b = b + n[None, :] * b_n + (c - C_A)[:, None] * b_c + p[None, :] * b_p
    a_t = tl.load(at_a, mask=is_a, other=0.0).to(DTYPE)
    return a_t + tl.load(at_b, mask=is_b, other=0.0).to(DTYPE)


@triton.jit
def _store_gram(gram, dbias, gram_t, dbias_t, program, o, c, C: tl.constexpr):
    at = gram + program.to(tl.int64) * (C * C) + o[:, None] * C + c[None, :]
    tl.store(at, gram_t, mask=(o[:, None] < C) & (c[None, :] < C))
    tl.store(dbias + program * C + o, tl.sum(dbias_t, axis=1), mask=o < C)


class UnmixTile(NamedTuple):
    """Blocks of an un-mixing launch: output channels, input channels, columns; its warps and
    software pipelining stages."""

    block_o: int
    block_c: int
    block_p: int
    warps: int
    stages: int


def unmix_tile(c: int, dtype: torch.dtype) -> UnmixTile:
    """What compiles without spills for sm_80, sm_90 and sm_100. Past C = 64 three products of one
    tile do not fit the registers, and gram has programs of its own."""
    if dtype == torch.float64:
        return UnmixTile(16, 16, 16, 4, 1) if c <= 16 else UnmixTile(32, 16, 16, 4, 1)
    if c <= 16:
        return UnmixTile(16, 16, 32, 4, 3)
    if c <= 32:
        return UnmixTile(32, 32, 16, 4, 3)
    if c <= 64:
        return UnmixTile(64, 64, 16, 4, 2)
    return UnmixTile(128, 64, 16, 8, 1)


UNMIX_PROGRAMS = 264  # of a launch: two for each multiprocessor of an H100


def launch_unmix(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
    precision: str,
) -> Unmixed:
    """One launch. Without `weight_inverse` y was kept, and x is not rebuilt."""
    y_a, y_b, dy_a, dy_b = map(dense_pixels, (*y, *dy))
    dnet = None if dnet is None else dense_pixels(dnet)
    weight = weight.contiguous()
    weight_inverse = None if weight_inverse is None else weight_inverse.contiguous()
    n, c, p = y_a.shape[0], weight.shape[0], pixels(y_a)
    tile = unmix_tile(c, accumulator(y_b.dtype))
    tiles = tile_columns(n, p, tile.block_p)
    mixers = triton.cdiv(c, tile.block_o)
    gram_blocks = 0 if tile.block_c >= c else mixers
    roles = mixers + gram_blocks * gram_blocks
    splits = max(1, min(tiles.programs, UNMIX_PROGRAMS // roles))
    dx = empty_state(y_b, c, channels_last)
    x = None if weight_inverse is None else torch.empty_like(dx)
    net = None if x is None or net_dtype is None else net_input(x, net_dtype)
    new = y_b.new_empty if n else y_b.new_zeros
    gram, dbias = (new(s, dtype=accumulator(y_b.dtype)) for s in ((splits, c, c), (splits, c)))
    if n:
        _unmix_kernel[(splits, roles)](
            y_a, y_b, dy_a, dnet, dy_b, weight, weight_inverse, bias, x, dx, net,
            gram, dbias, n, p, tiles.programs,
            *strides(y_a), *strides(y_b), *strides(dy_a), *strides(dnet), *strides(dy_b),
            *strides(x), *strides(dx), *strides(net),
            C=c, **arithmetic(y_b, precision), MIXERS=mixers, GRAM_BLOCKS=gram_blocks,
            BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, BLOCK_P=tile.block_p, FLAT=tiles.flat,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Unmixed(x, dx, net, gram, dbias)


def empty_state(half: Tensor, channels: int, channels_last: bool) -> Tensor:
    """An empty, dense state of so many channels, shaped otherwise as one of its halves."""
    if not channels_last:
        return half.new_empty((half.shape[0], channels, *half.shape[2:]))
    last = half.new_empty((half.shape[0], *half.shape[2:], channels))
    return last.movedim(-1, 1)


def unmix(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
    precision: str = "tf32x3",
) -> Unmixed:
    """The second launch of a step's backward; on a CPU the loops of csrc, or its reference.

    Args:
        y: the halves (N, C_a, *spatial), (N, C_b, *spatial) of y = W x + bias.
        dy: the halves of its gradient.
        dnet: further gradient of the first half, or None.
        weight, bias: (C, C) and (C,), float32 (float64).
        weight_inverse: W^-1, or None where x was kept and is not asked for.
        net_dtype: dtype of the network input to cut from x, or None for none.
        channels_last: the memory format of what is returned: that of the states as they were, which
            halves of few channels no longer tell. A network given another one may differ in bits.
        precision: as for `conv1x1`.
    """
    if uses_triton(y[0]):
        return launch_unmix(
            y, dy, dnet, weight, weight_inverse, bias, net_dtype, channels_last, precision
        )
    if weight.shape[0] <= _native.MIXED_CHANNELS and _native.serves(y[1]):
        dx = empty_state(y[1], weight.shape[0], channels_last)
        x, net, gram, dbias = _native.unmix(
            y, dy, dnet, weight, weight_inverse, bias, dx, net_dtype
        )
        return Unmixed(x, dx, net if net_dtype is not None else None, gram, dbias)
    return unmix_ref(y, dy, dnet, weight, weight_inverse, bias, net_dtype, channels_last)
