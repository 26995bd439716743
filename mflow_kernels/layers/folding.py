"""Actnorm folded into the invertible 1x1 convolution that follows it."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.conv1x1 import inverse_weight_and_bias
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

    @classmethod
    def fold(
        cls,
        maps: Sequence["ActNormConv"],
        places: Sequence[str],
        dtype: torch.dtype,
        *,
        inverted: bool,
        check: bool,
        lean: bool,
    ) -> FoldedWeights:
        """See `LinearMap.fold`. Inverses are computed in float64."""
        folded = fold(maps, dtype, lean)
        if not inverted:
            return folded
        names = [f"{place}.conv".lstrip(".") for place in places]
        weight, bias = inverse_weight_and_bias(folded.weight, folded.bias, names, check=check)
        return FoldedWeights(weight.to(dtype), bias.to(dtype), -folded.log_det)


def fold(maps: Sequence[ActNormConv], dtype: torch.dtype, lean: bool = False) -> FoldedWeights:
    """Fold each actnorm into the 1x1 convolution after it, all steps in one batched product.

    W' = W diag(exp(log_scale)), bias' = W' bias.
    """
    if hasattr(maps[0].conv.lower, "full_tensor"):  # a DTensor
        raise TypeError(
            "conv: expected whole weights, got sharded ones; a chain does not call its layers, so "
            "shard the networks or the whole chain"
        )
    permutation, lower, upper, sign, log_diagonal = zip(
        *(m.conv.factors() for m in maps), strict=True
    )
    norms = [m.actnorm for m in maps]
    zeros = [torch.zeros_like(log_diagonal[0])] if None in norms else []
    log_scale = [zeros[0] if norm is None else norm.log_scale for norm in norms]
    bias = [zeros[0] if norm is None else norm.bias for norm in norms]
    factors = permutation, sign, lower, upper, log_diagonal, log_scale, bias
    if transformed() or torch.compiler.is_compiling():
        return fold_ref(*(torch.stack(factor).to(dtype) for factor in factors))
    return FoldedWeights(*_Fold.apply(len(maps), dtype, lean, *chain.from_iterable(factors)))


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

    If `lean`, it stores no products, and its backward computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, k: int, dtype: torch.dtype, lean: bool, *factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        products, log_det = _products(k, dtype, factors)
        with without_autocast(products.left):
            weight = (products.left @ products.upper).mul_(products.scale[:, None, :])
            folded_bias = (weight @ products.bias[:, :, None]).squeeze(2)
        ctx.k, ctx.dtype, ctx.lean = k, dtype, lean
        ctx.dtypes = [factor.dtype for factor in factors[2 * k :]]
        ctx.save_for_backward(weight, *factors, *(() if lean else products))
        return weight, folded_bias, log_det

    @staticmethod
    def backward(
        ctx: Any, dweight: Tensor, dfolded_bias: Tensor, dlog_det: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        factors, products = saved[: 7 * ctx.k], saved[7 * ctx.k :]
        if torch.is_grad_enabled():
            gradients = gradients_of(
                partial(_fold_factors, ctx.k, ctx.dtype), factors, (dweight, dfolded_bias, dlog_det)
            )
            return None, None, None, *gradients
        if ctx.lean:
            products = _products(ctx.k, ctx.dtype, factors)[0]
        permutation, left, upper, diagonal, scale, bias = products
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
        parts = (row.to(dtype) for row, dtype in zip(rows, ctx.dtypes, strict=True))
        return None, None, None, *(None,) * (2 * ctx.k), *parts
