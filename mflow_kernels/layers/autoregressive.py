"""Masked autoregressive layers."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.masked_network import MaskedNetwork
from mflow_kernels.ops.checks import check_channels, check_choice, check_count, check_device
from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.ops.masked_autoregressive import MaskedAutoregression, Transform, numbers_of
from mflow_kernels.ops.masked_network import ActivationKind
from mflow_kernels.ops.precision import autocast_dtype
from mflow_kernels.ops.scale import Kind, ScaleFunction
from mflow_kernels.ops.spline import SplineOptions, make_spline

TransformKind = Literal["affine", "spline"]

# The scale of nflows' MaskedAffineAutoregressiveTransform.
SOFTPLUS = ScaleFunction("softplus", eps=1e-3, clamp=1e30, order="scale-shift")


class MaskedAutoregressive(Bijection):
    """z_i = T(x_i; params_i(x_<i)), with params from a masked network (MAF, arXiv 1705.07057).

    `forward` takes one pass of the network. `inverse` takes the multiplications of one pass too,
    whatever the number of variables; see `ops.masked_autoregressive`.

    Args:
        features: D >= 1 of the states (N, D).
        transform: "affine", z = s x + shift, or "spline", monotone rational-quadratic splines.
        width: number of units of each hidden layer.
        depth: number of residual blocks of two layers, or of hidden layers if not `residual`.
        residual: whether the network has residual blocks, as nflows' has.
        activation: of the hidden units: relu, leaky_relu, elu, selu, celu, tanh, sigmoid, silu,
            gelu, gelu_tanh or softplus.
        order: the variables in the order in which each depends on those before it. By default
            0, 1, ..., D - 1.
        scale: the scale function of "affine", or the name of one with its defaults. The default is
            nflows', softplus(raw) + 1e-3.
        bins, bound, options: of "spline", the fields of `ops.Spline`.
        context_channels: K. If positive, `layer(x, context)` takes a context (N, K).

    The layer starts as the identity.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        features: int,
        transform: TransformKind = "affine",
        *,
        width: int = 64,
        depth: int = 2,
        residual: bool = True,
        activation: ActivationKind = "relu",
        order: Sequence[int] | None = None,
        scale: ScaleFunction | Kind = SOFTPLUS,
        bins: int = 8,
        bound: float | tuple[float, float] = 3.0,
        context_channels: int = 0,
        **options: Unpack[SplineOptions],
    ) -> None:
        super().__init__()
        check_count("features", features, 1)
        check_choice("transform", transform, get_args(TransformKind))
        self.channels: int = features
        self.order = tuple(range(features)) if order is None else tuple(int(i) for i in order)
        if sorted(self.order) != [*range(features)]:
            raise ValueError(f"order: expected the numbers 0 to {features - 1}, got {self.order}")
        self.transform: Transform
        if transform == "spline":
            self.transform = make_spline(bins, bound, options)
        else:
            self.transform = ScaleFunction.of(scale)
            if options:
                raise TypeError(f"{next(iter(options))}: expected only with transform='spline'")
        numbers, planar = numbers_of(self.transform), transform == "affine"
        how = width, depth, residual, activation, context_channels
        self.net = MaskedNetwork(self.order, numbers, planar, *how)
        with torch.no_grad():
            self.net.last.bias.fill_(self.transform.identity)
            if planar:
                self.net.last.bias[features:] = 0.0
        self._map = MaskedAutoregression()

    @property
    def context_channels(self) -> int:
        return self.net.context_channels

    def _checked(self, name: str, value: object) -> Tensor:
        x = flow_state(name, value)
        check_channels(name, x, self.channels, ())
        weight = self.net.first.weight
        check_device(name, x, weight)
        if autocast_dtype(x) != autocast_dtype(weight):
            expected, actual = (str(t.dtype).removeprefix("torch.") for t in (weight, x))
            raise TypeError(f"{name}: expected the network's dtype {expected}, got {actual}")
        return x

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x = self._checked("x", x)
        contexts = self.net.of_context(x, *context)
        return self._map.forward(x, self.net.operations(), self.transform, contexts)

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z = self._checked("z", z)
        contexts = self.net.of_context(z, *context)
        return self._map.inverse(z, self.net.operations(), self.transform, contexts)
