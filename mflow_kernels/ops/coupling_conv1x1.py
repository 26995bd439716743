r"""The fused step: one step's coupling and the next step's 1x1 convolution, in one pass.

    z_a = x_a,  z_b = s * (x_b + shift)            as in `affine_coupling`
    y_p = W z_p + bias                             as in `conv1x1`, actnorm folded in
    logdet = sum over channels and pixels of log s

z is never stored. The launch can also write the input of the next coupling network: a dense copy of
y_a in the network's dtype. The inverse has the same form, with the inverse coupling first:

    x_p = couple^-1(y)_p,   z_p = W x_p + bias

Sampling passes W_k^-1 and -W_k^-1 bias_k as W and bias.

Gradients: g_z = W^T g is computed tile by tile and passed through the coupling's gradient before it
is stored; dW = sum g z^T recomputes z from x and params.
Bytes at least: forward x and params read, y written; backward g, x and params read, dx and dparams
written, and g, x, params once more for dW.
"""

from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import at, strided
from mflow_kernels.ops.channel_products import (
    conv1x1_tile,
    launch_conv1x1,
    launch_product,
    launch_weight_gradient,
    load_gradient,
    tile_and_block,
)
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.conv1x1 import (
    add_to_first_half,
    check_conv1x1,
    conv1x1_backward_ref,
    conv1x1_ref,
    fake_sums,
    spread,
)
from mflow_kernels.ops.coupling import (
    affine_coupling_ref,
    check_params,
    coupling_backward,
    coupling_forward,
)
from mflow_kernels.ops.coupling_kernels import couple_backward, load_params, store_params
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import RUN_TIME, uses_triton
from mflow_kernels.ops.layouts import (
    cut_net_input,
    dense_pixels,
    flow_state,
    in_layout_of,
    net_input,
)
from mflow_kernels.ops.logdet import sum_ledger
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.registration import register
from mflow_kernels.ops.scale import Kind, ScaleFunction, scale_of
from mflow_kernels.ops.tiles import columns, ledger_columns, read_ledger


