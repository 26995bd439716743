r"""Invertible 1x1 convolution: one matrix mixes the channels of every pixel.

    y_p = W x_p + bias            (Glow, arXiv 1807.03039, section 3.2)

Actnorm folds into it: with W' = W diag(exp(log_scale)) and bias' = W' bias it is this operator. The
inverse is this operator too, with W^-1 and -W^-1 bias. log |det W| is the layer's business, which
knows W's factors.

Gradients, with g = d loss / d y:
    dx_p = W^T g_p,   dW = sum over samples and pixels of g_p x_p^T,   d bias = sum of g_p

Shapes: x (N, C, *spatial), weight (C, C), bias (C,). dtypes: products of float32 states are summed
in float32 on the tensor cores with three tf32 products each ("tf32x3", within float32 rounding);
float64 in float64; float16 and bfloat16 states are upcast to float32.
Bytes at least: forward x read and y written; backward g and x read, dx written. A program holds all
output channels of its pixels up to C = 128; past that each block of 128 reads the state again.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mflow_kernels.ops._checks import (
    check_choice,
    check_device,
    check_shape,
    check_state,
    check_tensor,
)
from mflow_kernels.ops._launch import (
    TL_DTYPE,
    Tiles,
    accumulator,
    columns,
    dense_pixels,
    in_layout_of,
    pixels,
    register_triton,
    strides,
    tile_columns,
    write_ledger,
)
from mflow_kernels.ops.coupling import couple, load_params
from mflow_kernels.ops.scale import ScaleFunction

PRECISIONS = ("tf32x3", "tf32")


def conv1x1_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulator(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    y = F.linear(x.movedim(1, -1).to(dtype), weight.to(dtype), bias)
    return y.movedim(-1, 1).to(x.dtype)


def conv1x1_backward_ref(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy_p, x_p = (t.movedim(1, -1).flatten(0, -2).to(accumulator(x.dtype)) for t in (dy, x))
    dweight, dbias = dy_p.t() @ x_p, dy_p.sum(0)
    return conv1x1_ref(dy, weight.t(), None), dweight.to(weight.dtype), dbias.to(weight.dtype)


@triton.jit
def _mix_kernel(
    x, params, weight, bias, y, ledger, N, P,
    x_n, x_c, x_p: tl.constexpr,
    params_n, params_c, params_p: tl.constexpr,
    y_n, y_c, y_p: tl.constexpr,
    weight_o, weight_c,
    C: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """y = W x + bias for one tile of columns; with a SCALE, x goes through its coupling first."""
    tile = tl.program_id(0)
    n, p, valid = columns(tile, N, P, BLOCK_P, FLAT)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    y_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
    log_s_sum = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c[:, None] < C) & valid[None, :]
        at_x = x + n[None, :] * x_n + c[:, None] * x_c + p[None, :] * x_p
        x_t = tl.load(at_x, mask=inside, other=0.0).to(DTYPE)
        if SCALE is not None:
            raw, shift, is_b = load_params(
                params, n, c, p, valid, C, params_n, params_c, params_p, DTYPE
            )
            x_t, log_s = couple(x_t, raw, shift, is_b, SCALE, INVERSE)
            log_s_sum += log_s
        at_w = weight + o[:, None] * weight_o + c[None, :] * weight_c
        w_t = tl.load(at_w, mask=(o[:, None] < C) & (c[None, :] < C), other=0.0)
        y_t = tl.dot(w_t, x_t, y_t, input_precision=PRECISION, out_dtype=DTYPE)
    if HAS_BIAS:
        y_t += tl.load(bias + o, mask=o < C, other=0.0)[:, None]
    at_y = y + n[None, :] * y_n + o[:, None] * y_c + p[None, :] * y_p
    tl.store(at_y, y_t, mask=(o[:, None] < C) & valid[None, :])
    if SCALE is not None and tl.program_id(1) == 0:
        write_ledger(ledger, log_s_sum, tile, N, P, BLOCK_P, FLAT)


@triton.jit
def _dweight_kernel(
    dy, x, params, dweight, dbias, N, P, TILES,
    dy_n, dy_c, dy_p: tl.constexpr,
    x_n, x_c, x_p: tl.constexpr,
    params_n, params_c, params_p: tl.constexpr,
    C: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """This program's share of dW = sum dy x^T and d bias = sum dy, over every `splits`-th tile."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight_t = tl.zeros([BLOCK_O, BLOCK_C], DTYPE)
    dbias_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
    for tile in range(split, TILES, splits):
        n, p, valid = columns(tile, N, P, BLOCK_P, FLAT)
        at_dy = dy + n[None, :] * dy_n + o[:, None] * dy_c + p[None, :] * dy_p
        dy_t = tl.load(at_dy, mask=(o[:, None] < C) & valid[None, :], other=0.0).to(DTYPE)
        at_x = x + n[None, :] * x_n + c[:, None] * x_c + p[None, :] * x_p
        x_t = tl.load(at_x, mask=(c[:, None] < C) & valid[None, :], other=0.0).to(DTYPE)
        if SCALE is not None:
            raw, shift, is_b = load_params(
                params, n, c, p, valid, C, params_n, params_c, params_p, DTYPE
            )
            x_t, _ = couple(x_t, raw, shift, is_b, SCALE, INVERSE)
        dweight_t = tl.dot(
            dy_t, tl.trans(x_t), dweight_t, input_precision=PRECISION, out_dtype=DTYPE
        )
        dbias_t += dy_t
    at = dweight + split.to(tl.int64) * (C * C) + o[:, None] * C + c[None, :]
    tl.store(at, dweight_t, mask=(o[:, None] < C) & (c[None, :] < C))
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
    return MixTile(block_o, 16 if c <= 16 else 32, 64 if c <= 64 else 32, 4 if c <= 32 else 8)


