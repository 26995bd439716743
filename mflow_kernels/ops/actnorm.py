r"""Actnorm: an affine map of each channel (Glow, arXiv 1807.03039, section 3.1).

    y = exp(log_scale) * (x + bias)          logdet = P * sum(log_scale)

Gradients, with g = d loss / d y, summed over samples and pixels:
    dx = exp(log_scale) * g,   d bias = sum dx,   d log_scale = sum g * y (+ P * d logdet, by torch)

Shapes: x (N, C, *spatial), bias and log_scale (C,). dtypes: computed in float32 (float64).
Bytes at least: forward x read and y written; backward x and g read, dx written.

In a step of flow actnorm costs nothing: it is folded into the 1x1 convolution that follows. This
operator serves an actnorm layer that stands alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import at, strided
from mflow_kernels.ops.checks import check_device, check_shape, check_tensor
from mflow_kernels.ops.compiler import cdiv, tl, triton
from mflow_kernels.ops.elementwise import launch_elementwise
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import RUN_TIME, launch, uses_triton
from mflow_kernels.ops.layouts import dense_pixels, flow_state, in_layout_of, pixels
from mflow_kernels.ops.partial_sums import summing_programs
from mflow_kernels.ops.precision import TL_DTYPE, accumulator
from mflow_kernels.ops.registration import gradients_of, register
from mflow_kernels.ops.tiles import columns, elementwise_tile, tile_columns


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (x.dim() - 2))


def actnorm_ref(x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool) -> Tensor:
    dtype = accumulator(x.dtype)
    bias, log_scale = (_per_channel(v.to(dtype), x) for v in (bias, log_scale))
    if inverse:
        return (torch.exp(-log_scale) * x.to(dtype) - bias).to(x.dtype)
    return (torch.exp(log_scale) * (x.to(dtype) + bias)).to(x.dtype)


def actnorm_backward_ref(
    dy: Tensor, x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    sign = -1 if inverse else 1
    dx = torch.exp(sign * _per_channel(log_scale.to(dtype), x)) * dy
    slope = dx * x if inverse else dx * (x + _per_channel(bias.to(dtype), x))
    dbias, dlog_scale = (
        (sign * t.transpose(0, 1).flatten(1).sum(1)) for t in (dy if inverse else dx, slope)
    )
    return dx.to(x.dtype), dbias.to(bias.dtype), dlog_scale.to(log_scale.dtype)


@triton.jit(do_not_specialize=RUN_TIME)
def _actnorm_fwd_kernel(
    x,
    bias,
    log_scale,
    y,
    N,
    P,
    C: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, p, valid = columns(tl.program_id(0), N, P, COLUMNS)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c[:, None] < C) & valid[None, :]
        b = tl.load(bias + c, mask=c < C, other=0.0).to(DTYPE)[:, None]
        log_s = tl.load(log_scale + c, mask=c < C, other=0.0).to(DTYPE)[:, None]
        x_t = tl.load(at(x, n, c, p), mask=inside, other=0.0).to(DTYPE)
        if INVERSE:
            y_t = tl.exp(-log_s) * x_t - b
        else:
            y_t = tl.exp(log_s) * (x_t + b)
        tl.store(at(y, n, c, p), y_t, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _actnorm_bwd_kernel(
    dy,
    x,
    bias,
    log_scale,
    dx,
    partials,
    N,
    P,
    TILES,
    C: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCK_P: tl.constexpr = COLUMNS.block
    # A program takes BLOCK_C channels of every `programs`-th tile. Each channel's two sums stay in
    # registers until they are stored as one row of `partials` (programs, 2, C).
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(DTYPE)[:, None]
    log_s = tl.load(log_scale + c, mask=c < C, other=0.0).to(DTYPE)[:, None]
    sum_dx = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    sum_slope = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    for tile in range(program, TILES, programs):
        n, p, valid = columns(tile, N, P, COLUMNS)
        inside = (c[:, None] < C) & valid[None, :]
        x_t = tl.load(at(x, n, c, p), mask=inside, other=0.0).to(DTYPE)
        dy_t = tl.load(at(dy, n, c, p), mask=inside, other=0.0).to(DTYPE)
        if INVERSE:
            dx_t = tl.exp(-log_s) * dy_t
            sum_dx -= dy_t
            sum_slope -= dx_t * x_t
        else:
            dx_t = tl.exp(log_s) * dy_t
            sum_dx += dx_t
            sum_slope += tl.where(inside, dx_t * (x_t + b), 0.0)
        tl.store(at(dx, n, c, p), dx_t, mask=inside)
    row = partials + program * (2 * C)
    tl.store(row + c, tl.sum(sum_dx, axis=1), mask=c < C)
    tl.store(row + C + c, tl.sum(sum_slope, axis=1), mask=c < C)


def launch_actnorm(x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool) -> Tensor:
    x = dense_pixels(x)
    y = torch.empty_like(x)
    tensors = strided(x), bias.contiguous(), log_scale.contiguous(), strided(y)
    launch_elementwise(_actnorm_fwd_kernel, x, *tensors, C=x.shape[1], INVERSE=inverse)
    return y


def launch_actnorm_backward(
    dy: Tensor, x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch and one reduction of its partial sums: (dx, d bias, d log_scale)."""
    dy, x = dense_pixels(dy), dense_pixels(x)
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    dtype = accumulator(x.dtype)
    dx = torch.empty_like(x)
    block_c, block_p = elementwise_tile(x)
    tiles = tile_columns(n, p, block_p)
    programs = max(1, min(tiles.programs, summing_programs(x.device)))
    partials = (x.new_empty if n else x.new_zeros)((programs, 2, c), dtype=dtype)
    if n:
        launch(
            _actnorm_bwd_kernel,
            (programs, cdiv(c, block_c)),
            *(strided(dy), strided(x), bias.contiguous(), log_scale.contiguous()),
            *(strided(dx), partials, n, p, tiles.programs),
            C=c,
            INVERSE=inverse,
            DTYPE=TL_DTYPE[dtype],
            BLOCK_C=block_c,
            COLUMNS=tiles.columns,
        )
    dbias, dlog_scale = partials.sum(0).unbind()
    return dx, dbias.to(bias.dtype, copy=True), dlog_scale.to(log_scale.dtype, copy=True)


