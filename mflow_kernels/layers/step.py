"""A step of flow."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.actnorm import ActNorm
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.conv1x1 import InvertibleConv1x1, plu
from mflow_kernels.layers.coupling import AffineCoupling
from mflow_kernels.ops.checks import check_count
from mflow_kernels.ops.conv1x1 import inverse_weight_and_bias
from mflow_kernels.ops.launch import (
    accumulator,
    pixels,
    transformed,
    without_autocast,
)
from mflow_kernels.ops.registration import refuse_second_derivative
from mflow_kernels.ops.scale import Kind, ScaleFunction
from mflow_kernels.reversible.program import Couple, Mix, Mixes, Move, run


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
        check_count("channels", channels, 2)
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels)
        self.coupling = AffineCoupling(
            channels, net, width=width, scale=scale, spatial_dims=spatial_dims
        )

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x = self.coupling.checked("x", x)
        group, dtype = Group([self], ["conv"], False), accumulator(x.dtype)
        moves: list[Move] = [Mix(0, 0), self.couple(False)]
        mixes = group.mixes(dtype)
        z, _, ledger = run(moves, x, (), {0: mixes}, context)
        return z, ops.accumulate_logdet(ledger, pixels(x) * mixes.log_det)

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z = self.coupling.checked("z", z)
        group, dtype = Group([self], ["conv"], True), accumulator(z.dtype)
        moves: list[Move] = [self.couple(True), Mix(0, 0)]
        mixes = group.mixes(dtype, check=not torch.is_grad_enabled())
        x, _, ledger = run(moves, z, (), {0: mixes}, context)
        return x, ops.accumulate_logdet(ledger, pixels(z) * mixes.log_det)

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        self.coupling.checked("x", x)
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

    def mixes(self, dtype: torch.dtype, *, check: bool = False) -> Mixes:
        """Each step's folded 1x1 convolution, or its inverse computed in float64.

        Args:
            check: as for `inverse_weight_and_bias`.

        Raises:
            ValueError: with `check`, naming the layer whose inverse does not exist.
        """
        mixes = fold(self.steps, dtype)
        if not self.inverted:
            return mixes
        weight, bias = inverse_weight_and_bias(mixes.weight, mixes.bias, self.names, check=check)
        return Mixes(weight.to(dtype), bias.to(dtype), -mixes.log_det)

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
    convs, actnorms = [step.conv for step in steps], [step.actnorm for step in steps]
    factors: tuple[list[Tensor], ...] = (
        [conv.permutation for conv in convs],
        [conv.sign for conv in convs],
        [conv.lower for conv in convs],
        [conv.upper for conv in convs],
        [conv.log_diagonal for conv in convs],
        [actnorm.log_scale for actnorm in actnorms],
        [actnorm.bias for actnorm in actnorms],
    )
    if transformed() or torch.compiler.is_compiling():
        return fold_ref(*(torch.stack(factor).to(dtype) for factor in factors))
    return Mixes(*_Fold.apply(len(steps), dtype, *chain.from_iterable(factors)))


def fold_ref(
    permutation: Tensor,
    sign: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    log_scale: Tensor,
    bias: Tensor,
) -> Mixes:
    """`fold` of K steps' factors, (K, C, C) and (K, C)."""
    weight = plu(permutation, lower, upper, sign, log_diagonal) * log_scale.exp()[:, None, :]
    return Mixes(weight, (weight * bias[:, None, :]).sum(2), log_diagonal.sum() + log_scale.sum())


class _Fold(torch.autograd.Function):
    """`fold_ref` as one node of the graph, not twenty, and without a copy of each factor."""

    @staticmethod
    def forward(
        ctx: Any, k: int, dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        stacks = [torch.stack(factors[i : i + k]) for i in range(0, 7 * k, k)]
        permutation, sign, lower, upper, log_diagonal, log_scale, bias = (
            stack.to(dtype) for stack in stacks
        )
        with without_autocast(lower):
            diagonal, scale = sign * log_diagonal.exp(), log_scale.exp()
            lower, upper = lower.tril_(-1), upper.triu_(1)
            lower.diagonal(dim1=1, dim2=2).fill_(1)
            upper.diagonal(dim1=1, dim2=2).copy_(diagonal)
            left = permutation @ lower
            weight = (left @ upper).mul_(scale[:, None, :])
            mixed_bias = (weight @ bias[:, :, None]).squeeze(2)
        # Of steps that differ, what `stack` promoted them to: autograd casts on.
        ctx.k, ctx.dtypes = k, [stack.dtype for stack in stacks[2:]]
        ctx.save_for_backward(permutation, left, upper, diagonal, scale, bias, weight)
        return weight, mixed_bias, log_diagonal.sum() + log_scale.sum()

    @staticmethod
    def backward(
        ctx: Any, dweight: Tensor, dmixed_bias: Tensor, dlog_det: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("fold")
        permutation, left, upper, diagonal, scale, bias, weight = ctx.saved_tensors
        with without_autocast(weight):
            dweight = torch.baddbmm(dweight, dmixed_bias[:, :, None], bias[:, None, :])
            dbias = (dmixed_bias[:, None, :] @ weight).squeeze(1)
            dlog_scale = (dweight * weight).sum(1).add_(dlog_det)
            dproduct = dweight.mul_(scale[:, None, :])
            dupper = left.mT @ dproduct
            dlower = permutation.mT @ (dproduct @ upper.mT)
        dlog_diagonal = (dupper.diagonal(dim1=1, dim2=2) * diagonal).add_(dlog_det)
        gradients = dlower.tril_(-1), dupper.triu_(1), dlog_diagonal, dlog_scale, dbias
        parts = (g.to(d).unbind() for g, d in zip(gradients, ctx.dtypes, strict=True))
        return None, None, *(None,) * (2 * ctx.k), *chain.from_iterable(parts)
