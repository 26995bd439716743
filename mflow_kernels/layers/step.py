"""A step of flow."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from mflow_kernels.layers.actnorm import ActNorm, warn_if_not_initialized
from mflow_kernels.layers.bijection import Instructed
from mflow_kernels.layers.conv1x1 import InvertibleConv1x1
from mflow_kernels.layers.coupling import AffineCoupling
from mflow_kernels.layers.folding import ActNormConv
from mflow_kernels.layers.spline import SplineCoupling
from mflow_kernels.ops.checks import check_choice, check_count
from mflow_kernels.ops.scale import Kind, ScaleFunction
from mflow_kernels.reversible.steps import Step, Steps

CouplingKind = Literal["affine", "spline"]


class FlowStep(Instructed):
    """Actnorm, invertible 1x1 convolution, coupling (Glow, arXiv 1807.03039, figure 2).

    Actnorm is folded into the convolution, so a step needs one launch for both and one for the
    coupling. In a `ReversibleChain` an affine coupling shares its launch with the next step's
    convolution.

    Args:
        coupling: "affine", as in Glow, or "spline" (arXiv 1906.04032), which has no `scale`.
        bins: number of bins of each spline.
        others: as for `AffineCoupling`, or for `SplineCoupling`.
    """

    def __init__(
        self,
        channels: int,
        net: nn.Module | None = None,
        *,
        coupling: CouplingKind = "affine",
        bins: int = 8,
        width: int = 64,
        scale: ScaleFunction | Kind | None = "tanh",
        spatial_dims: int = 2,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        check_count("channels", channels, 2)
        check_choice("coupling", coupling, get_args(CouplingKind))
        self.channels = channels
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels)
        how: dict[str, Any] = {
            "width": width,
            "spatial_dims": spatial_dims,
            "context_channels": context_channels,
        }
        self.coupling: AffineCoupling | SplineCoupling = (
            AffineCoupling(channels, net, scale=scale, **how)
            if coupling == "affine"
            else SplineCoupling(channels, net, bins=bins, **how)
        )

    @property
    def linear(self) -> ActNormConv:
        """The actnorm and 1x1 convolution of this step, which fold into one linear map."""
        return ActNormConv(self.actnorm, self.conv)

    def instructions(self) -> list[Steps]:
        return [Steps([Step(self.linear, self.coupling.couple())], masked=self.masked)]

    def checked(self, name: str, value: object) -> Tensor:
        return self.coupling.checked(name, value)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        warn_if_not_initialized(self)
        return super().forward(x, *context)

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        self.checked("x", x)
        self.actnorm.set_from(x, *context)
        return self(x, *context)
