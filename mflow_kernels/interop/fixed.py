"""Linear maps that need no dense gradient: scaled permutations, and matrices that nobody trains.

As one dense matrix, folded with the actnorms around it, such a map would cost a product of C x C
numbers with every pixel, a gradient of C x C numbers, and an inverse in float64. A permutation is
an index instead. A fixed matrix has no gradient, and its layer knows its inverse.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.interop.linear import Linear, Reorder, Row, index_of, read_parts
from mflow_kernels.ops.conv1x1 import add_to_first_half, conv1x1_ref
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.layouts import cut_net_input, in_layout_of, is_channels_last
from mflow_kernels.ops.precision import without_autocast
from mflow_kernels.ops.registration import eager_function
from mflow_kernels.reversible.instructions import (
    FoldedWeights,
    ForwardPass,
    Gradients,
    Instruction,
    Pair,
    Rearrange,
)
from mflow_kernels.reversible.rearrangements import select_channels

if TYPE_CHECKING:
    from mflow_kernels.reversible.backward import BackwardPass


def _composed(parts: Sequence[Linear | Reorder], channels: int, device: torch.device) -> Tensor:
    """The order (C,) that is the composition of the permutations among these parts."""
    order: Tensor | None = None
    for part in parts:
        if part.permutes:
            index = index_of(part, channels, device)
            order = index if order is None else order[index]
    return torch.arange(channels, device=device) if order is None else order


class Permute(Rearrange):
    """Channel permutations that run as one index, read from their layers at each run."""

    def __init__(self, parts: Sequence[Linear | Reorder], inverted: bool = False) -> None:
        self.parts, self.inverted = tuple(parts), inverted

    def apply(self, x: Tensor) -> Tensor:
        order = _composed(self.parts, x.shape[1], x.device)
        return select_channels(x, order.argsort() if self.inverted else order)

    def inverse(self) -> "Permute":
        return Permute(self.parts, not self.inverted)


class ScaledPermutation(Row):
    """y = (scale * x + bias)[order]: actnorms and channel permutations between two couplings.

    Autograd stores y, which the next coupling stores too.
    """

    dense = False

    @staticmethod
    def fold_alike(
        rows: Sequence[Row], dtype: torch.dtype, inverted: bool, check: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """scale (K, C), bias (K, C) and the log-determinant (K,) for one pixel. The first two are
        those of the map data -> latent in both directions."""
        k, channels, device = len(rows), rows[0].channels, rows[0].device
        scale = torch.ones(k, channels, dtype=dtype, device=device)
        bias, log_det = torch.zeros_like(scale), scale.new_zeros(k)
        order: Tensor | None = None  # permutations so far
        for column in zip(*(row.layers for row in rows), strict=True):
            step = read_parts(column, channels, device)
            if step.weight.shape[1] != channels:
                raise ValueError(f"x: expected {step.weight.shape[1]} channels, got {channels}")
            if not step.weight.is_floating_point():
                order = step.weight if order is None else order.gather(1, step.weight)
                continue
            s = step.weight.to(dtype)
            b = torch.zeros_like(s) if step.bias is None else step.bias.to(dtype)
            if order is not None:
                back = order.argsort(1)
                s, b = s.gather(1, back), b.gather(1, back)
            scale, bias = s * scale, s * bias + b
            if step.log_det is not None:
                log_det = log_det + step.log_det.to(dtype)
        return scale, bias, -log_det if inverted else log_det

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor, inverted: bool, net_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        order = _composed(self.layers, self.channels, self.device)
        if transformed() or torch.compiler.is_compiling():
            y = _scaled_ref(x, weight, bias, order, inverted)
            return y, None if net_dtype is None else cut_net_input(y, net_dtype)
        run = _scaled_eager if torch.is_grad_enabled() else _scaled
        y, net = run(x, weight, bias, order, order.argsort(), inverted, net_dtype)
        return y, None if net_dtype is None else net

    def undo(
        self, y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, inverted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        order = _composed(self.layers, self.channels, self.device)
        back, needed = order.argsort(), weight.requires_grad or bias.requires_grad
        gradients = _scaled_gradient(y, dy, weight, bias, order, back, inverted, needed)
        return _scaled(y, weight, bias, order, back, not inverted, None)[0], *gradients


def _scaled_ref(x: Tensor, scale: Tensor, bias: Tensor, order: Tensor, inverted: bool) -> Tensor:
    s, b = (t.view(-1, *(1,) * (x.dim() - 2)) for t in (scale, bias))
    if inverted:
        return ((select_channels(x, order.argsort()) - b) / s).to(x.dtype)
    return select_channels((s * x + b).to(x.dtype), order)


def _scaled(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    order: Tensor,
    back: Tensor,
    inverted: bool,
    net_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`_scaled_ref`, and the network input cut from it."""
    y = select_channels(x, back if inverted else order)
    if not inverted:
        scale, bias = scale.index_select(0, order), bias.index_select(0, order)
    s, b = (t.to(y.dtype).view(-1, *(1,) * (y.dim() - 2)) for t in (scale, bias))
    # `torch.addcmul` takes three times as long on images.
    y = y.sub_(b).div_(s) if inverted else y.mul_(s).add_(b)
    return y, cut_net_input(y, net_dtype)


