"""Tolerances from floating-point arithmetic, and assertions for kernels, layers and flows."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_count, check_tensor

# Rounding a result to `dtype` costs half an eps. Summing n rounded terms of random sign costs about
# sqrt(n) times as much. SAFETY covers the spread around this expectation and the few roundings
# inside a scale function. Kernels compute bfloat16 and float16 inputs in float32, so only their
# result is rounded to the lower precision.
SAFETY = 8.0
EPS = {
    dtype: torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def tolerance(dtype: torch.dtype, terms: int = 1) -> float:
    """Return the largest acceptable relative error of a sum of `terms` products in `dtype`.

    Raises:
        TypeError: `dtype` is not float64, float32, float16 or bfloat16.
        ValueError: `terms` is less than one.
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
    slack: Tensor | None = None,
    name: str = "result",
) -> None:
    """Assert that `actual` equals `expected` up to the rounding of the dtype of `actual`.

    Args:
        actual: the result under test, of any floating dtype.
        expected: the reference, of the same shape and usually float64.
        terms: number of products in the longest sum behind one element.
        scale: finite magnitude of the summed terms. Pass it if cancellation makes the result
            smaller than its terms. The bound uses the larger of `scale` and the largest magnitude
            in `expected`.
        slack: further error of each element that does not come from rounding a sum, such as that of
            hidden units that rounding moves across the zero of a ReLU.
        name: name of the tensor in the error message.

    Raises:
        AssertionError: the error exceeds the bound; NaN never passes.
        TypeError: `actual` or `expected` is not a tensor of a floating dtype.
        ValueError: `scale` is not finite.
    """
    check_tensor("actual", actual)
    check_tensor("expected", expected)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")  # inf accepts all
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    errors = (actual.double() - expected.double()).abs()
    if slack is not None:
        errors -= slack
    error = errors.max().item()
    size = max(scale or 0.0, expected.abs().max().item())
    bound = tolerance(actual.dtype, terms) * size
    if not error <= bound:
        raise AssertionError(
            f"{name}: largest error {error:.3e}{'' if slack is None else ', less slack,'} exceeds "
            f"{bound:.3e} "
            f"({str(actual.dtype).removeprefix('torch.')}, {terms} terms, magnitude {size:.3e})"
        )


# Above this condition number, the determinant of a float64 Jacobian has too few correct digits.
LARGEST_CONDITION = 1e10


def check_bijection(
    layer: nn.Module, shape: tuple[int, ...], *, perturb: float = 0.1, seed: int = 0
) -> None:
    """Assert that a layer fulfils the contract of `Bijection`.

    This runs a float64 copy of the layer on a normal x of `shape` and checks that

    - two calls on the same x give the same result;
    - no sample depends on another one;
    - logdet has shape (N,) and equals the log-determinant of autograd's Jacobian;
    - the inverse returns x and the negative logdet;
    - results have the dtype of their input, also in a float32 copy.

    Normal numbers are added to the parameters of the float64 copy first: at their initial values,
    most log-determinants are 0, which hides a wrong sign or a missing factor.

    Args:
        layer: a module with `z, logdet = layer(x)` and `x, logdet = layer.inverse(z)`. z is a
            tensor, or nested tuples of tensors, with the sample axis first. The layer itself does
            not change.
        shape: (N, C, *spatial) with N >= 2. The Jacobian takes D + N backward passes, where D is
            the number of elements per sample, so choose a small shape.
        perturb: standard deviation of the numbers that are added to the parameters.
        seed: seed of x and of these numbers.

    Raises:
        AssertionError: the layer breaks the contract; the message says how.
        ValueError: `shape` has fewer than two samples or no elements.
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
        raise AssertionError(f"logdet: expected shape ({n},), got {tuple(logdet.shape)}")
    if _flat(z).shape != (n, d):
        raise AssertionError(
            f"z: expected {d} elements per sample as in x, got {_flat(z).shape[1]}"
        )
    _check_dtypes(x, z=z, logdet=logdet)

    # A random sum of a sample's outputs depends on all inputs that one of the outputs depends on.
    weights = torch.rand(d, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x)
    jacobian = torch.autograd.functional.jacobian
    of_sums = jacobian(lambda x: _flat(copied(x)[0]) @ weights, x).reshape(n, n, d)
    if of_sums.abs().sum(2).fill_diagonal_(0).any():
        raise AssertionError("forward: a sample's z depends on another sample of the batch")
    # Samples are independent, so the gradient of an output's sum over them is that of each sample.
    own = jacobian(lambda x: _flat(copied(x)[0]).sum(0), x).reshape(d, n, d).transpose(0, 1)
    singular = torch.linalg.svdvals(own)
    condition = (singular[:, 0] / singular[:, -1]).max().item()
    if not condition < LARGEST_CONDITION:
        raise AssertionError(
            f"forward: not invertible, its Jacobian has condition number {condition:.1e}"
        )
    # Rounding changes log |det J| by up to D * eps * condition.
    loose: dict[str, Any] = {"terms": d * d, "scale": max(1.0, condition)}
    expected = torch.linalg.slogdet(own).logabsdet
    try:
        assert_close(logdet, expected, **loose, name="logdet against autograd's Jacobian")
    except AssertionError as error:
        raise AssertionError(f"{error}{_hint(logdet, expected, math.prod(shape[2:]))}") from None

    with torch.no_grad():
        back, logdet_back = copied.inverse(z)
    # The inverse amplifies the rounding of z by up to 1 / the smallest singular value.
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
    """Assert that all results have the dtype of x."""
    for name, value in results.items():
        dtype = _flat(value).dtype
        if dtype != x.dtype:
            actual, expected = (str(d).removeprefix("torch.") for d in (dtype, x.dtype))
            raise AssertionError(
                f"{name.replace('_', ' ')}: expected the input's dtype {expected}, got {actual}"
            )


def _perturbed(
    layer: nn.Module, shape: tuple[int, ...], perturb: float, seed: int
) -> tuple[Any, Tensor]:
    """Return a float64 copy of the layer with perturbed parameters, and an x for it."""
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
    """Flatten a tensor, or nested tuples of tensors, to (N, D)."""
    if isinstance(z, Tensor):
        return z.flatten(1) if z.dim() > 1 else z[:, None]
    return torch.cat([_flat(part) for part in z], dim=1)


def _hint(logdet: Tensor, expected: Tensor, pixels: int) -> str:
    """Say which common mistake a wrong log-determinant looks like, if any."""

    def like(candidate: Tensor) -> bool:
        return torch.allclose(candidate, expected, rtol=1e-6, atol=1e-9)

    if like(-logdet):
        return "; it is that of the inverse: the sign is wrong"
    if pixels > 1 and like(pixels * logdet):
        return f"; it is that of a single pixel, of {pixels}"
    if bool((logdet == logdet[0]).all()) and not bool((expected == expected[0]).all()):
        return "; it is the same for all samples"
    return ""
