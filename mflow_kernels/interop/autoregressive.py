"""Masked autoregressive maps of other libraries, with the inverse in one pass's work."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels.interop.linear import constant
from mflow_kernels.interop.masked_networks import Made, MadeKinds, Network, Operations, Planar
from mflow_kernels.interop.parts import Elementwise, Part
from mflow_kernels.interop.splines import spline_of
from mflow_kernels.ops.masked_autoregressive import MaskedAutoregression, Transform, elementwise
from mflow_kernels.ops.masked_network import Affine, Pick, network_ref
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
        self.run = MaskedAutoregression()

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        net, at = self.net, self.coordinates
        if not net.is_listed():
            params = net(x, *context)
        else:
            operations, contexts = net.operations(x, *context), net.contexts(*context)
            if at is None:
                return self.run.forward(x, operations, self.transform, contexts)
            params = network_ref(operations, x, contexts)
        if at is None:
            return elementwise(x, params, self.transform, False)
        z, logdet = elementwise(at.enter(x, False), params, self.transform, False)
        return at.leave(z, True), logdet

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        net, at = self.net, self.coordinates
        if at is not None:
            z = at.enter(z, True)
        if net.is_listed():
            start = None if at is None else at.start
            operations = net.operations(z, *context, start=start)
            contexts = net.contexts(*context)
            x, logdet = self.run.inverse(z, operations, self.transform, contexts)
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


def affine_parts(layer: Any, kinds: MadeKinds, scale: ScaleFunction) -> tuple[Part, ...] | str:
    """The parts of a `MaskedAffineAutoregressive(Transform)` in its forward direction.

    Args:
        kinds: the classes of its network.
    """
    net = Made(layer.autoregressive_net, kinds, Planar(layer.features, 0))
    if net.why:
        return f"{net.why}, so it would not be faster"
    return (Elementwise(Autoregressive(net, scale), "autoregressive affine map"),)


def spline_parts(layer: Any, kinds: MadeKinds) -> tuple[Part, ...] | str:
    """The same of a `MaskedPiecewiseRationalQuadraticAutoregressive(Transform)`."""
    net = layer.autoregressive_net
    scaled = isinstance(layer.tail_bound, Tensor)
    tails = layer.tails
    finish = None
    if isinstance(tails, (list, tuple)):
        tails = "circular"
        finish = _Circular(tuple(layer.tails), layer.num_bins, layer.min_derivative)
    spline = spline_of(layer, layer.num_bins, tails, 1.0 if scaled else layer.tail_bound, net)
    if isinstance(spline, str):
        return spline
    made = Made(net, kinds, finish)
    what = "autoregressive spline"
    if made.why:
        what += f" (inverted by a pass for each feature, as {made.why})"
    at = Scaled(layer, "tail_bound") if scaled and layer.tails is not None else None
    return (Elementwise(Autoregressive(made, spline, at), what),)


@dataclass(frozen=True)
class _Circular:
    """Makes numbers of circular splines from normflows', which have a slope more.

    A spline with linear tails is a circular one whose slope at the ends is 1.
    """

    tails: tuple[str, ...]
    bins: int
    min_slope: float

    def __call__(self, made: Operations, x: Tensor) -> None:
        numbers = 3 * self.bins
        features = range(len(self.tails))
        order = tuple(i * (numbers + 1) + k for i in features for k in range(numbers))
        made.put(Pick, constant(order, x.device))
        slope = math.log(math.expm1(1 - self.min_slope))
        weight, bias = [1.0] * len(order), [0.0] * len(order)
        for i in features:
            if self.tails[i] == "linear":
                weight[i * numbers + 2 * self.bins] = 0.0
                bias[i * numbers + 2 * self.bins] = slope
        both = (constant(tuple(t), x.device, x.dtype) for t in (weight, bias))
        made.put(Affine, *both)
