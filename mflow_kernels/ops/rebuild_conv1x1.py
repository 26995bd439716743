r"""Backward through the 1x1 convolution of a step of flow that stored nothing.

This is the second launch of a step's backward pass. `rebuild_coupling` and the backward pass of the
network ran before it, and the network gave a gradient dnet of y_a. With y = W x + bias and
dy = (dy_a + dnet, dy_b), the launch computes

    x = W^-1 (y - bias),   dx = W^T dy
    outer_sum = sum over samples and pixels of dy (y - bias)^T,   d bias = sum of dy

and a copy of x_a in the dtype of the network that reads it. The caller computes
dW = sum dy x^T = outer_sum W^-T, which is C x C work, for all steps at once and in float64. If x
was stored it is not rebuilt; outer_sum is the same. Swap W and W^-1 to go back through an inverse
(sampling) chain. The halves of y and dy are separate tensors, as `rebuild_coupling` returns them.

Shapes: states (N, C, *spatial), C_a = C // 2, C_b = C - C_a. dtypes: as `conv1x1`, always with
three tf32 products for one of float32.
Least traffic, in states: 2 (and dnet) read, 2 (and the network input) written. Up to C = 64 one
program computes all three products of its pixels. With more channels arithmetic limits the speed,
and three products do not fit the registers: other programs compute outer_sum and read y and dy once
more, and each block of 128 output channels reads its input again.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import at, at_halves, store, strided, strided_halves
from mflow_kernels.ops.channel_products import MULTIPROCESSORS, arithmetic, partial_sums
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.launch import RUN_TIME, launch, uses_triton
from mflow_kernels.ops.layouts import cut_net_input, dense_pixels, pixels
from mflow_kernels.ops.precision import accumulator, without_autocast
from mflow_kernels.ops.tiles import columns, tile_columns

Halves = tuple[Tensor, Tensor]


class RebuiltConv1x1(NamedTuple):
    """Results of `rebuild_conv1x1`.

    Attributes:
        x: the halves of x; None if x was not rebuilt.
        dx: the halves of its gradient.
        whole: the whole states x and dx, if `x` and `dx` are views of their halves; None if the
            halves are separate dense tensors.
        net: the network input x_a, or None.
        outer_sum: partial sums, (splits, C, C).
        dbias: partial sums, (splits, C).
    """

    x: Halves | None
    dx: Halves
    whole: tuple[Tensor | None, Tensor] | None
    net: Tensor | None
    outer_sum: Tensor
    dbias: Tensor


def in_one_piece(
    x: Tensor | None, dx: Tensor, net: Tensor | None, outer_sum: Tensor, dbias: Tensor
) -> RebuiltConv1x1:
    """Results whose halves are views of whole states."""
    c_a = dx.shape[1] // 2
    x_halves = None if x is None else (x[:, :c_a], x[:, c_a:])
    return RebuiltConv1x1(x_halves, (dx[:, :c_a], dx[:, c_a:]), (x, dx), net, outer_sum, dbias)


def rebuild_conv1x1_ref(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
) -> RebuiltConv1x1:
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
        outer_sum, dbias = (dy_p.t() @ y_p)[None], dy_p.sum(0)[None]
        if weight_inverse is None:
            return in_one_piece(None, dx, None, outer_sum, dbias)
        x = state(y_p @ weight_inverse.t())
    net = None if net_dtype is None else cut_net_input(x, net_dtype)
    return in_one_piece(x, dx, net, outer_sum, dbias)


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_kernel(
    y_a,
    y_a_strides,
    y_b,
    y_b_strides,
    dy_a,
    dy_a_strides,
    dy_b,
    dy_b_strides,
    dnet,
    dnet_strides,
    weight,
    weight_inverse,
    bias,
    x_a,
    x_a_strides,
    x_b,
    x_b_strides,
    dx_a,
    dx_a_strides,
    dx_b,
    dx_b_strides,
    net,
    net_strides,
    outer_sum,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    HALF: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All three products of every `programs`-th tile. The weights are loaded once.

    A tile has HALF places for each half of the channels. No channel is in the last place: y - bias
    is 1 there, so that d bias is the last column of outer_sum. Each warp has its own columns in
    every product, and the warps' sums for outer_sum are added at the end.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    program, programs = tl.program_id(0), tl.num_programs(0)
    C_A: tl.constexpr = C // 2
    LAST: tl.constexpr = 2 * HALF - 1
    place = tl.arange(0, 2 * HALF)
    is_a = place // HALF == 0
    c = place % HALF
    exists = c < tl.where(is_a, C_A, C - C_A)
    channel = tl.where(is_a, c, c + C_A)
    at_square = channel[:, None] * C + channel[None, :]
    square = exists[:, None] & exists[None, :]
    w_t = tl.load(weight + at_square, mask=square, other=0.0)
    if x_a is not None:
        at_inverse = weight_inverse + channel[None, :] * C + channel[:, None]
        inverse_t = tl.load(at_inverse, mask=square, other=0.0)
    bias_t = tl.load(bias + channel, mask=exists, other=0.0)
    bias_t = tl.where(place == LAST, -1.0, bias_t)
    outer_t = tl.zeros([WARPS, 2 * HALF, 2 * HALF], tl.float32)
    for tile in range(program, TILES, programs):
        n, p, valid = columns(tile, N, P, COLUMNS)
        inside = valid[:, None] & exists[None, :]
        at_dy = at_halves(dy_a, dy_a_strides, dy_b, dy_b_strides, n, c, p, is_a)
        if dnet is None:
            dy_t = tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
        else:
            # dnet first: in the other order ptxas spills for sm_100.
            at_dnet = at(dnet, dnet_strides, n, c, p, PIXELS_FIRST=True)
            dy_t = tl.load(at_dnet, mask=inside & is_a[None, :], other=0.0).to(tl.float32)
            dy_t += tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
        dx_t = tl.dot(dy_t, w_t, input_precision="tf32x3")
        tl.store(at_halves(dx_a, dx_a_strides, dx_b, dx_b_strides, n, c, p, is_a), dx_t, inside)
        # Load y after the store of dx: both tiles together need too many registers at C = 24.
        at_y = at_halves(y_a, y_a_strides, y_b, y_b_strides, n, c, p, is_a)
        y_t = tl.load(at_y, mask=inside, other=0.0).to(tl.float32) - bias_t[None, :]
        if x_a is not None:
            x_t = tl.dot(y_t, inverse_t, input_precision="tf32x3")
            tl.store(at_halves(x_a, x_a_strides, x_b, x_b_strides, n, c, p, is_a), x_t, inside)
            if net is not None:
                at_net = at(net, net_strides, n, c, p, PIXELS_FIRST=True)
                tl.store(at_net, x_t, inside & is_a[None, :])
        # dy is zero in columns that do not exist, so they add nothing.
        dy_of_warp = tl.reshape(dy_t, [WARPS, BLOCK_P // WARPS, 2 * HALF])
        y_of_warp = tl.reshape(y_t, [WARPS, BLOCK_P // WARPS, 2 * HALF])
        dy_of_warp = tl.permute(dy_of_warp, (0, 2, 1))
        outer_t = tl.dot(dy_of_warp, y_of_warp, outer_t, input_precision="tf32x3")
    total = tl.sum(outer_t, axis=0)
    tl.store(outer_sum + program.to(tl.int64) * (C * C) + at_square, total, square)
    dbias_t = tl.sum(tl.where(place[None, :] == LAST, total, 0.0), axis=1)
    tl.store(dbias + program * C + channel, dbias_t, exists)


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_wide_kernel(
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
    outer_sum,
    dbias,
    N,
    P,
    TILES,
    SPLITS,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE_BLOCKS: tl.constexpr,
    OUTER_BLOCKS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All three products, for channels that do not fit `_rebuild_conv1x1_kernel`.

    If OUTER_BLOCKS is 0, each program sees all channels and computes all three products of every
    SPLITS-th tile. Otherwise each of the first TILES * STATE_BLOCKS programs computes BLOCK_O
    channels of x and dx of one tile, and the programs after them compute the blocks of SPLITS
    partial outer sums. The programs of one tile are neighbours, so that all but the first find its
    states in the L2 cache.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    program = tl.program_id(0)
    state_programs = SPLITS if OUTER_BLOCKS == 0 else TILES * STATE_BLOCKS
    if program < state_programs:
        o = program % STATE_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
        first = program // STATE_BLOCKS
        if OUTER_BLOCKS == 0:
            outer_t = tl.zeros([BLOCK_O, BLOCK_C], DTYPE)
            dbias_t = tl.zeros([BLOCK_C], DTYPE)
        for tile in range(first, TILES, state_programs // STATE_BLOCKS):
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
                if (x is not None) or (OUTER_BLOCKS == 0):
                    y_t = _load_shifted_halves(
                        y_a, y_a_strides, y_b, y_b_strides, bias, n, c, p, valid, C, DTYPE
                    )
                if x is not None:
                    at_w = weight_inverse + o[:, None] * C + c[None, :]
                    w_t = tl.load(at_w, mask=inside, other=0.0)
                    x_t = tl.dot(w_t, y_t, x_t, input_precision=PRECISION, out_dtype=DTYPE)
                if OUTER_BLOCKS == 0:
                    outer_t = tl.dot(
                        dy_t, tl.trans(y_t), outer_t, input_precision=PRECISION, out_dtype=DTYPE
                    )
                    dbias_t += tl.sum(dy_t, axis=1)
            inside = (o[:, None] < C) & valid[None, :]
            tl.store(at(dx, dx_strides, n, o, p), dx_t, inside)
            if x is not None:
                tl.store(at(x, x_strides, n, o, p), x_t, inside)
            if net is not None:
                is_a = (o[:, None] < C // 2) & valid[None, :]
                store(at(net, net_strides, n, o, p), x_t, mask=is_a)
        if OUTER_BLOCKS == 0:
            _store_outer_sum(outer_sum, dbias, outer_t, dbias_t, program, o, o, C)
    elif OUTER_BLOCKS != 0:
        block = (program - state_programs) % (OUTER_BLOCKS * OUTER_BLOCKS)
        split = (program - state_programs) // (OUTER_BLOCKS * OUTER_BLOCKS)
        o = (block // OUTER_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        c = (block % OUTER_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        outer_t = tl.zeros([BLOCK_O, BLOCK_O], DTYPE)
        dbias_t = tl.zeros([BLOCK_O], DTYPE)
        for tile in range(split, TILES, SPLITS):
            n, p, valid = columns(tile, N, P, COLUMNS)
            dy_t = _load_gradient_halves(
                dy_a, dy_a_strides, dnet, dnet_strides, dy_b, dy_b_strides, n, o, p, valid, C, DTYPE
            )
            y_t = _load_shifted_halves(
                y_a, y_a_strides, y_b, y_b_strides, bias, n, c, p, valid, C, DTYPE
            )
            outer_t = tl.dot(
                dy_t, tl.trans(y_t), outer_t, input_precision=PRECISION, out_dtype=DTYPE
            )
            dbias_t += tl.sum(dy_t, axis=1)
        # Programs of one block of rows sum the same dy, so they store the same d bias.
        _store_outer_sum(outer_sum, dbias, outer_t, dbias_t, split, o, c, C)


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
    return y_t - shift[:, None]  # dy is zero in columns that do not exist, so they add nothing


@triton.jit
def _load_halves(a, a_strides, b, b_strides, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of the state with halves `a` (channels below C // 2) and `b`."""
    C_A: tl.constexpr = C // 2
    chosen = tl.where(
        (c < C_A)[:, None], at(a, a_strides, n, c, p), at(b, b_strides, n, c - C_A, p)
    )
    return tl.load(chosen, mask=(c < C)[:, None] & valid[None, :], other=0.0).to(DTYPE)


