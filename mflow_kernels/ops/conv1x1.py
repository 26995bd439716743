r"""Invertible 1x1 convolution: one matrix multiplies the channels of every pixel.

    y_p = W x_p + bias            (Glow, arXiv 1807.03039, section 3.2)

Actnorm is folded in: W' = W diag(exp(log_scale)) and bias' = W' bias. The inverse is this operator
with W^-1 and -W^-1 bias. The layer computes log |det W|, because it knows the factors of W.

Gradients, with g = d loss / d y:
    dx_p = W^T g_p,   dW = sum over samples and pixels of g_p x_p^T,   d bias = sum of g_p

The launch can also write the input of the next coupling network, a dense copy of y_a in the
network's dtype. The backward launch adds the gradient of this copy to that of y.

The kernels are in `channel_products.py`; the fused step (`coupling_conv1x1`) uses them too.

Shapes: x (N, C, *spatial), weight (C, C), bias (C,). dtypes: products of float32 states are summed
in float32 on the tensor cores with three tf32 products each ("tf32x3", within float32 rounding);
float64 in float64; float16 and bfloat16 states are upcast to float32.
Bytes at least: forward x read and y written; backward g and x read, dx written. A program holds all
output channels of its pixels up to C = 128; above that each block of 128 reads the state again.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.channel_products import (
    launch_conv1x1,
    launch_weight_gradient,
    weight_gradient_splits,
)
from mflow_kernels.ops.checks import check_choice, check_device, check_shape, check_tensor
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import capturing, cusolver, transformed, uses_triton
from mflow_kernels.ops.layouts import cut_net_input, flow_state, halves, in_layout_of, net_input
from mflow_kernels.ops.precision import accumulator, without_autocast
from mflow_kernels.ops.registration import register

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
    """Add the gradient of the network input, which was cut from y, to the gradient of y."""
    if dnet is None:
        return dy
    dy = dy.clone(memory_format=torch.preserve_format)
    dy[:, : dnet.shape[1]] += dnet
    return dy


def spread(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Expand weight (..., C, C) and bias (..., C) by an axis of `splits` entries, without a copy.

    The backward launch can then return its partial sums as the gradient of that axis. One reduction
    adds them for all steps that were spread together, in a fixed order.
    """
    splits, c, dtype = weight_gradient_splits(x), x.shape[1], accumulator(x.dtype)
    weight, bias = weight.to(dtype).unsqueeze(-3), bias.to(dtype).contiguous().unsqueeze(-2)
    return (
        weight.expand(*weight.shape[:-3], splits, c, c),
        bias.expand(*bias.shape[:-2], splits, c),
    )


