"""Types and checks for the penalty weight w of the manifold objective."""

import math
from typing import Literal

from torch import Tensor

from mflow_kernels.ops.checks import check_tensor

Domain = Literal["latent", "data"]
Weight = float | Tensor | tuple[Tensor, ...] | Literal["variance"]


def check_positive(name: str, value: object) -> None:
    """Check that `value` is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
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
    if isinstance(weight, Tensor | tuple):
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
