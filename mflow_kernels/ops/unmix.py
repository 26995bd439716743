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
    RUN_TIME,
    accumulator,
    at,
    columns,
    cut_net_input,
    dense_pixels,
    launch,
    net_input,
    pixels,
    store,
    strided,
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


@triton.jit(do_not_specialize=RUN_TIME)
def _unmix_kernel(
    y_a,
    y_a_strides,
    y_b,
    y_b_strides,
    dy_a,
    dy_a_strides,
    dnet,
    dnet_strides,
    dy_b,
    dy_b_strides,
    weight,
    weight_inverse,
    bias,
    x,
    x_strides,
    dx,
    dx_strides,
    net,
    net_strides,
    gram,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    MIXERS: tl.constexpr,
    GRAM_BLOCKS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first MIXERS programs of axis 1 each give BLOCK_O channels of x and dx; where they see
    all channels at once (one mixer, one block of input channels) they form gram on the way, else
    the programs after them do."""
    BLOCK_P: tl.constexpr = COLUMNS.block
    program, programs, role = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    if role < MIXERS:
        o = role * BLOCK_O + tl.arange(0, BLOCK_O)
        if GRAM_BLOCKS == 0:
            gram_t = tl.zeros([BLOCK_O, BLOCK_C], DTYPE)
            dbias_t = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
        for tile in range(program, TILES, programs):
            n, p, valid = columns(tile, N, P, COLUMNS)
            x_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
            dx_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                at_w = weight + c[None, :] * C + o[:, None]
                inside = (o[:, None] < C) & (c[None, :] < C)
                w_t = tl.load(at_w, mask=inside, other=0.0)
                dy_t = _load_gradient_halves(
                    dy_a,
                    dy_a_strides,
                    dnet,
                    dnet_strides,
                    dy_b,
                    dy_b_strides,
                    n,
                    c,
                    p,
                    valid,
                    C,
                    DTYPE,
                )
                dx_t = tl.dot(w_t, dy_t, dx_t, input_precision=PRECISION, out_dtype=DTYPE)
                if (x is not None) or (GRAM_BLOCKS == 0):
                    y_t = _load_shifted_halves(
                        y_a, y_a_strides, y_b, y_b_strides, bias, n, c, p, valid, C, DTYPE
                    )
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
            tl.store(at(dx, dx_strides, n, o, p), dx_t, inside)
            if x is not None:
                tl.store(at(x, x_strides, n, o, p), x_t, inside)
            if net is not None:
                is_a = (o[:, None] < C // 2) & valid[None, :]
                store(at(net, net_strides, n, o, p), x_t, mask=is_a)
        if GRAM_BLOCKS == 0:
            _store_gram(gram, dbias, gram_t, dbias_t, program, o, o, C)
    elif GRAM_BLOCKS != 0:
        block = role - MIXERS
        o = (block // GRAM_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        c = (block % GRAM_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        gram_t = tl.zeros([BLOCK_O, BLOCK_O], DTYPE)
        dbias_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
        for tile in range(program, TILES, programs):
            n, p, valid = columns(tile, N, P, COLUMNS)
            dy_t = _load_gradient_halves(
                dy_a, dy_a_strides, dnet, dnet_strides, dy_b, dy_b_strides, n, o, p, valid, C, DTYPE
            )
            y_t = _load_shifted_halves(
                y_a, y_a_strides, y_b, y_b_strides, bias, n, c, p, valid, C, DTYPE
            )
            gram_t = tl.dot(dy_t, tl.trans(y_t), gram_t, input_precision=PRECISION, out_dtype=DTYPE)
            dbias_t += dy_t
        # Programs of one block of rows sum the same dy: they store the same d bias.
        _store_gram(gram, dbias, gram_t, dbias_t, program, o, c, C)


@triton.jit
def _load_gradient_halves(
    dy_a,
    dy_a_strides,
    dnet,
    dnet_strides,
    dy_b,
    dy_b_strides,
    n,
    c,
    p,
    valid,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    dy_t = _load_halves(dy_a, dy_a_strides, dy_b, dy_b_strides, n, c, p, valid, C, DTYPE)
    if dnet is not None:
        is_a = (c[:, None] < C // 2) & valid[None, :]
        dy_t += tl.load(at(dnet, dnet_strides, n, c, p), mask=is_a, other=0.0).to(DTYPE)
    return dy_t


@triton.jit
def _load_shifted_halves(
    y_a, y_a_strides, y_b, y_b_strides, bias, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr
):
    y_t = _load_halves(y_a, y_a_strides, y_b, y_b_strides, n, c, p, valid, C, DTYPE)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    # Columns that do not exist must stay zero: gram sums over them.
    return tl.where(valid[None, :], y_t - shift[:, None], 0.0)


@triton.jit
def _load_halves(a, a_strides, b, b_strides, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of the state whose channels below C // 2 are `a` and whose others are `b`."""
    C_A: tl.constexpr = C // 2
    is_a = (c[:, None] < C_A) & valid[None, :]
    is_b = (c[:, None] >= C_A) & (c[:, None] < C) & valid[None, :]
    a_t = tl.load(at(a, a_strides, n, c, p), mask=is_a, other=0.0).to(DTYPE)
    return a_t + tl.load(at(b, b_strides, n, c - C_A, p), mask=is_b, other=0.0).to(DTYPE)


@triton.jit
def _store_gram(gram, dbias, gram_t, dbias_t, program, o, c, C: tl.constexpr):
    at_gram = gram + program.to(tl.int64) * (C * C) + o[:, None] * C + c[None, :]
    tl.store(at_gram, gram_t, mask=(o[:, None] < C) & (c[None, :] < C))
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
        launch(
            _unmix_kernel,
            (splits, roles),
            *(*strided(y_a), *strided(y_b), *strided(dy_a), *strided(dnet), *strided(dy_b)),
            *(weight, weight_inverse, bias, *strided(x), *strided(dx), *strided(net)),
            *(gram, dbias, n, p, tiles.programs),
            C=c,
            **arithmetic(y_b, precision),
            MIXERS=mixers,
            GRAM_BLOCKS=gram_blocks,
            BLOCK_O=tile.block_o,
            BLOCK_C=tile.block_c,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
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