@falls_back("conv1x1")
def conv1x1_forward(
    x: Tensor, weight: Tensor, bias: Tensor, precision: str, net_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """y and the network input cut from it, without autograd. weight and bias come from `spread`."""
    if uses_triton(x):
        y, net, _ = launch_conv1x1(x, weight[0], bias[0], precision, net_dtype)
        return y, net
    if cpu.serves_conv1x1(x):
        return cpu.conv1x1(x, weight, bias, net_dtype)[:2]
    y = in_layout_of(x, conv1x1_ref(x, weight[0], bias[0]))
    return y, cut_net_input(y, net_dtype)


@falls_back("conv1x1_backward")
def conv1x1_backward(
    dy: Tensor,
    dnet_or_empty: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    precision: str,
    net_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and partial sums of dW and d bias. Without net_dtype, there is no network input."""
    dnet = None if net_dtype is None else dnet_or_empty
    if uses_triton(x):
        dx, _, _ = launch_conv1x1(dy, weight[0].t(), None, precision, dnet=dnet)
        return in_layout_of(x, dx), *launch_weight_gradient(dy, dnet, x, weight, precision)
    if cpu.serves_conv1x1(x):
        dx = torch.empty_like(x)
        _, _, dweight, dbias = cpu.conv1x1_backward(halves(x), halves(dy), dnet, weight, dx)
        return dx, dweight, dbias
    dx, dweight, dbias = conv1x1_backward_ref(add_to_first_half(dy, dnet), x, weight[0])
    return in_layout_of(x, dx), dweight[None], dbias[None]


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, precision: str, net_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    return y, net_input(y, net_dtype)


def fake_sums(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Empty partial sums of dW and d bias."""
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _fake_backward(
    dy: Tensor, dnet: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *fake_sums(weight, bias)


conv1x1_op = register(
    "conv1x1", conv1x1_forward, conv1x1_backward, fake=_fake, fake_backward=_fake_backward
)


def check_conv1x1(x: Tensor, weight: object, bias: object, precision: str) -> tuple[Tensor, Tensor]:
    """Return weight (C, C) and bias (C,) after checks against x; a bias of None becomes zeros."""
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

    Its log-determinant is P * log |det W|; the caller computes it.

    Args:
        x: state (N, C, *spatial); float32, float64, float16 or bfloat16; contiguous, channels_last
            and views of halves are read in place.
        weight: (C, C).
        bias: (C,) or None.
        precision: how float32 products run on tensor cores: "tf32x3", within float32 rounding, or
            "tf32", which is faster and accurate to about 1e-3. Only CUDA uses it.

    Returns:
        y, shaped and typed as x.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    x = flow_state("x", x)
    weight, bias = check_conv1x1(x, weight, bias, precision)
    return conv1x1_op(x, *spread(weight, bias, x), precision, None)[0]


def conv1x1_inverse(
    y: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: str = "tf32x3"
) -> Tensor:
    """The inverse of `conv1x1`: x = W^-1 (y - bias), with W inverted in float64. Same arguments.

    If gradients are recorded, a singular or infinite weight gives NaN, because a check would make
    the host wait for the device. Under `torch.no_grad` it is an error.

    Raises:
        ValueError: as `conv1x1`, and if no gradients are recorded, for a weight that is singular or
            not finite.
    """
    y = flow_state("y", y)
    weight, bias = check_conv1x1(y, weight, bias, precision)
    inverted = inverse_weight_and_bias(weight, bias, check=not torch.is_grad_enabled())
    return conv1x1_op(y, *spread(*inverted, y), precision, None)[0]


def _readable(x: Tensor) -> bool:
    """Whether the host may read values of x now."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    return not capturing(x.device)


def invert(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W^-1 and LAPACK's info, which is 0 unless W is singular. The host never waits for them."""
    real = not (torch.compiler.is_compiling() or isinstance(weight, FakeTensor))
    with cusolver() if weight.is_cuda and real else nullcontext():
        return torch.linalg.inv_ex(weight)


def inverse_weight_and_bias(
    weight: Tensor, bias: Tensor, names: Sequence[str] | None = None, *, check: bool
) -> tuple[Tensor, Tensor]:
    """W^-1 and -W^-1 bias in float64, differentiable, batched over leading axes.

    W^-1 is NaN where W is singular or not finite, so that a loss computed with it is not finite.

    Args:
        names: names of the layers that the weights (K, C, C) belong to, for the error.
        check: raise an error instead of returning NaN. The host then waits for the device, so
            training does not check. Compiled and captured code cannot wait, so it never checks.

    Raises:
        ValueError: with `check`, a W that is singular or not finite.
    """
    if not (transformed() or torch.compiler.is_compiling()):
        return _InverseWeightAndBias.apply(weight, bias, names, check)
    return _inverse_weight_and_bias(weight, bias, names, check)


def _inverse_weight_and_bias(
    weight: Tensor, bias: Tensor, names: Sequence[str] | None, check: bool
) -> tuple[Tensor, Tensor]:
    weight = weight.double()
    inverse, info = invert(weight)
    # An infinite W may have a finite inverse.
    finite, inverted = (t.isfinite().flatten(-2).all(-1) for t in (weight, inverse))
    good = finite & inverted & (info == 0)
    if check and _readable(weight) and not good.all():
        first = int(good.flatten().int().argmin())
        infinite = not finite.flatten()[first]
        raise not_invertible(names[first] if names else "weight", infinite)
    # LAPACK returns finite numbers for a singular W.
    missing = good.logical_not().unsqueeze(-1).unsqueeze(-1)
    inverse = inverse.masked_fill(missing, math.nan)
    return inverse, -(inverse @ bias.double().unsqueeze(-1)).squeeze(-1)


def not_invertible(name: str, infinite: bool) -> ValueError:
    fault = "not finite" if infinite else "singular"
    return ValueError(f"{name}: expected an invertible matrix, got one that is {fault}")


class _InverseWeightAndBias(torch.autograd.Function):
    """`inverse_weight_and_bias` as one node, which stores the inverse alone."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, names: Sequence[str] | None, check: bool
    ) -> tuple[Tensor, Tensor]:
        inverse, inverse_bias = _inverse_weight_and_bias(weight, bias, names, check)
        ctx.dtypes = weight.dtype, bias.dtype
        ctx.save_for_backward(inverse, bias)
        return inverse, inverse_bias

    @staticmethod
    def backward(ctx: Any, dinverse: Tensor, dinverse_bias: Tensor) -> tuple[Tensor | None, ...]:
        """With R = W^-1 and r = -R b: db = -R^T dr, dW = -R^T (dR - dr b^T) R^T."""
        inverse, bias = ctx.saved_tensors
        dinverse_bias = dinverse_bias.unsqueeze(-1)
        dinverse = dinverse - dinverse_bias @ bias.double().unsqueeze(-2)
        dweight = -(inverse.mT @ (dinverse @ inverse.mT))
        dbias = -(inverse.mT @ dinverse_bias).squeeze(-1)
        return dweight.to(ctx.dtypes[0]), dbias.to(ctx.dtypes[1]), None, None
