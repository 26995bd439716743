"""Masked autoregressive maps of other libraries, with the inverse in one pass's work."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels.interop.linear import constant
from mflow_kernels.interop.masked_networks import Extra, Made, Network, Operations, planar
from mflow_kernels.interop.parts import Elementwise, Part
from mflow_kernels.interop.splines import spline_of
from mflow_kernels.ops.masked_autoregressive import (
    MaskedInverse,
    Transform,
    elementwise,
    masked_autoregressive,
)
from mflow_kernels.ops.masked_network import Affine, Pick
from mflow_kernels.ops.scale import ScaleFunction


class Coordinates(Protocol):
    """The coordinates of the data and of the latents in which an elementwise map is ours."""

    def enter(self, x: Tensor, latent: bool) -> Tensor: ...

    def leave(self, x: Tensor, latent: bool) -> Tensor: ...

    def start(self, made: Operations, x: Tensor) -> None:
        """Append `leave` of data."""


class Autoregressive(nn.Module):
    """z_i = T(x_i; params_i(x_<i)), in any order of the variables.

    If the network is no list of operations, the library's own code computes it, for the inverse
    once for each variable.

    Args:
        net: maps x to the params of T. It reads the library's coordinates.
        transform: T.
        coordinates: those of T; None if they are the library's.
    """

    def __init__(
        self, net: Network, transform: Transform, coordinates: Coordinates | None = None
    ) -> None:
        super().__init__()
        self.net, self.transform, self.coordinates = net, transform, coordinates
        self.in_one_pass = MaskedInverse()

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        net, at = self.net, self.coordinates
        if at is None and net.is_listed():
            operations = net.operations(x, *context)
            return masked_autoregressive(x, operations, self.transform, net.contexts(*context))
        params = net(x, *context)
        if at is None:
            return elementwise(x, params, self.transform, False)
        z, logdet = elementwise(at.enter(x, False), params, self.transform, False)
        return at.leave(z, True), logdet

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        net, at = self.net, self.coordinates
        if at is not None:
            z = at.enter(z, True)
        if net.is_listed():
            operations = net.operations(z, *context, start=at and at.start)
            x, logdet = self.in_one_pass(z, operations, self.transform, net.contexts(*context))
            return x if at is None else at.leave(x, False), logdet
        x, logdet = torch.zeros_like(z), z.new_zeros(len(z))
        for _ in range(z.shape[1]):
            x, logdet = elementwise(z, net(x, *context), self.transform, True)
            x = x if at is None else at.leave(x, False)
        return x, logdet


class Scaled:
    """Features in units of their bounds, which are a tensor of a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def _bound(self) -> Tensor:
        bound: Tensor = getattr(self.module, self.name)
        return bound

    def enter(self, x: Tensor, latent: bool) -> Tensor:
        return x / self._bound()

    def leave(self, x: Tensor, latent: bool) -> Tensor:
        return x * self._bound()

    def start(self, made: Operations, x: Tensor) -> None:
        made.scale(self._bound())


def affine_parts(layer: Any, module: Any, scale: ScaleFunction) -> tuple[Part, ...] | str:
    """The parts of a `MaskedAffineAutoregressive(Transform)` in its forward direction.

    Args:
        module: the library's module with MADE.
    """
    net = Made(layer.autoregressive_net, module, planar(layer.features, 0))
    if net.why:
        return f"{net.why}, so it would not be faster"
    return (Elementwise(Autoregressive(net, scale), "autoregressive affine map"),)


def spline_parts(layer: Any, module: Any) -> tuple[Part, ...] | str:
    """The same of a `MaskedPiecewiseRationalQuadraticAutoregressive(Transform)`."""
    net = layer.autoregressive_net
    scaled = isinstance(layer.tail_bound, Tensor)
    tails = layer.tails
    finish = None
    if isinstance(tails, (list, tuple)):
        tails = "circular"
        finish = _mixed(tuple(layer.tails), layer.num_bins, layer.min_derivative)
    spline = spline_of(layer, layer.num_bins, tails, 1.0 if scaled else layer.tail_bound, net)
    if isinstance(spline, str):
        return spline
    made = Made(net, module, finish)
    what = "autoregressive spline"
    if made.why:
        what += f" (inverted by a pass for each feature, as {made.why})"
    at = Scaled(layer, "tail_bound") if scaled and layer.tails is not None else None
    return (Elementwise(Autoregressive(made, spline, at), what),)


def _mixed(tails: tuple[str, ...], bins: int, min_slope: float) -> Extra:
    """Makes numbers of circular splines from normflows', which have a slope more.

    A spline with linear tails is a circular one whose slope at the ends is 1.
    """
    numbers = 3 * bins
    order = tuple(i * (numbers + 1) + k for i in range(len(tails)) for k in range(numbers))
    fixed = [tail == "linear" and k == 2 * bins for tail in tails for k in range(numbers)]
    weight = tuple(0.0 if f else 1.0 for f in fixed)
    slope = math.log(math.expm1(1 - min_slope))
    bias = tuple(slope if f else 0.0 for f in fixed)

    def finish(made: Operations, x: Tensor) -> None:
        made.put(Pick, constant(order, x.device))
        made.put(Affine, *(constant(t, x.device, x.dtype) for t in (weight, bias)))

    return finish
