"""Spline coupling."""

from torch import Tensor, nn
from typing_extensions import Unpack

from mflow_kernels.layers.coupling import Coupling
from mflow_kernels.ops.spline import SplineOptions, make_spline
from mflow_kernels.reversible.couples import SplineCouple


class SplineCoupling(Coupling):
    """y_a = x_a, y_b = spline(x_b; net(x_a)) (Neural Spline Flows, arXiv 1906.04032).

    x_a is the first half of the channels (the smaller one if C is odd), and x_b is the rest. Each
    element of x_b has a monotone rational-quadratic spline of its own.

    Args:
        channels: C >= 2 of the states (N, C, *spatial).
        net: any module from x_a (N, C // 2, *spatial) to params (N, (C - C // 2) * numbers,
            *spatial), with numbers = 3 * bins - 1 (3 * bins + 1 if tails is None): for each channel
            of x_b its raw widths, heights and slopes. Extra arguments of `layer(x, *context)` are
            passed to it. By default `coupling_net` of the given width, with which the layer starts
            as the identity.
        bins, bound, options: the fields of `ops.Spline`. The default bound, 3, is the paper's. It
            holds 99.7% of a standard normal; the spline is the identity outside.
        width: hidden channels of the default net.
        spatial_dims: 0 to 3, the number of spatial axes of the default net.
        context_channels: K. If positive, the default net takes a context (N, K) or (N, K, *sides);
            see `CouplingNetwork`.

    Raises:
        TypeError, ValueError: naming the argument. Calls check state and net as those of
            `AffineCoupling` do.
    """

    def __init__(
        self,
        channels: int,
        net: nn.Module | None = None,
        *,
        bins: int = 8,
        bound: float | tuple[float, float] = 3.0,
        width: int = 64,
        spatial_dims: int = 2,
        context_channels: int = 0,
        **options: Unpack[SplineOptions],
    ) -> None:
        spline = make_spline(bins, bound, options)
        super().__init__(channels, net, spline.numbers, width, spatial_dims, context_channels)
        self.spline = spline
        if net is None:
            last = list(self.net.children())[-1]
            assert isinstance(last.bias, Tensor)
            nn.init.constant_(last.bias, spline.identity)

    def couple(self) -> SplineCouple:
        return SplineCouple(self.net, self.spline)
