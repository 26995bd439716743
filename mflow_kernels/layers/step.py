"""A step of flow."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.actnorm import ActNorm
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.conv1x1 import InvertibleConv1x1, plu
from mflow_kernels.layers.coupling import AffineCoupling
from mflow_kernels.layers.moves import Couple, Mix, Mixes, run
from mflow_kernels.ops._launch import accumulator, flow_state, pixels
from mflow_kernels.ops.conv1x1 import inverse_mix
from mflow_kernels.ops.scale import Kind, ScaleFunction


class FlowStep(Bijection):
    """Actnorm, invertible 1x1 convolution, affine coupling (Glow, arXiv 1807.03039, figure 2).

    Actnorm folds into the convolution: a step costs one launch for both and one for the coupling;
    in a `ReversibleChain` the coupling shares its launch with the next step's convolution.

    Args: as `AffineCoupling`.
    """

    def __init__(
        self,
        channels: int,
        net: nn.Module | None = None,
        *,
        width: int = 64,
        scale: ScaleFunction | Kind = "tanh",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels)
        self.coupling = AffineCoupling(
            channels, net, width=width, scale=scale, spatial_dims=spatial_dims
        )

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x = flow_state("x", x)
        mixes, log_det = fold([self], accumulator(x.dtype))
        z, _, ledger = run([Mix(0, 0), self.couple(False)], x, (), [mixes], context)
        return z, ops.accumulate_logdet(ledger, pixels(x) * log_det)

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z = flow_state("z", z)
        mixes, log_det = fold([self], accumulator(z.dtype))
        mixes = inverse(mixes, ["conv"])
        x, _, ledger = run([self.couple(True), Mix(0, 0)], z, (), [mixes], context)
        return x, ops.accumulate_logdet(ledger, -pixels(z) * log_det)

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        self.actnorm.set_from(x)
        return self(x, *context)

    def couple(self, inverse: bool) -> Couple:
        """The coupling as a move."""
        return Couple(self.coupling.net, self.coupling.scale, inverse)


def fold(steps: Sequence[FlowStep], dtype: torch.dtype) -> tuple[Mixes, Tensor]:
    """Fold each step's actnorm into its 1x1 convolution, all steps in one batched product.

    W' = W diag(exp(log_scale)), bias' = W' bias; and the sum of log |det W'|, for one pixel.
    """

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(dtype)

    log_diagonal = stack([step.conv.log_diagonal for step in steps])
    log_scale = stack([step.actnorm.log_scale for step in steps])
    weight = plu(
        stack([step.conv.permutation for step in steps]),
        stack([step.conv.lower for step in steps]),
        stack([step.conv.upper for step in steps]),
        stack([step.conv.sign for step in steps]),
        log_diagonal,
    )
    weight = weight * log_scale.exp()[:, None, :]
    bias = stack([step.actnorm.bias for step in steps])
    bias = (weight * bias[:, None, :]).sum(2)
    return Mixes(weight, bias), log_diagonal.sum() + log_scale.sum()


def inverse(mixes: Mixes, names: Sequence[str]) -> Mixes:
    """The mixes that undo these: W^-1 and -W^-1 bias, computed in float64; ValueError, with the
    name of the layer, where one is singular or not finite."""
    weight, bias = inverse_mix(mixes.weight, mixes.bias, names)
    return Mixes(weight.to(mixes.weight.dtype), bias.to(mixes.bias.dtype))
