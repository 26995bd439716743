r"""Affine coupling: scale and shift one half of the channels by a function of the other half.

    x = (x_a, x_b),  params = net(x_a) = (raw, shift),  s = scale(raw)
    y_a = x_a,  y_b = s * (x_b + shift)            logdet = sum over channels and pixels of log s

With the order "scale-shift", y_b = s * x_b + shift. The inverse has the same params, because the
network reads the half that passes through.

Gradients, with g = d loss / d y_b and l = d loss / d logdet (order "shift-scale"):
    d x_b = s * g,   d shift = s * g,   d raw = (g * y_b + l) * d log s / d raw

Shapes: x (N, C, *spatial), params (N, 2 * C_b, *spatial), C_a = C // 2, C_b = C - C_a.
dtypes: computed in float32 (float64 for float64 states); y has x's dtype, logdet is float32
(float64). params may be of a lower precision than x, as under autocast.
Bytes at least: forward x and params read, y written; backward also d y read, d x, d params written.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import strided
from mflow_kernels.ops.checks import check_device, check_shape
from mflow_kernels.ops.coupling_kernels import _coupling_bwd_kernel, _coupling_fwd_kernel
from mflow_kernels.ops.elementwise import launch_elementwise
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import uses_triton
from mflow_kernels.ops.layouts import dense_pixels, flow_state, in_layout_of
from mflow_kernels.ops.logdet import sum_ledger
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.registration import gradients_of, register
from mflow_kernels.ops.scale import Kind, ScaleFunction, log_scale_ref, scale_of
from mflow_kernels.ops.tiles import elementwise_tile, ledger_columns


def couple_ref(
    x_b: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y_b and log |dy_b / dx_b|, elementwise."""
    dtype, sign = accumulator(x_b.dtype), -1 if inverse else 1
    raw, shift = params.to(dtype).chunk(2, dim=1)
    x_b, log_s = x_b.to(dtype), sign * log_scale_ref(raw, scale)
    if scale.shifts_first == inverse:
        return log_s.exp() * x_b + sign * shift, log_s
    return log_s.exp() * (x_b + sign * shift), log_s


def affine_coupling_ref(
    x: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool
) -> tuple[Tensor, Tensor]:
    c_a = x.shape[1] // 2
    y_b, log_s = couple_ref(x[:, c_a:], params, scale, inverse)
    y = torch.cat([x[:, :c_a], y_b.to(x.dtype)], dim=1)
    return y, log_s.sum(dim=tuple(range(1, log_s.dim())))[:, None]


