"""Tolerances and assertions that hold kernels, layers and whole flows to their arithmetic."""

import math

import torch
from torch import Tensor

# Rounding a result to `dtype` costs half an eps; summing n rounded terms of random sign costs about
# sqrt(n) of them. SAFETY covers the spread around that expectation and the handful of roundings of
# one scale function. bfloat16 and float16 inputs are computed in float32, so theirs is the rounding
# of the result alone.
SAFETY = 8.0
EPS = {
    dtype: torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def tolerance(dtype: torch.dtype, terms: int = 1) -> float:
    """Largest relative error to accept of a sum of `terms` products computed in `dtype`."""
    if dtype in (torch.float16, torch.bfloat16):
        return SAFETY * (EPS[dtype] + EPS[torch.float32] * math.sqrt(terms))
    return SAFETY * EPS[dtype] * math.sqrt(terms)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    terms: int = 1,
    scale: float | None = None,
    name: str = "result",
) -> None:
    """Assert that `actual` is `expected` up to the rounding of its own dtype.

    Args:
        actual: the result under test, any floating dtype.
        expected: the reference, usually float64, of the same shape.
        terms: how many products the longest sum behind one element adds.
        scale: magnitude of what is summed, where cancellation makes the result smaller than its
            terms; by default the largest magnitude in `expected`.
        name: what to call the tensor in the error.

    Raises:
        AssertionError: with the largest error and the bound; NaN never passes.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    size = max(scale or 0.0, expected.abs().max().item())
    bound = tolerance(actual.dtype, terms) * size
    if not error <= bound:
        raise AssertionError(
            f"{name}: largest error {error:.3e} exceeds {bound:.3e} "
            f"({str(actual.dtype).removeprefix('torch.')}, {terms} terms, magnitude {size:.3e})"
        )
