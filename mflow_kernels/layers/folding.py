"""Actnorm folded into the invertible 1x1 convolution that follows it."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.conv1x1 import inverse_weight_and_bias, not_invertible
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.precision import without_autocast
from mflow_kernels.ops.registration import gradients_of
from mflow_kernels.reversible.instructions import FoldedWeights
from mflow_kernels.reversible.linear_maps import LinearMap


class ActNormConv(LinearMap):
    """An `ActNorm` and the `InvertibleConv1x1` after it; or, if `actnorm` is None, the convolution.

    Their modules import this one.
    """

    def __init__(self, actnorm: Any, conv: Any) -> None:
        self.actnorm, self.conv = actnorm, conv

    def factors(self) -> "Factors":
        """The factors of W and those of the actnorm, which are None if there is none."""
        permutation, lower, upper, sign, log_diagonal = self.conv.factors()
        norm = self.actnorm
        own = (None, None) if norm is None else (norm.log_scale, norm.bias)
        return permutation, sign, lower, upper, log_diagonal, *own

    @classmethod
    def fold(
        cls,
        maps: Sequence["ActNormConv"],
        places: Sequence[str],
        dtype: torch.dtype,
        *,
        inverted: bool,
        check: bool,
    ) -> FoldedWeights:
        """See `LinearMap.fold`. Inverses are computed in float64."""
        steps = [m.factors() for m in maps]
        if cpu.serves_fold(steps[0][2], dtype):
            factors = [*chain.from_iterable(steps)]
            if torch.is_grad_enabled():
                return FoldedWeights(*_FoldLoop.apply(dtype, inverted, *factors))
            *folded, fault = cpu.fold(factors, dtype, inverted)
            if fault is not None and check:
                step, infinite = fault
                raise not_invertible(_name(places[step]), infinite)
            return FoldedWeights(*folded)
        return _fold_in_torch(steps, dtype, inverted, [*map(_name, places)], check)


def _fold_in_torch(
    steps: Sequence["Factors"],
    dtype: torch.dtype,
    inverted: bool,
    names: Sequence[str] | None = None,
    check: bool = False,
) -> FoldedWeights:
    """`ActNormConv.fold` by torch's operators."""
    folded = fold(steps, dtype)
    if not inverted:
        return folded
    weight, bias = inverse_weight_and_bias(folded.weight, folded.bias, names, check=check)
    return FoldedWeights(weight.to(dtype), bias.to(dtype), -folded.log_det)


def _name(place: str) -> str:
    """The convolution of the step at this place, as errors name it."""
    return f"{place}.conv".lstrip(".")


# P, the signs of s, L, U, log |s|, and log_scale and bias of the actnorm.
Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def fold(steps: Sequence[Factors], dtype: torch.dtype) -> FoldedWeights:
    """Fold each actnorm into the 1x1 convolution after it, all steps in one batched product.

    W' = W diag(exp(log_scale)), bias' = W' bias.
    """
    if hasattr(steps[0][2], "full_tensor"):  # a DTensor
        raise TypeError(
            "conv: expected whole weights, got sharded ones; a chain does not call its layers, so "
            "shard the networks or the whole chain"
        )
    zeros = [torch.zeros_like(steps[0][4])] if any(step[5] is None for step in steps) else []
    factors = [[zeros[0] if f is None else f for f in row] for row in zip(*steps, strict=True)]
    if transformed() or torch.compiler.is_compiling():
        return fold_ref(*(torch.stack(factor).to(dtype) for factor in factors))
    return FoldedWeights(*_Fold.apply(len(steps), dtype, *chain.from_iterable(factors)))


def fold_ref(
    permutation: Tensor,
    sign: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    log_scale: Tensor,
    bias: Tensor,
) -> FoldedWeights:
    """`fold` of the stacked factors of K steps, (K, C, C) and (K, C)."""
    weight = plu(permutation, lower, upper, sign, log_diagonal) * log_scale.exp()[:, None, :]
    return FoldedWeights(
        weight, (weight * bias[:, None, :]).sum(2), log_diagonal.sum() + log_scale.sum()
    )


def _fold_factors(k: int, dtype: torch.dtype, *factors: Tensor) -> FoldedWeights:
    """`fold_ref` of the factors of K steps, kind after kind."""
    return fold_ref(*(torch.stack(factors[i : i + k]).to(dtype) for i in range(0, 7 * k, k)))


