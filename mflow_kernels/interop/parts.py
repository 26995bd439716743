"""The parts of what layers do, and whether our kernels have them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mflow_kernels.interop.linear import Linear, Reorder
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import Spline
from mflow_kernels.reversible.rearrangements import SpaceToDepth


@dataclass(frozen=True, eq=False)
class Coupling:
    """A coupling that changes the last channels, given the first ones.

    Attributes:
        net: maps the unchanged channels to params: raw scales first, or the raw numbers of splines.
        scale: of an affine coupling; or the splines of a spline coupling.
        inverse: whether data -> latent is the inverse of `affine_coupling` or `spline_coupling`.
        unchanged: maps the number of channels to the number of unchanged channels.
        fits: whether it is this coupling still; None if it cannot change.
    """

    net: nn.Module
    scale: ScaleFunction | Spline
    inverse: bool
    unchanged: Callable[[int], int]
    fits: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Splines of elements that are no coupling: autoregressive ones, or of fixed params.

    Attributes:
        layer: computes them, and its `inverse` the inverse; see `interop/splines.py`.
        what: its kind, as the report names it.
        inverse: whether data -> latent is the inverse of the layer.
    """

    layer: nn.Module
    what: str
    inverse: bool = False


Part = Linear | Reorder | Coupling | Elementwise | SpaceToDepth
"""A part of what a layer does; the kernels have an operation for each of these types."""


def smaller_half(channels: int) -> int:
    return channels // 2


def larger_half(channels: int) -> int:
    return (channels + 1) // 2


@dataclass(frozen=True)
class Exactly:
    """A fixed number of channels."""

    count: int

    def __call__(self, channels: int) -> int:
        return self.count


def why_not(parts: Sequence[Part], channels: int) -> str:
    """Say why our kernels cannot compute these parts on states of `channels` channels.

    The result is "" if they can.
    """
    for part in parts:
        if isinstance(part, SpaceToDepth):
            channels = int(channels * 4.0**part.halvings)
        elif isinstance(part, Coupling) and part.unchanged(channels) >= channels:
            return f"its coupling changes none of {channels} channels"
    return ""