def _scaled_gradient(
    y: Tensor,
    dy: Tensor,
    scale: Tensor,
    bias: Tensor,
    order: Tensor,
    back: Tensor,
    inverted: bool,
    needed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, and if needed d scale and d bias, from the result y and its gradient."""
    dims = [0, *range(2, y.dim())]
    s = scale.to(dy.dtype).view(-1, *(1,) * (y.dim() - 2))
    dscale = dbias = None
    if inverted:  # y = (x[back] - bias) / scale
        if needed:
            dbias = -dy.sum(dims, dtype=scale.dtype) / scale
            dscale = -(dy * y).sum(dims, dtype=scale.dtype) / scale
        return select_channels(dy / s, order), dscale, dbias
    if needed:
        sums = dy.sum(dims, dtype=scale.dtype), (dy * y).sum(dims, dtype=scale.dtype)
        dbias, products = (t.index_select(0, back) for t in sums)
        dscale = (products - bias * dbias) / scale
    return select_channels(dy, back).mul_(s), dscale, dbias


def _setup_scaled(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(outputs[0], *inputs[1:5])
    ctx.inverted, ctx.cut = inputs[5], inputs[6] is not None


def _scaled_backward(ctx: Any, dy: Tensor, dnet: Tensor) -> tuple[Tensor | None, ...]:
    y, scale, bias, order, back = ctx.saved_tensors
    dy = add_to_first_half(in_layout_of(y, dy), dnet if ctx.cut else None)
    needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    gradients = _scaled_gradient(y, dy, scale, bias, order, back, ctx.inverted, needed)
    return (*gradients, None, None, None, None)


_scaled_eager = eager_function(_scaled, _setup_scaled, _scaled_backward)


class FixedMatrix(Instruction):
    """y = W x at each pixel, or its inverse, with a matrix that nobody trains (`Linear.fixed`)."""

    computes = True

    def __init__(
        self, part: Linear, channels: int, device: torch.device, inverted: bool = False
    ) -> None:
        self.part, self.inverted = part, inverted
        self.channels, self.device = channels, device

    def inverse(self) -> "FixedMatrix":
        return FixedMatrix(self.part, self.channels, self.device, not self.inverted)

    def fold(self, dtype: torch.dtype, *, check: bool = False) -> FoldedWeights:
        """The matrix and its inverse (C, C), and the log-determinant for one pixel.

        Only rebuilding a state reads the inverse.
        """
        step = read_parts([self.part], self.channels, self.device)
        assert step.inverse is not None
        weight, inverse = step.weight[0].to(dtype), step.inverse[0].to(dtype)
        log_det = weight.new_zeros(()) if step.log_det is None else step.log_det[0].to(dtype)
        if self.inverted:
            weight, inverse, log_det = inverse, weight, -log_det
        if dtype == torch.float64 and not torch.compiler.is_compiling():
            # The layer's inverse may be rounded to float32. One step of Newton's method gives one
            # that rebuilds states to float64.
            inverse = 2 * inverse - inverse @ weight @ inverse
        return FoldedWeights(weight, inverse, log_det)

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        assert folded is not None
        eager = torch.is_grad_enabled() and not (transformed() or torch.compiler.is_compiling())
        forward.x = (_product_eager if eager else _product)(forward.x, folded.weight)

    def undo(self, backward: "BackwardPass", folded: Pair | None) -> Gradients | None:
        assert folded is not None
        weight, inverse = folded
        y, dy = backward.whole()
        backward.set(_product(y, inverse), _product(dy, weight.mT))
        return None, None


_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """weight @ x at each pixel, in the layout of x."""
    if x.dtype != weight.dtype or x.dim() not in _CONVOLUTIONS:
        return in_layout_of(x, conv1x1_ref(x, weight, None))
    with without_autocast(x):
        kernel = weight.reshape(*weight.shape, *(1,) * (x.dim() - 2))
        y = _CONVOLUTIONS[x.dim()](x, kernel)
    return y if transformed() or is_channels_last(x) == is_channels_last(y) else in_layout_of(x, y)


def _setup_product(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _product_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return _product(dy, weight.mT), None


_product_eager = eager_function(_product, _setup_product, _product_backward)