@falls_back("actnorm")
def _forward(x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool) -> Tensor:
    if uses_triton(x):
        return launch_actnorm(x, bias, log_scale, inverse)
    return in_layout_of(x, actnorm_ref(x, bias, log_scale, inverse))


@falls_back("actnorm_backward")
def _backward(
    dy: Tensor, x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if uses_triton(x):
        return launch_actnorm_backward(dy, x, bias, log_scale, inverse)
    dx, dbias, dlog_scale = actnorm_backward_ref(dy, x, bias, log_scale, inverse)
    return in_layout_of(x, dx), dbias, dlog_scale


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


actnorm_op = register("actnorm", _forward, _backward, fake=_fake)


def _loops(x: Tensor) -> bool:
    """Whether the loop of csrc runs, and no mode of dispatch must see the operator."""
    if uses_triton(x) or not cpu.serves(x):
        return False
    return not torch._C._len_torch_dispatch_stack()


class _Loop(torch.autograd.Function):
    """Actnorm and its log-determinant, or their inverses, by the loop of csrc."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.inverse = inverse
        ctx.save_for_backward(x, bias, log_scale)
        return cpu.actnorm(x, bias, log_scale, inverse)

    @staticmethod
    @torch.compiler.disable  # a compiled function may call backward()
    def backward(ctx: Any, dy: Tensor, dlogdet: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            reference = actnorm_inverse if ctx.inverse else actnorm
            return *gradients_of(reference, ctx.saved_tensors, (dy, dlogdet)), None
        x, bias, log_scale = ctx.saved_tensors
        how = ctx.inverse, ctx.needs_input_grad[0]
        return *cpu.actnorm_backward(dy, dlogdet, x, bias, log_scale, *how), None


def _loop(x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    run = _Loop.apply if torch.is_grad_enabled() else cpu.actnorm
    return run(x, bias, log_scale, inverse)


def _checked(name: str, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    x = flow_state(name, x)
    for label, value in (("bias", bias), ("log_scale", log_scale)):
        if type(value) is Parameter and value.shape == x.shape[1:2] and value.device == x.device:
            continue  # a layer's own
        check_tensor(label, value)
        check_shape(label, value, (x.shape[1],))
        check_device(label, value, x)
    return x


def actnorm(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """y = exp(log_scale) * (x + bias), channel by channel (Glow, arXiv 1807.03039, section 3.1).

    Args:
        x: state (N, C, *spatial); float32, float64, float16 or bfloat16, any dense layout.
        bias, log_scale: (C,), any of these dtypes.

    Returns:
        y, shaped and typed as x, and logdet (N,) = P * sum(log_scale), float32 (float64 for
        float64 states), natural log.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    x = _checked("x", x, bias, log_scale)
    if _loops(x):
        return _loop(x, bias, log_scale, False)
    logdet = pixels(x) * log_scale.to(accumulator(x.dtype)).sum()
    y = actnorm_op(x, bias, log_scale, False)
    return y, logdet.repeat(x.shape[0])


def actnorm_inverse(y: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `actnorm`: x, and the negative of its logdet. Same arguments."""
    y = _checked("y", y, bias, log_scale)
    if _loops(y):
        return _loop(y, bias, log_scale, True)
    logdet = -pixels(y) * log_scale.to(accumulator(y.dtype)).sum()
    x = actnorm_op(y, bias, log_scale, True)
    return x, logdet.repeat(y.shape[0])
