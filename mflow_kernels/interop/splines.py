"""The parts of spline layers, as nflows wrote them and normflows copied them.

`SplineMap` and the classes after it compute what is not a coupling of two halves.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.interop.linear import Reorder
from mflow_kernels.interop.orders import Listed, SameBuffers, inverse_of
from mflow_kernels.interop.params import Params
from mflow_kernels.interop.parts import Coupling, Elementwise, Exactly, Part
from mflow_kernels.ops.rational_quadratic import apply_spline, check_numbers
from mflow_kernels.ops.spline import Spline


class SplineMap(nn.Module):
    """Splines of all channels but the first `kept`, which the network `net` reads."""

    def __init__(self, net: nn.Module, spline: Spline, kept: int) -> None:
        super().__init__()
        self.net, self.spline, self.kept = net, spline, kept

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(x, self.net(x[:, : self.kept], *context), inverse=False)

    def inverse(self, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(y, self.net(y[:, : self.kept], *context), inverse=True)

    def _map(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        params = check_numbers(x, params, self.spline, self.kept, "net's output")
        return apply_spline(x, params, self.spline, self.kept, inverse)


class SharedSplines(nn.Module):
    """The raw numbers of a library's elementwise splines, which are the same for all samples.

    Args:
        module: its parameters unnormalized_widths, unnormalized_heights and
            unnormalized_derivatives are (C, *spatial, numbers of each).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        m: Any = self.module
        parts = m.unnormalized_widths, m.unnormalized_heights, m.unnormalized_derivatives
        raw = torch.cat(parts, dim=-1).movedim(-1, 1).flatten(0, 1)
        return raw.expand(x.shape[0], *raw.shape)


def spline_of(layer: Any, bins: int, tails: Any, bound: Any, net: Any) -> Spline | str:
    """Return a layer's splines. Its raw widths and heights are divided by the root of the number of
    hidden features that its network shows."""
    if tails is None:
        bound = (0.0, 1.0)
    if tails not in ("linear", "circular", None):
        return f"its tails are {tails!r}"
    if isinstance(bound, Tensor):
        return "its splines have a bound for each feature"
    names = "hidden_features", "hidden_channels"
    widths = [getattr(net, name) for name in names if hasattr(net, name)]
    sizes = layer.min_bin_width, layer.min_bin_height, layer.min_derivative
    try:
        return Spline(bins, bound, tails, *sizes, float(widths[0]) ** 0.5 if widths else 1.0)
    except (TypeError, ValueError) as error:
        return f"our splines do not allow its {error}"


def _network(net: nn.Module) -> Params:
    """The network, whose params are in our order."""
    return Params(net, slice(None), slice(None), passing="argument")


def inverted(parts: tuple[Part, ...] | str) -> tuple[Part, ...] | str:
    """The parts of the inverse of a spline layer."""
    if isinstance(parts, str):
        return parts
    made: list[Part] = []
    for part in reversed(parts):
        if isinstance(part, Reorder) and isinstance(part.order, Listed):
            made.append(Reorder(Listed(inverse_of(part.order.channels))))
        elif isinstance(part, (Coupling, Elementwise)):
            made.append(replace(part, inverse=not part.inverse))
    return tuple(made)


def coupling_parts(layer: Any, elementwise: type[Any]) -> tuple[Part, ...] | str:
    """The parts of `PiecewiseRationalQuadraticCoupling(Transform)` in its forward direction.

    Args:
        elementwise: the library's `PiecewiseRationalQuadraticCDF`.
    """
    net: Any = layer.transform_net
    own: Any = layer.unconditional_transform
    spline = spline_of(layer, layer.num_bins, layer.tails, layer.tail_bound, net)
    if isinstance(spline, str):
        return spline
    kept, changed = layer.identity_features.tolist(), layer.transform_features.tolist()
    if not changed:
        return "it changes no feature"
    order = (*kept, *changed)
    fits = SameBuffers(layer, "identity_features", "transform_features")
    parts: list[Part] = [Coupling(_network(net), spline, False, Exactly(len(kept)), fits)]
    last = order
    if own is not None:
        if type(own) is not elementwise:
            return f"its unconditional transform is a {type(own).__name__}"
        bins = own.unnormalized_widths.shape[-1]
        of_kept = spline_of(own, bins, own.tails, own.tail_bound, None)
        if isinstance(of_kept, str):
            return of_kept
        # The features that the network reads come last, behind those that pass through.
        last = (*changed, *kept)
        turned = (*range(len(kept), len(order)), *range(len(kept)))
        splines = SplineMap(SharedSplines(own), of_kept, len(changed))
        parts += [Reorder(Listed(turned)), Elementwise(splines, "elementwise spline")]
    sorted_ = tuple(range(len(order)))
    first = [] if order == sorted_ else [Reorder(Listed(order))]
    return (*first, *parts, *([] if last == sorted_ else [Reorder(Listed(inverse_of(last)))]))