def plu(
    permutation: Tensor, lower: Tensor, upper: Tensor, sign: Tensor, log_diagonal: Tensor
) -> Tensor:
    """P L (U + diag(sign * exp(log_diagonal))), batched over leading axes, outside autocast."""
    with without_autocast(lower):
        unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        diagonal = torch.diag_embed(sign * log_diagonal.exp())
        return permutation @ (lower.tril(-1) + unit) @ (upper.triu(1) + diagonal)


class _Products(NamedTuple):
    """The products of factors that `fold` and its gradient share."""

    permutation: Tensor
    left: Tensor  # P L
    upper: Tensor  # U + diag(s)
    diagonal: Tensor  # s
    scale: Tensor
    bias: Tensor


def _products(k: int, dtype: torch.dtype, factors: Sequence[Tensor]) -> tuple[_Products, Tensor]:
    """The products of K steps, and the log-determinant of their linear maps."""
    permutation, sign, lower, upper, log_diagonal, log_scale, bias = (
        torch.stack([*factors[i : i + k]]).to(dtype) for i in range(0, 7 * k, k)
    )
    with without_autocast(lower):
        diagonal, scale = sign * log_diagonal.exp(), log_scale.exp()
        lower, upper = lower.tril_(-1), upper.triu_(1)
        lower.diagonal(dim1=1, dim2=2).fill_(1)
        upper.diagonal(dim1=1, dim2=2).copy_(diagonal)
        left = permutation @ lower
    log_det = log_diagonal.sum() + log_scale.sum()
    return _Products(permutation, left, upper, diagonal, scale, bias), log_det


class _Fold(torch.autograd.Function):
    """`fold_ref` as one node of the graph instead of twenty, without a copy of each factor.

    It stores no products. Its backward computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, k: int, dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        products, log_det = _products(k, dtype, factors)
        with without_autocast(products.left):
            weight = (products.left @ products.upper).mul_(products.scale[:, None, :])
            folded_bias = (weight @ products.bias[:, :, None]).squeeze(2)
        ctx.k, ctx.dtype = k, dtype
        ctx.save_for_backward(weight, *factors)
        return weight, folded_bias, log_det

    @staticmethod
    def backward(
        ctx: Any, dweight: Tensor, dfolded_bias: Tensor, dlog_det: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():
            reference = partial(_fold_factors, ctx.k, ctx.dtype)
            return None, None, *gradients_of(reference, factors, (dweight, dfolded_bias, dlog_det))
        permutation, left, upper, diagonal, scale, bias = _products(ctx.k, ctx.dtype, factors)[0]
        with without_autocast(weight):
            dweight = torch.baddbmm(dweight, dfolded_bias[:, :, None], bias[:, None, :])
            dbias = (dfolded_bias[:, None, :] @ weight).squeeze(1)
            dlog_scale = (dweight * weight).sum(1).add_(dlog_det)
            dproduct = dweight.mul_(scale[:, None, :])
            dupper = left.mT @ dproduct
            dlower = permutation.mT @ (dproduct @ upper.mT)
        dlog_diagonal = (dupper.diagonal(dim1=1, dim2=2) * diagonal).add_(dlog_det)
        gradients = dlower.tril_(-1), dupper.triu_(1), dlog_diagonal, dlog_scale, dbias
        rows = chain.from_iterable(gradient.unbind() for gradient in gradients)
        pairs = zip(rows, factors[2 * ctx.k :], strict=True)
        return None, None, *(None,) * (2 * ctx.k), *(row.to(like.dtype) for row, like in pairs)


class _FoldLoop(torch.autograd.Function):
    """`ActNormConv.fold` by the loop of csrc, without an operator for each small product."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, inverted: bool, *factors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtype, ctx.inverted = dtype, inverted
        ctx.save_for_backward(*factors)
        return cpu.fold(factors, dtype, inverted)[:3]

    @staticmethod
    @torch.compiler.disable  # a compiled function may call backward()
    def backward(
        ctx: Any, dweight: Tensor, dbias: Tensor, dlog_det: Tensor
    ) -> tuple[Tensor | None, ...]:
        factors, gradients = ctx.saved_tensors, (dweight, dbias, dlog_det)
        if not torch.is_grad_enabled():
            return None, None, *cpu.fold_backward(factors, *gradients, ctx.inverted)

        def reference(*given: Tensor) -> FoldedWeights:
            rest = iter(given)
            made: list[Any] = [None if f is None else next(rest) for f in factors]
            steps: list[Any] = [made[i : i + 7] for i in range(0, len(made), 7)]
            return _fold_in_torch(steps, ctx.dtype, ctx.inverted)

        rest = iter(gradients_of(reference, [f for f in factors if f is not None], gradients))
        return None, None, *(None if f is None else next(rest) for f in factors)
