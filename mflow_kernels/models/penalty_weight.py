"""The penalty weight w of the manifold objective: its forms, and the density exp(-w rho) / Z."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mflow_kernels.ops.checks import check_count, check_tensor
from mflow_kernels.ops.penalty_functions import Rho

Domain = Literal["latent", "data"]
HUBER_ITERATIONS = 12  # each divides the relative error of w by 4 or more, to below 1e-7


@dataclass(frozen=True)
class WeightSchedule:
    """A weight that moves from `start` to `end` over the first `steps` training batches.

    Every batch multiplies it by the same factor. After `steps` batches it stays at `end`.

    Raises:
        TypeError, ValueError: a weight is not a finite number > 0, or steps is not an integer >= 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_positive("start", self.start)
        check_positive("end", self.end)
        check_count("steps", self.steps, 1)


@dataclass(frozen=True)
class ErrorBound:
    """A weight that keeps the mean squared error of the projection at or below `error`.

    Training then minimizes -log p(x) subject to that bound. The weight starts at `start`, or at
    1 / error, the weight that fits a Gaussian with exactly that error. Each training batch
    multiplies the weight by (average / error)^0.005. Here `average` is a running mean of the
    squared error over 10 batches, and the ratio is clamped to [1 / e, e]. The weight rises while
    the error is above the bound and falls while it is below. It stays within [1e-3, 1e8], so that
    it does not overflow if the bound cannot be reached.

    For "l2" the weight is a Lagrange multiplier of the bound. As in GECO (Rezende and Viola,
    *Taming VAEs*, arXiv 1810.00597, algorithm 1), a running mean of the violation changes its
    logarithm; the violation here is the log of a ratio, which has no unit. Penalties other than
    "l2" differ from the bounded error, but a larger weight still lowers that error.

    Args:
        error: largest mean of e^2 over samples and pixels, in squared units of the data.
        start: weight before the first batch; None for 1 / error.

    Raises:
        TypeError, ValueError: a value is not a finite number > 0.
    """

    error: float
    start: float | None = None

    def __post_init__(self) -> None:
        check_positive("error", self.error)
        if self.start is not None:
            check_positive("start", self.start)


Weight = float | Tensor | tuple[Tensor, ...] | Literal["variance"] | WeightSchedule | ErrorBound


def calibrated_weight(mean: Tensor, rho: Rho, delta: float) -> Tensor:
    """Return the w that maximizes the likelihood of errors e under the density exp(-w rho(e)) / Z.

    `mean` is the mean of rho(e), a scalar > 0. Setting the derivative of w mean + log Z(w) to zero
    gives w = (1 + t) / (2 mean), where t is the probability of the linear part of rho under that
    density. t = 0 for l2, so that w is 1 / variance. t = 1 for l1, so that w is 1 / mean |e|. For
    huber, with a = delta sqrt(w / 2),

        t = 1 / (1 + sqrt(pi) a exp(a^2) erf(a)),

    and the equation is solved by iteration.
    """
    if rho == "l1":
        return 1 / mean
    w = 1 / (2 * mean)
    if rho == "huber":
        for _ in range(HUBER_ITERATIONS):
            w = (1 + _tail(w, delta)) / (2 * mean)
    return w


def _tail(w: Tensor, delta: float) -> Tensor:
    """Return the probability of |e| > delta under exp(-w rho(e)) / Z for huber."""
    a = delta * (w / 2).sqrt()
    return 1 / (1 + math.sqrt(math.pi) * a * a.square().exp() * a.erf())


def draw_errors(
    weight: Tensor, rho: Rho, delta: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw an error e from the density exp(-w rho(e)) / Z for each element w > 0 of `weight`.

    This is the normal distribution of variance 1 / w for l2 and the Laplace distribution of scale
    1 / w for l1. For huber, e is normal within |e| <= delta, and beyond it |e| - delta is
    exponential with rate w delta.
    """

    def uniform() -> Tensor:
        return torch.rand(
            weight.shape, generator=generator, dtype=weight.dtype, device=weight.device
        )

    def exponential(rate: Tensor) -> Tensor:
        return -torch.log1p(-uniform()) / rate

    if rho == "l2":
        normal = torch.randn(
            weight.shape, generator=generator, dtype=weight.dtype, device=weight.device
        )
        return normal * weight.rsqrt()
    if rho == "l1":
        size = exponential(weight)
    else:
        erf_at_delta = (delta * (weight / 2).sqrt()).erf()
        inside = (uniform() * erf_at_delta).erfinv() * (2 / weight).sqrt()
        outside = delta + exponential(weight * delta)
        size = torch.where(uniform() < _tail(weight, delta), outside, inside)
    return torch.where(uniform() < 0.5, -size, size)


def check_positive(name: str, value: object) -> None:
    """Check that `value` is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def check_weight(weight: object, domain: Domain) -> Weight:
    """Return the weight as `ManifoldObjective` describes it, or raise TypeError or ValueError."""
    if isinstance(weight, str):
        if weight != "variance":
            raise ValueError(f"weight: expected a number, a map or 'variance', got {weight!r}")
        if domain == "latent":
            raise ValueError(
                "weight: expected a number or a map in the latent domain, got 'variance': "
                "stretching v would then lower the loss without bound"
            )
        return "variance"
    if isinstance(weight, (WeightSchedule, ErrorBound)):
        if domain == "latent":
            raise ValueError(
                "weight: expected a number or a map in the latent domain, got "
                f"{type(weight).__name__}: the weight is part of the density there"
            )
        return weight
    if isinstance(weight, (Tensor, tuple)):
        if isinstance(weight, tuple) != (domain == "latent"):
            kind = "a tuple of one map per latent" if domain == "latent" else "one map of the image"
            raise TypeError(
                f"weight: expected {kind} in the {domain} domain, got a {type(weight).__name__}"
            )
        if isinstance(weight, Tensor):
            _check_map("weight", weight, domain)
        else:
            for i, part in enumerate(weight):
                _check_map(f"weight[{i}]", part, domain)
        return weight
    check_positive("weight", weight)
    return float(weight)  # type: ignore[arg-type]


def _check_map(name: str, value: object, domain: Domain) -> None:
    part = check_tensor(name, value)
    if not part.numel():
        raise ValueError(f"{name}: expected a map that is not empty, got shape {tuple(part.shape)}")
    low, high = (value.item() for value in part.detach().aminmax())
    wanted = "> 0" if domain == "latent" else ">= 0, not all 0"
    good = low > 0 if domain == "latent" else low >= 0 and high > 0
    if not (good and high < math.inf):
        raise ValueError(
            f"{name}: expected finite numbers {wanted}, got numbers in [{low}, {high}]"
        )