@triton.jit
def _store_outer_sum(outer_sum, dbias, outer_t, dbias_t, split, o, c, C: tl.constexpr):
    at_outer = outer_sum + split.to(tl.int64) * (C * C) + o[:, None] * C + c[None, :]
    tl.store(at_outer, outer_t, mask=(o[:, None] < C) & (c[None, :] < C))
    tl.store(dbias + split * C + o, dbias_t, mask=o < C)


class RebuildTile(NamedTuple):
    """Tile of a launch.

    Attributes:
        half: places for a half of the channels; 0 selects `_rebuild_conv1x1_wide_kernel`.
        block_o: output channels of a program.
        block_c: input channels of one product.
        block_p: columns of a tile.
        warps: warps of a program.
        stages: stages of software pipelining.
        programs: programs per multiprocessor that each store a partial sum.
    """

    half: int
    block_o: int
    block_c: int
    block_p: int
    warps: int
    stages: int
    programs: int


def rebuild_tile(c: int, dtype: torch.dtype) -> RebuildTile:
    """Tiles that compile without spills for sm_80, sm_90 and sm_100."""
    if dtype == torch.float64:
        block_o = 16 if c <= 16 else 32
        return RebuildTile(0, block_o, 16, 16, 4, 1, 2)
    half = max(8, triton.next_power_of_2(c - c // 2 + 1))  # one place stays empty
    if half <= 16:
        return RebuildTile(half, 2 * half, 2 * half, 64, 4, 1, 4 if half == 8 else 2)
    if c <= 32:
        return RebuildTile(0, 32, 32, 16, 2, 1, 2)
    if c <= 64:
        return RebuildTile(0, 64, 64, 16, 4, 2, 2)
    return RebuildTile(0, 128, 64, 16, 8, 1, 2)


def rebuild_splits(half: Tensor, c: int) -> int:
    """Number of partial sums for a state of c channels; `half` is one of its halves."""
    if not uses_triton(half):
        return 1
    tile = rebuild_tile(c, accumulator(half.dtype))
    blocks = triton.cdiv(c, tile.block_o) ** 2
    n, p = half.shape[0], pixels(half)
    programs = tile.programs * MULTIPROCESSORS // blocks
    return partial_sums(n * p, c, min(tile_columns(n, p, tile.block_p).programs, programs))


def launch_rebuild_conv1x1(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
    apart: bool,
    outer_sum: Tensor,
    dbias: Tensor,
) -> RebuiltConv1x1:
    """One launch. Without `weight_inverse`, x is not rebuilt."""
    y_a, y_b, dy_a, dy_b = map(dense_pixels, (*y, *dy))
    dnet = None if dnet is None else dense_pixels(dnet)
    weight = weight.contiguous()
    weight_inverse = None if weight_inverse is None else weight_inverse.contiguous()
    n, c, p, splits = y_a.shape[0], weight.shape[0], pixels(y_a), outer_sum.shape[0]
    tile = rebuild_tile(c, accumulator(y_b.dtype))
    tiles = tile_columns(n, p, tile.block_p)
    if apart and tile.half:
        c_a = c // 2
        new = partial(empty_state, y_b, channels_last=channels_last)
        x = None if weight_inverse is None else (new(c_a), new(c - c_a))
        made = RebuiltConv1x1(x, (new(c_a), new(c - c_a)), None, None, outer_sum, dbias)
    else:
        dx = empty_state(y_b, c, channels_last)
        whole = None if weight_inverse is None else torch.empty_like(dx)
        made = in_one_piece(whole, dx, None, outer_sum, dbias)
    net = stored = None
    if made.x is not None and net_dtype is not None:
        if made.whole is None and net_dtype == y_b.dtype:
            net = made.x[0]
        else:
            net = stored = torch.empty_like(made.x[0], dtype=net_dtype)
        made = made._replace(net=net)
    if n == 0:
        outer_sum.zero_()
        dbias.zero_()
    elif tile.half:
        launch(
            _rebuild_conv1x1_kernel,
            (splits,),
            *(*strided_halves(y_a, y_b), *strided_halves(dy_a, dy_b), *strided(dnet)),
            *(weight, weight_inverse, bias, *strided_halves(*(made.x or (None, None)))),
            *(*strided_halves(*made.dx), *strided(stored), outer_sum, dbias, n, p, tiles.programs),
            C=c,
            HALF=tile.half,
            WARPS=tile.warps,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    else:
        assert made.whole is not None
        state_blocks = triton.cdiv(c, tile.block_o)
        outer_blocks = 0 if tile.block_c >= c else state_blocks
        grid = tiles.programs * state_blocks + splits * outer_blocks**2 if outer_blocks else splits
        launch(
            _rebuild_conv1x1_wide_kernel,
            (grid,),
            *(*strided(y_a), *strided(y_b), *strided(dy_a), *strided(dnet), *strided(dy_b)),
            *(weight, weight_inverse, bias, *strided(made.whole[0]), *strided(made.whole[1])),
            *(*strided(stored), outer_sum, dbias, n, p, tiles.programs, splits),
            C=c,
            **arithmetic(y_b, "tf32x3"),
            STATE_BLOCKS=state_blocks,
            OUTER_BLOCKS=outer_blocks,
            BLOCK_O=tile.block_o,
            BLOCK_C=tile.block_c,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return made


def empty_state(half: Tensor, channels: int, channels_last: bool) -> Tensor:
    """An empty dense tensor with `channels` channels and the batch and pixels of `half`."""
    if not channels_last:
        return half.new_empty((half.shape[0], channels, *half.shape[2:]))
    last = half.new_empty((half.shape[0], *half.shape[2:], channels))
    return last.movedim(-1, 1)


def rebuild_conv1x1(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
    apart: bool,
    outer_sum: Tensor,
    dbias: Tensor,
) -> RebuiltConv1x1:
    """The second launch of a step's backward pass; on a CPU its loop or its reference.

    Args:
        y: the halves (N, C_a, *spatial), (N, C_b, *spatial) of y = W x + bias.
        dy: the halves of its gradient.
        dnet: further gradient of the first half, or None.
        weight, bias: (C, C) and (C,), float32 (float64).
        weight_inverse: W^-1, or None if x was stored and need not be rebuilt.
        net_dtype: dtype of the network input to cut from x, or None for none.
        channels_last: memory format of the results. Pass that of the states: halves with few
            channels do not show it, and a network may give other bits for another format.
        apart: whether the halves of x and dx may be separate tensors. A kernel that reads one half
            of a channels_last state with few channels fetches much of the other half too.
        outer_sum, dbias: receive the partial sums, (splits, C, C) and (splits, C), contiguous, with
            `rebuild_splits` splits.
    """
    if uses_triton(y[0]):
        return launch_rebuild_conv1x1(
            y,
            dy,
            dnet,
            weight,
            weight_inverse,
            bias,
            net_dtype,
            channels_last,
            apart,
            outer_sum,
            dbias,
        )
    if weight.shape[0] <= cpu.CONV1X1_MAX_CHANNELS and cpu.serves(y[1]):
        dx = empty_state(y[1], weight.shape[0], channels_last)
        x, net = cpu.conv1x1_backward(
            y, dy, dnet, weight, weight_inverse, bias, dx, outer_sum, dbias, net_dtype
        )
        return in_one_piece(x, dx, net if net_dtype is not None else None, outer_sum, dbias)
    made = rebuild_conv1x1_ref(y, dy, dnet, weight, weight_inverse, bias, net_dtype, channels_last)
    return made._replace(outer_sum=outer_sum.copy_(made.outer_sum), dbias=dbias.copy_(made.dbias))
