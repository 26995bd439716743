r"""Invertible 1x1 convolution: one matrix mixes the channels of every pixel.

    y_p = W x_p + bias            (Glow, arXiv 1807.03039, section 3.2)

Actnorm folds into it: with W' = W diag(exp(log_scale)) and bias' = W' bias it is this operator. The
inverse is this operator too, with W^-1 and -W^-1 bias. log |det W| is the layer's business, which
knows W's factors.

Gradients, with g = d loss / d y:
    dx_p = W^T g_p,   dW = sum over samples and pixels of g_p x_p^T,   d bias = sum of g_p

The launch can also write the input of the next coupling network, x_a of y, dense and in the
network's dtype; its gradient comes back beside that of y and is added as both are read.

Shapes: x (N, C, *spatial), weight (C, C), bias (C,). dtypes: products of float32 states are summed
in float32 on the tensor cores with three tf32 products each ("tf32x3", within float32 rounding);
float64 in float64; float16 and bfloat16 states are upcast to float32.
Bytes at least: forward x read and y written; backward g and x read, dx written. A program holds all
output channels of its pixels up to C = 128; past that each block of 128 reads the state again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mflow_kernels.ops import _native
from mflow_kernels.ops._autograd import eager_function, operator
from mflow_kernels.ops._checks import (
    check_choice,
    check_device,
    check_shape,
    check_tensor,
)
from mflow_kernels.ops._launch import (
    TL_DTYPE,
    accumulator,
    columns,
    dense_pixels,
    flow_state,
    in_layout_of,
    pixels,
    strides,
    tile_columns,
    uses_triton,
    without_autocast,
    write_ledger,
)
from mflow_kernels.ops.coupling import couple, load_params
from mflow_kernels.ops.scale import ScaleFunction

PRECISIONS = ("tf32x3", "tf32")


def conv1x1_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulator(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    with without_autocast(x):
        y = F.linear(x.movedim(1, -1).to(dtype), weight.to(dtype), bias)
    return y.movedim(-1, 1).to(x.dtype)


def conv1x1_backward_ref(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy_p, x_p = (t.movedim(1, -1).flatten(0, -2).to(accumulator(x.dtype)) for t in (dy, x))
    with without_autocast(x):
        dweight = dy_p.t() @ x_p
    return conv1x1_ref(dy, weight.t(), None), dweight, dy_p.sum(0)


def add_to_first_half(dy: Tensor, dnet: Tensor | None) -> Tensor:
    """The gradient of y from that of y itself and that of the network input cut from it."""
    if dnet is None:
        return dy
    dy = dy.clone(memory_format=torch.preserve_format)
    dy[:, : dnet.shape[1]] += dnet
    return dy


@triton.jit
def load_gradient(
    dy, dnet, n, c, p, valid, C: tl.constexpr,
    dy_n, dy_c, dy_p: tl.constexpr, dnet_n, dnet_c, dnet_p: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of dy, with the gradient of the network input added to its first half."""
    at = dy + n[None, :] * dy_n + c[:, None] * dy_c + p[None, :] * dy_p
    dy_t = tl.load(at, mask=(c[:, None] < C) & valid[None, :], other=0.0).to(DTYPE)
    if dnet is not None:
        at = dnet + n[None, :] * dnet_n + c[:, None] * dnet_c + p[None, :] * dnet_p
        is_a = (c[:, None] < C // 2) & valid[None, :]
        dy_t += tl.load(at, mask=is_a, other=0.0).to(DTYPE)
    return dy_t


@triton.jit
def _mix_kernel(
    x, dnet, coupling_params, weight, bias, y, net, ledger, N, P: tl.constexpr,
    x_n: tl.constexpr, x_c: tl.constexpr, x_p: tl.constexpr,
    dnet_n: tl.constexpr, dnet_c: tl.constexpr, dnet_p: tl.constexpr,
    params_n: tl.constexpr, params_c: tl.constexpr, params_p: tl.constexpr,
    y_n: tl.constexpr, y_c: tl.constexpr, y_p: tl.constexpr,
    net_n: tl.constexpr, net_c: tl.constexpr, net_p: tl.constexpr,
    weight_o, weight_c,
    C: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """y = W x + bias for one tile of columns; with a SCALE, x goes through its coupling first. x
    may be a gradient, to which that of a network input is added."""
    tile = tl.program_id(0)
    n, p, valid = columns(tile, N, P, BLOCK_P, FLAT)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    y_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
    log_s_sum = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x_t = load_gradient(
            x, dnet, n, c, p, valid, C, x_n, x_c, x_p, dnet_n, dnet_c, dnet_p, DTYPE
        )
        if SCALE is not None:
            raw, shift, is_b = load_params(
                coupling_params, n, c, p, valid, C, params_n, params_c, params_p, DTYPE
            )
            x_t, log_s = couple(x_t, raw, shift, is_b, SCALE, INVERSE)
            log_s_sum += log_s
        at_w = weight + o[:, None] * weight_o + c[None, :] * weight_c
        w_t = tl.load(at_w, mask=(o[:, None] < C) & (c[None, :] < C), other=0.0)
        y_t = tl.dot(w_t, x_t, y_t, input_precision=PRECISION, out_dtype=DTYPE)
    if bias is not None:
        y_t += tl.load(bias + o, mask=o < C, other=0.0)[:, None]
    at_y = y + n[None, :] * y_n + o[:, None] * y_c + p[None, :] * y_p
    tl.store(at_y, y_t, mask=(o[:, None] < C) & valid[None, :])
    if net is not None:
        at_net = net + n[None, :] * net_n + o[:, None] * net_c + p[None, :] * net_p
        tl.store(at_net, y_t, mask=(o[:, None] < C // 2) & valid[None, :])
    if SCALE is not None and tl.program_id(1) == 0:
        write_ledger(ledger, log_s_sum, tile, N, P, BLOCK_P, FLAT)


@triton.jit
def _dweight_kernel(
    dy, dnet, x, coupling_params, dweight, dbias, N, P: tl.constexpr, TILES,
    dy_n: tl.constexpr, dy_c: tl.constexpr, dy_p: tl.constexpr,
    dnet_n: tl.constexpr, dnet_c: tl.constexpr, dnet_p: tl.constexpr,
    x_n: tl.constexpr, x_c: tl.constexpr, x_p: tl.constexpr,
    params_n: tl.constexpr, params_c: tl.constexpr, params_p: tl.constexpr,
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
        dy_t = load_gradient(
            dy, dnet, n, o, p, valid, C, dy_n, dy_c, dy_p, dnet_n, dnet_c, dnet_p, DTYPE
        )
        # Columns by channels, as the product wants it: a transpose of the other way round made
        # Triton load single words.
        at_x = x + n[:, None] * x_n + p[:, None] * x_p + c[None, :] * x_c
        x_t = tl.load(at_x, mask=valid[:, None] & (c[None, :] < C), other=0.0).to(DTYPE)
        if SCALE is not None:
            raw, shift, is_b = load_params(
                coupling_params, n, c, p, valid, C, params_n, params_c, params_p, DTYPE
            )
            x_t = tl.trans(couple(tl.trans(x_t), raw, shift, is_b, SCALE, INVERSE)[0])
        dweight_t = tl.dot(dy_t, x_t, dweight_t, input_precision=PRECISION, out_dtype=DTYPE)
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


def cut_net_input(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`net_input`, filled from y."""
    net = net_input(y, dtype)
    return net if dtype is None else _native.cut(y, net)


def spread(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., C, C) and bias (..., C) as the operators take them: one copy, in appearance, for
    each partial sum of its gradient.

    So the partial sums leave the backward launch as they are, and one reduction adds them for all
    the steps that were spread together, in a fixed order.
    """
    splits, c, dtype = dweight_splits(x), x.shape[1], accumulator(x.dtype)
    weight, bias = weight.to(dtype).unsqueeze(-3), bias.to(dtype).unsqueeze(-2)
    return (
        weight.expand(*weight.shape[:-3], splits, c, c),
        bias.expand(*bias.shape[:-2], splits, c),
    )


def net_input(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor for the network input of the state y: dense, in y's order of axes; or (0,)."""
    return (
        y.new_empty(0) if dtype is None else torch.empty_like(y[:, : y.shape[1] // 2], dtype=dtype)
    )


def arithmetic(x: Tensor, precision: str) -> dict[str, Any]:
    """How a kernel computes products for the state x."""
    dtype = accumulator(x.dtype)
    return {
        "PRECISION": "ieee" if dtype == torch.float64 else precision,
        "DTYPE": TL_DTYPE[dtype],
    }


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
        _mix_kernel[(tiles.programs, triton.cdiv(c, tile.block_o))](
            x, dnet, params, weight, bias, y, net_or_none, ledger, n, p,
            *strides(x), *strides(dnet), *strides(params), *strides(y),
            *strides(net_or_none), *weight.stride(),
            C=c, SCALE=scale, INVERSE=inverse, **arithmetic(x, precision),
            BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, BLOCK_P=tile.block_p, FLAT=tiles.flat,
            num_warps=tile.warps,
        )  # fmt: skip
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
        _dweight_kernel[(splits, triton.cdiv(c, tile.block_o), triton.cdiv(c, tile.block_c))](
            dy, dnet, x, params, dweight, dbias, n, p, tiles.programs,
            *strides(dy), *strides(dnet), *strides(x), *strides(params),
            C=c, SCALE=scale, INVERSE=inverse, **arithmetic(x, precision),
            BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, BLOCK_P=tile.block_p, FLAT=tiles.flat,
            num_warps=tile.warps, num_stages=2,
        )  # fmt: skip
    return dweight, dbias


def conv1x1_forward(
    x: Tensor, weight: Tensor, bias: Tensor, precision: str, net_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """y and the network input cut from it, without autograd; weight and bias as `spread` them."""
    if uses_triton(x):
        y, net, _ = launch_mix(x, weight[0], bias[0], precision, net_dtype)
        return y, net
    run = _native.conv1x1 if _native.serves(x) else conv1x1_ref
    y = in_layout_of(x, run(x, weight[0], bias[0]))
    return y, cut_net_input(y, net_dtype)


def conv1x1_backward(
    dy: Tensor, dnet: Tensor | None, x: Tensor, weight: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and partial sums of dW and d bias."""
    if uses_triton(x):
        dx, _, _ = launch_mix(dy, weight[0].t(), None, precision, dnet=dnet)
        return in_layout_of(x, dx), *launch_dweight(dy, dnet, x, weight.shape[0], precision)
    dx, dweight, dbias = conv1x1_backward_ref(add_to_first_half(dy, dnet), x, weight[0])
    return in_layout_of(x, dx), dweight[None], dbias[None]


conv1x1_op = torch.library.custom_op("mflow::conv1x1", conv1x1_forward, mutates_args=())
conv1x1_backward_op = torch.library.custom_op(
    "mflow::conv1x1_backward", conv1x1_backward, mutates_args=()
)


@conv1x1_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, precision: str, net_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    return y, net_input(y, net_dtype)


@conv1x1_backward_op.register_fake
def _(
    dy: Tensor, dnet: Tensor | None, x: Tensor, weight: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.precision, ctx.net_dtype = inputs
    ctx.save_for_backward(x, weight)


def _backward(
    ctx: Any, dy: Tensor, dnet: Tensor, run: Any = conv1x1_backward_op
) -> tuple[Tensor | None, ...]:
    dnet_or_none = None if ctx.net_dtype is None else dnet
    grads = run(dy, dnet_or_none, *ctx.saved_tensors, ctx.precision)
    return (*grads, None, None)


conv1x1_op.register_autograd(_backward, setup_context=_setup)
conv1x1_eager = eager_function(conv1x1_forward, _setup, partial(_backward, run=conv1x1_backward))


def check_mix(x: Tensor, weight: object, bias: object, precision: str) -> tuple[Tensor, Tensor]:
    """weight (C, C) and bias (C,), zero where None, that fit the state x."""
    c = x.shape[1]
    weight = check_tensor("weight", weight)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else check_tensor("bias", bias)
    for name, value, shape in (("weight", weight, (c, c)), ("bias", bias, (c,))):
        check_shape(name, value, shape)
        check_device(name, value, x)
    check_choice("precision", precision, PRECISIONS)
    return weight, bias


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
    x = flow_state("x", x)
    weight, bias = check_mix(x, weight, bias, precision)
    run = operator(conv1x1_op, conv1x1_forward)
    return run(x, *spread(weight, bias, x), precision, None)[0]


def conv1x1_inverse(
    y: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: str = "tf32x3"
) -> Tensor:
    """Undo `conv1x1`: x = W^-1 (y - bias), with W inverted in float64. Arguments as there.

    Raises:
        ValueError: also where weight is singular or not finite.
    """
    y = flow_state("y", y)
    weight, bias = check_mix(y, weight, bias, precision)
    run = operator(conv1x1_op, conv1x1_forward)
    return run(y, *spread(*inverse_mix(weight, bias), y), precision, None)[0]


def inverse_mix(
    weight: Tensor, bias: Tensor, names: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """W^-1 and -W^-1 bias in float64, differentiable, batched over leading axes.

    Args:
        names: of the layers that the weights (K, C, C) are of, for the error.

    Raises:
        ValueError: where a W is singular or not finite.
    """
    weight = weight.double()
    inverse, info = torch.linalg.inv_ex(weight)
    # An infinite W may have a finite inverse.
    finite, inverted = (t.isfinite().flatten(-2).all(-1) for t in (weight, inverse))
    good = finite & inverted & (info == 0)
    captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()  # nothing may be read
    if torch.compiler.is_compiling() or captured:
        pass
    elif not good.all():
        first = int(good.flatten().int().argmin())
        came = "singular" if finite.flatten()[first] else "not finite"
        name = names[first] if names else "weight"
        raise ValueError(f"{name}: expected an invertible matrix, got one that is {came}")
    return inverse, -(inverse @ bias.double().unsqueeze(-1)).squeeze(-1)
