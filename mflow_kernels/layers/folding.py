"""Actnorm folded into the invertible 1x1 convolution that follows it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops import cpu
from mflow_kernels.ops.folding import Factors, FoldedWeights, fold
from mflow_kernels.reversible.linear_maps import LinearMap


class ActNormConv(LinearMap):
    """An `ActNorm` and the `InvertibleConv1x1` after it; or, if `actnorm` is None, the convolution.

    Their modules import this one.
    """

    def __init__(self, actnorm: Any, conv: Any) -> None:
        self.actnorm, self.conv = actnorm, conv

    def loops(self) -> bool:
        lower = self.conv.lower
        plain = type(lower) in (Tensor, nn.Parameter) and lower.is_cpu
        return plain and self.conv.channels <= cpu.FOLD_MAX_CHANNELS

    def named_factors(self, place: str) -> tuple[Factors, str]:
        permutation, lower, upper, sign, log_diagonal = self.conv.factors()
        norm = self.actnorm
        own = (None, None) if norm is None else (norm.log_scale, norm.bias)
        factors = permutation, sign, lower, upper, log_diagonal, *own
        return factors, f"{place}.conv".lstrip(".")

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
        named = (m.named_factors(place) for m, place in zip(maps, places, strict=True))
        steps, names = zip(*named, strict=True)
        return fold(steps, names, dtype, inverted=inverted, check=check)