def coupling_conv1x1_ref(
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: ScaleFunction,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    z, ledger = affine_coupling_ref(x.to(accumulator(x.dtype)), params, scale, inverse)
    return conv1x1_ref(z, weight, bias).to(x.dtype), ledger


@triton.jit(do_not_specialize=RUN_TIME)
def _coupling_conv1x1_bwd_kernel(
    dy,
    dnet,
    x,
    coupling_params,
    weight,
    weight_strides,
    dledger,
    dledger_strides,
    dx,
    dparams,
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
    """dz = W^T dy for a block of channels, passed through the coupling's gradient."""
    BLOCK_P: tl.constexpr = COLUMNS.block
    tile, block = tile_and_block(C, BLOCK_O)
    n, p, valid = columns(tile, N, P, COLUMNS)
    c = block * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (c[:, None] < C) & valid[None, :]
    dz_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
    for start in range(0, C, BLOCK_C):
        o = start + tl.arange(0, BLOCK_C)
        dy_t = load_gradient(dy, dnet, n, o, p, valid, C, DTYPE)
        at_w = weight + c[:, None] * weight_strides[1] + o[None, :] * weight_strides[0]
        w_t = tl.load(at_w, mask=(c[:, None] < C) & (o[None, :] < C), other=0.0)
        dz_t = tl.dot(w_t, dy_t, dz_t, input_precision=PRECISION, out_dtype=DTYPE)
    raw, shift, is_b = load_params(coupling_params, n, c, p, valid, C, DTYPE)
    x_t = tl.load(at(x, n, c, p), mask=is_b, other=0.0).to(DTYPE)
    dlog_s = read_ledger(dledger, dledger_strides, n, p, valid, COLUMNS)
    dx_t, draw, dshift = couple_backward(x_t, raw, shift, is_b, dz_t, dlog_s, SCALE, INVERSE)
    store_params(dparams, draw, dshift, n, c, p, valid, C)
    # Store dx last: before dparams, 8 bytes spill at C = 96 on sm_80.
    tl.store(at(dx, n, c, p), dx_t, mask=inside)


def launch_coupling_conv1x1_backward(
    dy: Tensor,
    dnet: Tensor | None,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    precision: str,
    scale: ScaleFunction,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches: dx and dparams; partial sums of dW and d bias."""
    dy, x, params = dense_pixels(dy), dense_pixels(x), dense_pixels(params)
    dnet = None if dnet is None else dense_pixels(dnet)
    dx, dparams = torch.empty_like(x), torch.empty_like(params)
    tensors = (
        *(strided(dy), strided(dnet), strided(x), strided(params)),
        *(weight, weight.stride()[1:], dledger, dledger.stride()),
        *(strided(dx), strided(dparams)),
    )
    c = x.shape[1]
    tile = conv1x1_tile(c)
    if c > 64:
        # With 4 warps, 128 channels of dz and of the coupling's gradient spill on sm_80. Two
        # programs of 8 warps fit 128 registers. Without this limit, ptxas spills at C = 96 to fit a
        # third one on sm_100. From C = 512 on, sm_90 spills with the limit.
        tile = tile._replace(warps=8, registers=128 if c <= 128 else None)
    launch_product(_coupling_conv1x1_bwd_kernel, tensors, x, precision, scale, inverse, tile)
    sums = launch_weight_gradient(dy, dnet, x, weight, precision, params, scale, inverse)
    return dx, dparams, *sums


@falls_back("coupling_conv1x1")
def coupling_conv1x1_forward(
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor,
    precision: str,
    net_dtype: torch.dtype | None,
    kind: str,
    offset: float,
    eps: float,
    clamp: float,
    order: str,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the network input cut from it, and the ledger, without autograd.

    weight and bias come from `spread`.
    """
    scale = scale_of(kind, offset, eps, clamp, order)
    if uses_triton(x):
        y, net, ledger = launch_conv1x1(
            x, weight[0], bias[0], precision, net_dtype, params, scale, inverse
        )
        assert ledger is not None
        return y, net, ledger
    if cpu.serves_conv1x1(x):
        return cpu.conv1x1(x, weight, bias, net_dtype, params, scale, inverse)
    z, ledger = coupling_forward(x.to(accumulator(x.dtype)), params, *scale.args, inverse)
    y = in_layout_of(x, conv1x1_ref(z, weight[0], bias[0]).to(x.dtype))
    return y, cut_net_input(y, net_dtype), ledger


@falls_back("coupling_conv1x1_backward")
def coupling_conv1x1_backward(
    dy: Tensor,
    dnet_or_empty: Tensor,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor,
    precision: str,
    net_dtype: torch.dtype | None,
    kind: str,
    offset: float,
    eps: float,
    clamp: float,
    order: str,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dparams, and partial sums of dW and d bias."""
    dnet = None if net_dtype is None else dnet_or_empty
    scale = scale_of(kind, offset, eps, clamp, order)
    if uses_triton(x):
        return launch_coupling_conv1x1_backward(
            dy, dnet, dledger, x, params, weight, precision, scale, inverse
        )
    if cpu.serves_conv1x1(x):
        return cpu.coupling_conv1x1_backward(dy, dnet, dledger, x, params, weight, scale, inverse)
    wide = x.to(accumulator(x.dtype))
    z, _ = coupling_forward(wide, params, *scale.args, inverse)
    dy = add_to_first_half(dy.to(z.dtype), dnet)
    dz, dweight, dbias = conv1x1_backward_ref(dy, z, weight[0])
    dx, dparams = coupling_backward(dz, dledger, wide, params, *scale.args, inverse)
    dx = in_layout_of(x, dx.to(x.dtype))
    return dx, in_layout_of(params, dparams), dweight[None], dbias[None]


def _fake(
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor,
    precision: str,
    net_dtype: torch.dtype | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    entries = ledger_columns(x, conv1x1_tile(x.shape[1]).block_p)
    ledger = x.new_empty((x.shape[0], entries), dtype=accumulator(x.dtype))
    return y, net_input(y, net_dtype), ledger


def _fake_backward(
    dy: Tensor,
    dnet: Tensor,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(params), *fake_sums(weight, bias)


coupling_conv1x1_op = register(
    "coupling_conv1x1",
    coupling_conv1x1_forward,
    coupling_conv1x1_backward,
    fake=_fake,
    fake_backward=_fake_backward,
)


def coupling_conv1x1(
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: ScaleFunction | Kind = "tanh",
    *,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:
    """`affine_coupling`, then `conv1x1`, in one pass over the state.

    Args:
        x: state (N, C, *spatial) with C >= 2; float32, float64, float16 or bfloat16; contiguous,
            channels_last and views of halves are read in place.
        params: (N, 2 * (C - C // 2), *spatial), as for `affine_coupling`.
        weight, bias: (C, C) and (C,) or None, as for `conv1x1`.
        scale: the scale function, or the name of one with its defaults.
        precision: "tf32x3" or "tf32", as for `conv1x1`.

    Returns:
        y, shaped and typed as x, and the coupling's logdet (N,), float32 (float64), natural log;
        the caller adds P * log |det W|.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    return _fused_step(flow_state("x", x), params, weight, bias, scale, precision, inverse=False)


def coupling_inverse_conv1x1(
    y: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: ScaleFunction | Kind = "tanh",
    *,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:
    """`affine_coupling_inverse`, then `conv1x1`, in one pass: a step of a sampling chain.

    Pass W^-1 as weight and -W^-1 bias as bias, where W and bias belong to the 1x1 convolution
    before the coupling in the data -> latent direction. Other arguments and results are those of
    `coupling_conv1x1`; logdet is that of the inverse coupling.
    """
    return _fused_step(flow_state("y", y), params, weight, bias, scale, precision, inverse=True)


def _fused_step(
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: ScaleFunction | Kind,
    precision: str,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    params = check_params(x, params, state="y" if inverse else "x")
    spread_weights = spread(*check_conv1x1(x, weight, bias, precision), x)
    args = ScaleFunction.of(scale).args
    y, _, ledger = coupling_conv1x1_op(x, params, *spread_weights, precision, None, *args, inverse)
    return y, sum_ledger(ledger)
