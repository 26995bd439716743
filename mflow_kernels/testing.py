"""Tolerances and assertions that hold kernels, layers and whole flows to their arithmetic."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_count, check_tensor

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
    """Largest relative error to accept of a sum of `terms` products computed in `dtype`.

    Raises:
        TypeError: `dtype` is not float64, float32, float16 or bfloat16.
        ValueError: fewer than one term.
    """
    check_count("terms", terms, 1)
    if dtype not in EPS:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, EPS))}, got {dtype}")
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
        scale: magnitude of what is summed, finite, where cancellation makes the result smaller than
            its terms; by default, and at least, the largest magnitude in `expected`.
        name: what to call the tensor in the error.

    Raises:
        AssertionError: with the largest error and the bound; NaN never passes.
        TypeError, ValueError: no tensors of a floating dtype, a scale that is not finite.
    """
    check_tensor("actual", actual)
    check_tensor("expected", expected)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")  # that would accept all
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


# Past this condition number a Jacobian in float64 proves nothing: its determinant has few digits.
SINGULAR = 1e10


def check_bijection(
    layer: nn.Module, shape: tuple[int, ...], *, perturb: float = 0.1, seed: int = 0
) -> None:
    """Assert that a layer keeps the contract of `Bijection`, for one of your own as for ours.

    A float64 copy is run on normal states of `shape`, and held to: one result for one input; no
    sample that depends on another; log-determinants (N,) equal to those of the Jacobian that
    autograd finds; an inverse that returns the state, and the negative of the log-determinant; and
    states and log-determinants of the dtype of their input, a float32 copy's too. The parameters of
    the float64 copy are moved by `perturb`, because at their initial values most log-determinants
    are 0, which hides a wrong sign or a missing factor.

    Args:
        layer: `z, logdet = layer(x)` and `x, logdet = layer.inverse(z)`; z a tensor, or nested
            tuples of them that start with the sample axis. It is not changed.
        shape: (N, C, *spatial) with N >= 2. The Jacobian takes N * D backward passes for states of
            D numbers: choose small ones.
        perturb: standard deviation of what is added to each parameter.
        seed: of the states and of what is added.

    Raises:
        AssertionError: naming the promise that was broken, and by how much.
        ValueError: where `shape` has fewer than two samples or no elements.
    """
    if len(shape) < 2 or shape[0] < 2 or 0 in shape:
        raise ValueError(f"shape: expected (N, C, *spatial) with N >= 2, got {shape}")
    copied, x = _perturbed(layer, shape, perturb, seed)
    n, d = shape[0], math.prod(shape[1:])
    with torch.no_grad():
        z, logdet = copied(x)
        again, logdet_again = copied(x)
    if not (torch.equal(_flat(z), _flat(again)) and torch.equal(logdet, logdet_again)):
        raise AssertionError("forward: two calls on one input differ")
    if tuple(logdet.shape) != (n,):
        raise AssertionError(f"logdet: shape {tuple(logdet.shape)}, not one number a sample ({n},)")
    if _flat(z).shape != (n, d):
        raise AssertionError(f"z: {tuple(_flat(z).shape)} numbers, not the state's {(n, d)}")
    _check_dtypes(x, z=z, logdet=logdet)

    jacobian = torch.autograd.functional.jacobian(lambda x: _flat(copied(x)[0]), x)
    jacobian = jacobian.reshape(n, d, n, d)
    own = torch.stack([jacobian[i, :, i] for i in range(n)])
    others = jacobian.abs().sum((1, 3)).fill_diagonal_(0)
    if others.any():
        raise AssertionError("forward: a sample's z depends on another sample of the batch")
    singular = torch.linalg.svdvals(own)
    condition = (singular[:, 0] / singular[:, -1]).max().item()
    if not condition < SINGULAR:
        raise AssertionError(f"forward: not invertible, its Jacobian has condition {condition:.1e}")
    # Rounding moves log |det J| by up to D * eps * condition.
    loose: dict[str, Any] = {"terms": d * d, "scale": max(1.0, condition)}
    expected = torch.linalg.slogdet(own).logabsdet
    try:
        assert_close(logdet, expected, **loose, name="logdet against autograd's Jacobian")
    except AssertionError as error:
        raise AssertionError(f"{error}{_hint(logdet, expected, math.prod(shape[2:]))}") from None

    with torch.no_grad():
        back, logdet_back = copied.inverse(z)
    # z is rounded, and the inverse multiplies that by up to 1 / the smallest singular value.
    size = condition * x.abs().max().item()
    size += _flat(z).abs().max().item() / singular.min().item()
    assert_close(back, x, terms=d, scale=size, name="inverse(forward(x))")
    assert_close(logdet_back, -logdet, **loose, name="logdet of the inverse")
    _check_dtypes(x, inverse=back, logdet_of_the_inverse=logdet_back)
    single: Any = copy.deepcopy(layer).float()
    with torch.no_grad():
        z, logdet = single(x.float())
        back, logdet_back = single.inverse(z)
    _check_dtypes(x.float(), z=z, logdet=logdet, inverse=back, logdet_of_the_inverse=logdet_back)


def _check_dtypes(x: Tensor, **results: Any) -> None:
    """States and log-determinants are of the dtype of the state they came from."""
    for name, value in results.items():
        dtype = _flat(value).dtype
        if dtype != x.dtype:
            came, expected = (str(d).removeprefix("torch.") for d in (dtype, x.dtype))
            raise AssertionError(f"{name.replace('_', ' ')}: {came}, of a state in {expected}")


def _perturbed(
    layer: nn.Module, shape: tuple[int, ...], perturb: float, seed: int
) -> tuple[Any, Tensor]:
    """A float64 copy of the layer with its parameters moved, and a state for it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = copy.deepcopy(layer).double()
    device = next((t.device for t in layer.state_dict().values()), torch.device("cpu"))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(perturb * normal(tuple(parameter.shape)).to(device))
    return layer, normal(shape).to(device)


def _flat(z: Any) -> Tensor:
    """(N, D) out of a tensor or nested tuples of them."""
    if isinstance(z, Tensor):
        return z.flatten(1) if z.dim() > 1 else z[:, None]
    return torch.cat([_flat(part) for part in z], dim=1)


def _hint(logdet: Tensor, expected: Tensor, pixels: int) -> str:
    """What a wrong log-determinant looks like, where it looks like something."""

    def like(candidate: Tensor) -> bool:
        return torch.allclose(candidate, expected, rtol=1e-6, atol=1e-9)

    if like(-logdet):
        return "; it is that of the inverse: the sign is wrong"
    if pixels > 1 and like(pixels * logdet):
        return f"; it is that of one of {pixels} pixels"
    if bool((logdet == logdet[0]).all()) and not bool((expected == expected[0]).all()):
        return "; it is one number for all samples"
    return ""
