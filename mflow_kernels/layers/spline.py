"""Spline coupling."""

from torch import Tensor, nn
from typing_extensions import Unpack

from mflow_kernels.layers.bijection import Bijection, run_instructions
from mflow_kernels.layers.networks import check_takes, coupling_net
from mflow_kernels.ops.checks import check_count
from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.ops.spline import SplineOptions, make_spline
from mflow_kernels.ops.spline_coupling import couple_by_splines
from mflow_kernels.reversible.couples import SplineCouple
from mflow_kernels.reversible.instructions import Instruction
from mflow_kernels.reversible.steps import Step, Steps


class SplineCoupling(Bijection):
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
        super().__init__()
        check_count("channels", channels, 2)
        self.channels: int = channels
        self.spline = make_spline(bins, bound, options)
        c_a = channels // 2
        if net is None:
            params = (channels - c_a) * self.spline.numbers
            net = coupling_net(c_a, params, width, spatial_dims, context_channels)
            last = list(net.children())[-1]
            assert isinstance(last.bias, Tensor)
            nn.init.constant_(last.bias, self.spline.identity)
        elif not isinstance(net, nn.Module):
            raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
        self.net = net

    def instructions(self) -> list[Instruction]:
        return [Steps([Step(None, self.couple())], masked=self.masked)]

    def couple(self) -> SplineCouple:
        """The coupling that the layer's instructions run."""
        return SplineCouple(self.net, self.spline)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self._run("x", x, context, inverse=False)

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self._run("z", z, context, inverse=True)

    def checked(self, name: str, value: object) -> Tensor:
        """Return `value` as a state for this layer; raise TypeError or ValueError if it is not."""
        x = flow_state(name, value)
        check_takes(self.net, name, x, self.channels)
        return x

    def _run(
        self, name: str, x: object, context: tuple[Tensor, ...], inverse: bool
    ) -> tuple[Tensor, Tensor]:
        state = self.checked(name, x)
        if self.masked:
            return run_instructions(self, state, context, inverse=inverse)
        params = self.net(state[:, : self.channels // 2], *context)
        return couple_by_splines(state, params, self.spline, inverse, "net's output")