def _empty(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Uninitialized y and ledger."""
    entries = ledger_columns(x, elementwise_tile(x)[1])
    return torch.empty_like(x), x.new_empty((x.shape[0], entries), dtype=accumulator(x.dtype))


def launch_coupling(
    x: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool
) -> tuple[Tensor, Tensor]:
    """One launch: y, and the ledger (N, T) of its tiles' sums of log s."""
    x, params = dense_pixels(x), dense_pixels(params)
    y, ledger = _empty(x)
    tensors = strided(x), strided(params), strided(y), ledger
    launch_elementwise(
        _coupling_fwd_kernel, x, *tensors, C=x.shape[1], SCALE=scale, INVERSE=inverse
    )
    return y, ledger


def launch_coupling_backward(
    dy: Tensor, dledger: Tensor, x: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool
) -> tuple[Tensor, Tensor]:
    """One launch: (dx, dparams) from the coupling's input."""
    dy, x, params = dense_pixels(dy), dense_pixels(x), dense_pixels(params)
    dx, dparams = torch.empty_like(x), torch.empty_like(params)
    tensors = strided(x), strided(params), strided(dy), dledger, dledger.stride()
    results = strided(dx), strided(dparams)
    launch_elementwise(
        _coupling_bwd_kernel, x, *tensors, *results, C=x.shape[1], SCALE=scale, INVERSE=inverse
    )
    return dx, dparams


@falls_back("affine_coupling")
def coupling_forward(
    x: Tensor,
    params: Tensor,
    kind: str,
    offset: float,
    eps: float,
    clamp: float,
    order: str,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """y and the ledger, without autograd."""
    scale = scale_of(kind, offset, eps, clamp, order)
    if uses_triton(x):
        return launch_coupling(x, params, scale, inverse)
    if cpu.serves(x):
        return cpu.change_half("coupling", x, params, scale.args, x.shape[1] // 2, inverse)
    y, ledger = affine_coupling_ref(x, params, scale, inverse)
    return in_layout_of(x, y), ledger


@falls_back("affine_coupling_backward")
def coupling_backward(
    dy: Tensor,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    kind: str,
    offset: float,
    eps: float,
    clamp: float,
    order: str,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dparams."""
    scale = scale_of(kind, offset, eps, clamp, order)
    if uses_triton(x):
        return launch_coupling_backward(dy, dledger, x, params, scale, inverse)
    if cpu.serves(x):
        how = scale.args, x.shape[1] // 2, inverse
        dx, dparams = cpu.change_half_backward("coupling", dy, dledger[:, :1], x, params, *how)
        return in_layout_of(x, dx), in_layout_of(params, dparams)
    reference = partial(affine_coupling_ref, scale=scale, inverse=inverse)
    dx, dparams = gradients_of(reference, (x, params), (dy, dledger[:, :1]))
    return in_layout_of(x, dx), in_layout_of(params, dparams)


affine_coupling_op = register("affine_coupling", coupling_forward, coupling_backward, fake=_empty)


def check_params(x: Tensor, params: object, name: str = "params", state: str = "x") -> Tensor:
    """Check that x can be coupled and that params are (N, 2 * C_b, *spatial), on its device.

    Errors call them `state` and `name`. Returns params, copied if kernels cannot read them.
    """
    n, c, *sides = x.shape
    expected = (n, 2 * (c - c // 2), *sides)
    if type(params) is Tensor and params.shape == expected and c > 1:
        usual = params.dtype == x.dtype and params.device == x.device
        if usual and params.numel() < 2**31:
            return dense_pixels(params)  # without the checks that find the fault
    params = flow_state(name, params)
    if c < 2:
        shape = tuple(x.shape)
        raise ValueError(f"{state}: expected at least 2 channels to couple, got shape {shape}")
    check_shape(name, params, expected)
    check_device(name, params, x)
    if params.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"{name}: expected a dtype no wider than {state}'s {x.dtype}, got float64")
    return params


def affine_coupling(
    x: Tensor, params: Tensor, scale: ScaleFunction | Kind = "tanh"
) -> tuple[Tensor, Tensor]:
    """Scale and shift the second half of the channels (RealNVP, arXiv 1605.08803, section 3.2).

    Args:
        x: state (N, C, *spatial) with C >= 2; float32, float64, float16 or bfloat16; contiguous,
            channels_last and views of halves are read in place.
        params: (N, 2 * (C - C // 2), *spatial): the network's raw scales, then its shifts. Any of
            these dtypes; float64 only if x is float64.
        scale: the scale function, or the name of one with its defaults.

    Returns:
        y, shaped and typed as x, and logdet (N,), float32 (float64), natural log.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    x = flow_state("x", x)
    args = ScaleFunction.of(scale).args
    y, ledger = affine_coupling_op(x, check_params(x, params), *args, False)
    return y, sum_ledger(ledger)


def affine_coupling_inverse(
    y: Tensor, params: Tensor, scale: ScaleFunction | Kind = "tanh"
) -> tuple[Tensor, Tensor]:
    """The inverse of `affine_coupling`: x, and the negative of its logdet. Same arguments."""
    y = flow_state("y", y)
    args = ScaleFunction.of(scale).args
    x, ledger = affine_coupling_op(y, check_params(y, params, state="y"), *args, True)
    return x, sum_ledger(ledger)