def dweight_tile(c: int) -> MixTile:
    block = min(128, max(16, triton.next_power_of_2(c)))
    return MixTile(block, block, 32, 4 if c <= 32 else 8)


DWEIGHT_PROGRAMS = 264  # of a dW launch: two for each multiprocessor of an H100


def _splits(tiles: Tiles, blocks: int) -> int:
    return max(1, min(tiles.programs, DWEIGHT_PROGRAMS // blocks))


def launch_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: str,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One launch: y = W x + bias, x through its coupling first where params are given; and the
    coupling's ledger."""
    x = dense_pixels(x)
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    dtype = accumulator(x.dtype)
    y = torch.empty_like(x)
    tile = mix_tile(c)
    tiles = tile_columns(n, p, tile.block_p)
    ledger = None
    if params is not None:
        params = dense_pixels(params)
        ledger = x.new_empty((n, tiles.ledger), dtype=dtype)
    weight = weight.to(dtype)
    if n:
        _mix_kernel[(tiles.programs, triton.cdiv(c, tile.block_o))](
            x, x if params is None else params, weight, None if bias is None else bias.to(dtype),
            y, ledger, n, p,
            *strides(x), *strides(x if params is None else params), *strides(y), *weight.stride(),
            C=c, SCALE=scale, INVERSE=inverse, HAS_BIAS=bias is not None,
            PRECISION="ieee" if dtype == torch.float64 else precision, DTYPE=TL_DTYPE[dtype],
            BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, BLOCK_P=tile.block_p, FLAT=tiles.flat,
            num_warps=tile.warps,
        )  # fmt: skip
    return y, ledger


def launch_dweight(
    dy: Tensor,
    x: Tensor,
    precision: str,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One launch: partial sums (splits, C, C) of dW and (splits, C) of d bias."""
    dy, x = dense_pixels(dy), dense_pixels(x)
    params = x if params is None else dense_pixels(params)
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    dtype = accumulator(x.dtype)
    tile = dweight_tile(c)
    tiles = tile_columns(n, p, tile.block_p)
    blocks = triton.cdiv(c, tile.block_o)
    splits = _splits(tiles, blocks * blocks)
    new = x.new_empty if n else x.new_zeros
    dweight, dbias = new((splits, c, c), dtype=dtype), new((splits, c), dtype=dtype)
    if n:
        _dweight_kernel[(splits, blocks, blocks)](
            dy, x, params, dweight, dbias, n, p, tiles.programs,
            *strides(dy), *strides(x), *strides(params),
            C=c, SCALE=scale, INVERSE=inverse,
            PRECISION="ieee" if dtype == torch.float64 else precision, DTYPE=TL_DTYPE[dtype],
            BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, BLOCK_P=tile.block_p, FLAT=tiles.flat,
            num_warps=tile.warps,
        )  # fmt: skip
    return dweight, dbias


@torch.library.custom_op("mflow::conv1x1", mutates_args=())
def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    return in_layout_of(x, conv1x1_ref(x, weight, bias))


@torch.library.custom_op("mflow::conv1x1_backward", mutates_args=())
def _conv1x1_backward(
    dy: Tensor, x: Tensor, weight: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = conv1x1_backward_ref(dy, x, weight)
    return in_layout_of(x, dx), dweight, dbias


@_conv1x1.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    return torch.empty_like(x)


@_conv1x1_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.precision = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = _conv1x1_backward(dy, *ctx.saved_tensors, ctx.precision)
    return dx, dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


_conv1x1.register_autograd(_backward, setup_context=_setup)


@partial(register_triton, _conv1x1)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    return launch_mix(x, weight, bias, precision)[0]


@partial(register_triton, _conv1x1_backward)
def _(dy: Tensor, x: Tensor, weight: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    dx, _ = launch_mix(dy, weight.t(), None, precision)
    dweight, dbias = launch_dweight(dy, x, precision)
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


def check_mix(x: Tensor, weight: object, bias: object, precision: str) -> None:
    """weight (C, C) and bias (C,) that fit the state x."""
    c = x.shape[1]
    for name, value, shape in (("weight", weight, (c, c)), ("bias", bias, (c,))):
        if name == "bias" and value is None:
            continue
        value = check_tensor(name, value)
        check_shape(name, value, shape)
        check_device(name, value, x)
    check_choice("precision", precision, PRECISIONS)


def conv1x1(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: str = "tf32x3"
) -> Tensor:
    """y = W x + bias at every pixel (Glow, arXiv 1807.03039, section 3.2).

    Its log-determinant is P * log |det W|, which the caller knows from W's factors.

    Args:
        x: state (N, C, *spatial); float32, float64, float16 or bfloat16; contiguous, channels_last
            and views of halves are read in place.
        weight: (C, C).
        bias: (C,) or None.
        precision: how float32 products run on tensor cores: "tf32x3", within float32 rounding, or
            "tf32", faster and good to about 1e-3. Only CUDA looks at it.

    Returns:
        y, shaped and typed as x.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    x = check_state("x", x)
    check_mix(x, weight, bias, precision)
    return _conv1x1(x, weight, bias, precision)


def conv1x1_inverse(
    y: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: str = "tf32x3"
) -> Tensor:
    """Undo `conv1x1`: x = W^-1 (y - bias), with W inverted in float64. Arguments as there.

    Raises:
        ValueError: also where weight is singular or not finite.
    """
    y = check_state("y", y)
    check_mix(y, weight, bias, precision)
    inverse = inverse_weight(weight)
    shift = None if bias is None else -(inverse @ bias.double())
    dtype = accumulator(y.dtype)
    return _conv1x1(y, inverse.to(dtype), None if shift is None else shift.to(dtype), precision)


def inverse_weight(weight: Tensor) -> Tensor:
    """W^-1 in float64, differentiable; ValueError where W is singular or not finite."""
    inverse, info = torch.linalg.inv_ex(weight.double())
    if not torch.compiler.is_compiling() and (info.any() or not inverse.isfinite().all()):
        raise ValueError("weight: expected an invertible matrix, got one that is singular")
    return inverse
