"""A step of flow."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.actnorm import ActNorm
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.conv1x1 import InvertibleConv1x1, plu
from mflow_kernels.layers.coupling import AffineCoupling
from mflow_kernels.layers.moves import Couple, Mix, Mixes, Move, run
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
        group, dtype = Group([self], ["conv"], False), accumulator(x.dtype)
        moves: list[Move] = [Mix(0, 0), self.couple(False)]
        z, _, ledger = run(moves, x, (), [group.mixes(dtype)], context)
        return z, ops.accumulate_logdet(ledger, pixels(x) * group.log_det(dtype))

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z = flow_state("z", z)
        group, dtype = Group([self], ["conv"], True), accumulator(z.dtype)
        moves: list[Move] = [self.couple(True), Mix(0, 0)]
        x, _, ledger = run(moves, z, (), [group.mixes(dtype)], context)
        return x, ops.accumulate_logdet(ledger, pixels(z) * group.log_det(dtype))

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        self.actnorm.set_from(x)
        return self(x, *context)

    def couple(self, inverse: bool) -> Couple:
        """The coupling as a move."""
        return Couple(self.coupling.net, self.coupling.scale, inverse)


class Group(NamedTuple):
    """Steps of one width, one after the other, in the direction in which they are walked.

    names are what errors call their 1x1 convolutions.
    """

    steps: list[FlowStep]
    names: list[str]
    inverted: bool

    def mixes(self, dtype: torch.dtype) -> Mixes:
        """Each step's folded 1x1 convolution, or its inverse computed in float64.

        Raises:
            ValueError: with the name of the layer, where an inverse is asked for of a W that is
                singular or not finite.
        """
        weight, bias = fold(self.steps, dtype)
        if self.inverted:
            weight, bias = inverse_mix(weight, bias, self.names)
        return Mixes(weight.to(dtype), bias.to(dtype))

    def log_det(self, dtype: torch.dtype) -> Tensor:
        """The sum of log |det W'| over the steps, for one pixel; negative where inverted."""
        diagonals = [step.conv.log_diagonal for step in self.steps]
        scales = [step.actnorm.log_scale for step in self.steps]
        total = torch.cat([*diagonals, *scales]).to(dtype).sum()
        return -total if self.inverted else total

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that `mixes` depends on and that have gradients."""
        return [
            p
            for step in self.steps
            for module in (step.conv, step.actnorm)
            for p in module._parameters.values()  # `parameters()` takes ten times as long
            if p is not None and p.requires_grad
        ]


def fold(steps: Sequence[FlowStep], dtype: torch.dtype) -> Mixes:
    """Fold each step's actnorm into its 1x1 convolution, all steps in one batched product:
    W' = W diag(exp(log_scale)), bias' = W' bias."""

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(dtype)

    weight = plu(
        stack([step.conv.permutation for step in steps]),
        stack([step.conv.lower for step in steps]),
        stack([step.conv.upper for step in steps]),
        stack([step.conv.sign for step in steps]),
        stack([step.conv.log_diagonal for step in steps]),
    )
    weight = weight * stack([step.actnorm.log_scale for step in steps]).exp()[:, None, :]
    bias = stack([step.actnorm.bias for step in steps])
    return Mixes(weight, (weight * bias[:, None, :]).sum(2))
