"""Couplings as parts of steps of flow: how each runs, and how the backward pass undoes it."""

from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_shape, check_tensor
from mflow_kernels.ops.coupling import affine_coupling_op, check_params
from mflow_kernels.ops.coupling_conv1x1 import coupling_conv1x1_op
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.ops.rational_quadratic import (
    check_numbers,
    rational_quadratic_op,
    spline_backward,
    spline_forward,
)
from mflow_kernels.ops.rebuild_coupling import RebuiltCoupling, rebuild_coupling
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import Spline
from mflow_kernels.reversible.instructions import Call, Directed, Pair
from mflow_kernels.reversible.masks import mask_at

PRECISION = "tf32x3"


class Couple(Directed):
    """A coupling, or its inverse: the first half of the channels (rounded down) stays, and the
    network's output for it, params, says how the second half changes.

    Attributes:
        fuses: whether one launch does the coupling and a linear map after it.
    """

    fuses = False

    def __init__(self, net: nn.Module, inverted: bool) -> None:
        self.net, self.inverted = net, inverted

    def call(self, masked: bool) -> Call:
        """The call of the network; with a mask, its output at padding is that of the identity."""
        return Call(self.net, self.masked_net if masked else self.net)

    def masked_net(self, x_a: Tensor, mask: Tensor, *context: Tensor) -> Any:
        valid = mask_at(mask, x_a)
        # The product also removes the gradient that a convolution returns for padding.
        params = self.net(x_a * valid, valid, *context)
        return self.masked(params, valid) if isinstance(params, Tensor) else params

    def masked(self, params: Tensor, valid: Tensor) -> Tensor:
        """params with those of the identity where `valid` is 0."""
        raise NotImplementedError

    def checked(self, x: Tensor, params: object) -> Tensor:
        """The params for the state x; raise TypeError or ValueError if they do not fit it."""
        raise NotImplementedError

    def run(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, and its ledger (N, T)."""
        raise NotImplementedError

    def run_with_linear(
        self, x: Tensor, params: Tensor, weights: Pair, net_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after the linear map that follows, the input of the next network, cut from it
        in this dtype, and the ledger. Only if it `fuses`."""
        raise NotImplementedError

    def undo(
        self, z_b: Tensor, dz_b: Tensor, dlogdet: Tensor, params: Tensor, true_b: Tensor | None
    ) -> RebuiltCoupling:
        """Rebuild the second half of the state before the coupling, and compute its gradient and
        that of params. If that half was stored, it is `true_b`, and they are the gradients there.
        """
        raise NotImplementedError


class AffineCouple(Couple):
    """The affine coupling with this network, or its inverse."""

    fuses = True

    def __init__(self, net: nn.Module, scale: ScaleFunction, inverted: bool = False) -> None:
        super().__init__(net, inverted)
        self.scale = scale

    def masked(self, params: Tensor, valid: Tensor) -> Tensor:
        if self.scale.identity == 0:
            return params * valid.to(params.dtype)
        raw, shift = params.to(valid.dtype).chunk(2, dim=1)
        return torch.cat([torch.where(valid > 0, raw, self.scale.identity), shift * valid], dim=1)

    def checked(self, x: Tensor, params: object) -> Tensor:
        return check_params(x, params, "net's output")

    def run(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling_op(x, params, *self.scale.args, self.inverted)

    def run_with_linear(
        self, x: Tensor, params: Tensor, weights: Pair, net_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        how = PRECISION, net_dtype, *self.scale.args, self.inverted
        return coupling_conv1x1_op(x, params, *weights, *how)

    def undo(
        self, z_b: Tensor, dz_b: Tensor, dlogdet: Tensor, params: Tensor, true_b: Tensor | None
    ) -> RebuiltCoupling:
        return rebuild_coupling(z_b, dz_b, dlogdet, params, self.scale, self.inverted, true_b)


class AdditiveCouple(AffineCouple):
    """The coupling y_b = x_b + shift, or its inverse: the network returns the shift (N, C_b, ...).

    The launches are those of an affine coupling with raw = 0 and s = exp(0).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, ScaleFunction.of("exp"))

    def checked(self, x: Tensor, params: object) -> Tensor:
        shift = check_tensor("net's output", params)
        check_shape("net's output", shift, (len(x), x.shape[1] - x.shape[1] // 2, *x.shape[2:]))
        return super().checked(x, torch.cat([torch.zeros_like(shift), shift], dim=1))

    def undo(
        self, z_b: Tensor, dz_b: Tensor, dlogdet: Tensor, params: Tensor, true_b: Tensor | None
    ) -> RebuiltCoupling:
        shift, dshift = (-params, -dz_b) if self.inverted else (params, dz_b)
        return RebuiltCoupling((z_b - shift).to(z_b.dtype), dz_b, dshift.to(params.dtype))


class SplineCouple(Couple):
    """The coupling by splines with this network, or its inverse."""

    def __init__(self, net: nn.Module, spline: Spline, inverted: bool = False) -> None:
        super().__init__(net, inverted)
        self.spline = spline

    def masked(self, params: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid > 0, params, self.spline.identity)

    def checked(self, x: Tensor, params: object) -> Tensor:
        return check_numbers(x, params, self.spline, x.shape[1] // 2, "net's output")

    def run(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        how = *self.spline.args, x.shape[1] // 2, self.inverted
        return rational_quadratic_op(x, params, *how)

    def undo(
        self, z_b: Tensor, dz_b: Tensor, dlogdet: Tensor, params: Tensor, true_b: Tensor | None
    ) -> RebuiltCoupling:
        how = self.spline.args
        y_b, _ = spline_forward(z_b, params, *how, 0, not self.inverted)
        at_b = y_b if true_b is None else true_b
        dledger = dlogdet[:, None].expand(-1, pixels(z_b))
        dy_b, dparams = spline_backward(dz_b, dledger, at_b, params, *how, 0, self.inverted)
        return RebuiltCoupling(y_b, dy_b, dparams)
