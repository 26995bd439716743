"""The forms of the penalty weight w of the manifold objective."""

import math
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from mflow_kernels.ops.checks import check_count, check_tensor

Domain = Literal["latent", "data"]


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


def check_positive(name: str, value: object) -> None:
    """Check that `value` is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def check_weight(weight: object, domain: Domain) -> Weight:
    """Return the weight as `ManifoldObjective` describes it, or raise TypeError or ValueError."""
    if isinstance(weight, str) and weight != "variance":
        raise ValueError(f"weight: expected a number, a map or 'variance', got {weight!r}")
    if isinstance(weight, (str, WeightSchedule, ErrorBound)):
        if domain == "latent":
            actual = repr(weight) if isinstance(weight, str) else type(weight).__name__
            raise ValueError(
                f"weight: expected a number or a map in the latent domain, got {actual}: the "
                "weight is part of the density there, and stretching v would lower it without bound"
            )
        return cast(Weight, weight)
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
