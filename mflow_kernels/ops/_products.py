"""The two products of 1x1 convolutions, alone and behind a coupling: y = W x, and dW.

The fused step is the 1x1 convolution whose input goes through its coupling as it is read, so that
both are these kernels (`conv1x1`, `coupling_conv1x1`). Formulas and bytes are in those files.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from mflow_kernels.ops._launch import (
    RUN_TIME,
    TL_DTYPE,
    accumulator,
    at,
    columns,
    dense_pixels,
    launch,
    net_input,
    pixels,
    store,
    strided,
    tile_columns,
    uses_triton,
    write_ledger,
)
from mflow_kernels.ops.coupling import couple, load_params
from mflow_kernels.ops.scale import ScaleFunction


@triton.jit
def load_gradient(
    dy, dy_strides, dnet, dnet_strides, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr
):
    """A tile of dy, with the gradient of the network input added to its first half."""
    inside = (c[:, None] < C) & valid[None, :]
    dy_t = tl.load(at(dy, dy_strides, n, c, p), mask=inside, other=0.0).to(DTYPE)
    if dnet is not None:
        is_a = (c[:, None] < C // 2) & valid[None, :]
        dy_t += tl.load(at(dnet, dnet_strides, n, c, p), mask=is_a, other=0.0).to(DTYPE)
    return dy_t


@triton.jit(do_not_specialize=RUN_TIME)
def _mix_kernel(
    x,
    x_strides,
    dnet,
    dnet_strides,
    coupling_params,
    params_strides,
    weight,
    weight_strides,
    bias,
    y,
    y_strides,
    net,
    net_strides,
    ledger,
    N,
    P,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = W x + bias for one tile of columns; with a SCALE, x goes through its coupling first. x
    may be a gradient, to which that of a network input is added."""
    BLOCK_P: tl.constexpr = COLUMNS.block
    tile = tl.program_id(0)
    n, p, valid = columns(tile, N, P, COLUMNS)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    y_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
    log_s_sum = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x_t = load_gradient(x, x_strides, dnet, dnet_strides, n, c, p, valid, C, DTYPE)
        if SCALE is not None:
            raw, shift, is_b = load_params(
                coupling_params, params_strides, n, c, p, valid, C, DTYPE
            )
            x_t, log_s = couple(x_t, raw, shift, is_b, SCALE, INVERSE)
            log_s_sum += log_s
        at_w = weight + o[:, None] * weight_strides[0] + c[None, :] * weight_strides[1]
        w_t = tl.load(at_w, mask=(o[:, None] < C) & (c[None, :] < C), other=0.0)
        y_t = tl.dot(w_t, x_t, y_t, input_precision=PRECISION, out_dtype=DTYPE)
    if bias is not None:
        y_t += tl.load(bias + o, mask=o < C, other=0.0)[:, None]
    tl.store(at(y, y_strides, n, o, p), y_t, mask=(o[:, None] < C) & valid[None, :])
    if net is not None:
        is_a = (o[:, None] < C // 2) & valid[None, :]
        store(at(net, net_strides, n, o, p), y_t, mask=is_a)
    if SCALE is not None and tl.program_id(1) == 0:
        write_ledger(ledger, log_s_sum, tile, N, P, COLUMNS)


@triton.jit(do_not_specialize=RUN_TIME)
def _dweight_kernel(
    dy,
    dy_strides,
    dnet,
    dnet_strides,
    x,
    x_strides,
    coupling_params,
    params_strides,
    dweight,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """This program's share of dW = sum dy x^T and d bias = sum dy, over every `splits`-th tile."""
    BLOCK_P: tl.constexpr = COLUMNS.block
    split, splits = tl.program_id(0), tl.num_programs(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight_t = tl.zeros([BLOCK_O, BLOCK_C], DTYPE)
    dbias_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
    for tile in range(split, TILES, splits):
        n, p, valid = columns(tile, N, P, COLUMNS)
        dy_t = load_gradient(dy, dy_strides, dnet, dnet_strides, n, o, p, valid, C, DTYPE)
        # Columns by channels, as the product wants it: a transpose of the other way round made
        # Triton load single words.
        at_x = at(x, x_strides, n, c, p, PIXELS_FIRST=True)
        x_t = tl.load(at_x, mask=valid[:, None] & (c[None, :] < C), other=0.0).to(DTYPE)
        if SCALE is not None:
            raw, shift, is_b = load_params(
                coupling_params, params_strides, n, c, p, valid, C, DTYPE
            )
            x_t = tl.trans(couple(tl.trans(x_t), raw, shift, is_b, SCALE, INVERSE)[0])
        dweight_t = tl.dot(dy_t, x_t, dweight_t, input_precision=PRECISION, out_dtype=DTYPE)
        dbias_t += dy_t
    at_dweight = dweight + split.to(tl.int64) * (C * C) + o[:, None] * C + c[None, :]
    tl.store(at_dweight, dweight_t, mask=(o[:, None] < C) & (c[None, :] < C))
    if tl.program_id(2) == 0:
        tl.store(dbias + split * C + o, tl.sum(dbias_t, axis=1), mask=o < C)


class MixTile(NamedTuple):
    """Blocks of a product: output channels, input channels, columns; and its warps."""

    block_o: int
    block_c: int
    block_p: int
    warps: int


def mix_tile(c: int) -> MixTile:
    block_o = min(128, max(16, triton.next_power_of_2(c)))
    # Past C = 64, 4 warps and not 8: a lane then holds 8 neighbours, 16 bytes of 16-bit params too.
    warps = 8 if 32 < c <= 64 else 4
    return MixTile(block_o, 16 if c <= 16 else 32, 64 if c <= 64 else 32, warps)


def dweight_tile(c: int) -> MixTile:
    block = min(128, max(16, triton.next_power_of_2(c)))
    # Past C = 64, 32 columns spill on sm_90 and do not fit in the shared memory of sm_80.
    return MixTile(block, block, 32 if c <= 64 else 16, 4 if c <= 32 else 8)


DWEIGHT_PROGRAMS = 264  # of a dW launch: two for each multiprocessor of an H100


def dweight_splits(x: Tensor) -> int:
    """How many partial sums of dW a backward launch on the state x leaves."""
    if not uses_triton(x):
        return 1
    c = x.shape[1]
    tile = dweight_tile(c)
    blocks = triton.cdiv(c, tile.block_o) * triton.cdiv(c, tile.block_c)
    tiles = tile_columns(x.shape[0], pixels(x), tile.block_p).programs
    return max(1, min(tiles, DWEIGHT_PROGRAMS // blocks))


# Triton before 3.7.1 sets no proxy fence between an asynchronous copy to shared memory and a tensor
# core of sm_90 that reads it (triton-lang/triton#9610). Without a pipeline nothing is copied so. In
# tf32x3 no copy is read: operands are taken apart in registers and written back, with a fence.
FENCES_COPIES = TorchVersion(triton.__version__) >= "3.7.1"


def arithmetic(x: Tensor, precision: str) -> dict[str, Any]:
    """How a kernel computes products for the state x."""
    dtype = accumulator(x.dtype)
    return {
        "PRECISION": "ieee" if dtype == torch.float64 else precision,
        "DTYPE": TL_DTYPE[dtype],
    }


def shared_operand_stages(precision: str) -> int:
    """Pipelining stages of a loop that multiplies a tile as loaded and uses it elsewhere too.

    With "tf32" sm_90 multiplies asynchronously, from the buffer that the tile was loaded to. Triton
    3.9 frees that buffer after the other use, and the next load overwrites what the product still
    reads. One stage has one tile at a time. "tf32x3" and 16-bit states pass through registers.
    """
    return 1 if precision == "tf32" else 2


def launch_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: str,
    net_dtype: torch.dtype | None = None,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
    dnet: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One launch: y = W x + bias, x through its coupling first where params are given; the network
    input cut from y; and the coupling's ledger."""
    x = dense_pixels(x)
    params = None if params is None else dense_pixels(params)
    dnet = None if dnet is None else dense_pixels(dnet)
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    y = torch.empty_like(x)
    net = net_input(y, net_dtype)
    net_or_none = None if net_dtype is None else net
    tile = mix_tile(c)
    tiles = tile_columns(n, p, tile.block_p)
    ledger = None
    if params is not None:
        ledger = x.new_empty((n, tiles.ledger), dtype=accumulator(x.dtype))
    if n:
        launch(
            _mix_kernel,
            (tiles.programs, triton.cdiv(c, tile.block_o)),
            *(*strided(x), *strided(dnet), *strided(params), weight, weight.stride(), bias),
            *(*strided(y), *strided(net_or_none), ledger, n, p),
            C=c,
            SCALE=scale,
            INVERSE=inverse,
            **arithmetic(x, precision),
            BLOCK_O=tile.block_o,
            BLOCK_C=tile.block_c,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            num_stages=3 if FENCES_COPIES or precision != "tf32" else 1,
        )
    return y, net, ledger


def launch_dweight(
    dy: Tensor,
    dnet: Tensor | None,
    x: Tensor,
    splits: int,
    precision: str,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One launch: partial sums (splits, C, C) of dW and (splits, C) of d bias."""
    dy, x = dense_pixels(dy), dense_pixels(x)
    dnet = None if dnet is None else dense_pixels(dnet)
    params = None if params is None else dense_pixels(params)
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    tile = dweight_tile(c)
    tiles = tile_columns(n, p, tile.block_p)
    new = partial(x.new_empty if n else x.new_zeros, dtype=accumulator(x.dtype))
    dweight, dbias = new((splits, c, c)), new((splits, c))
    if n:
        launch(
            _dweight_kernel,
            (splits, triton.cdiv(c, tile.block_o), triton.cdiv(c, tile.block_c)),
            *(*strided(dy), *strided(dnet), *strided(x), *strided(params)),
            *(dweight, dbias, n, p, tiles.programs),
            C=c,
            SCALE=scale,
            INVERSE=inverse,
            **arithmetic(x, precision),
            BLOCK_O=tile.block_o,
            BLOCK_C=tile.block_c,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            num_stages=shared_operand_stages(precision),
        )
    return dweight, dbias
