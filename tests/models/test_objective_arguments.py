import math

import pytest
import torch

from mflow_kernels import ErrorBound, ManifoldObjective, WeightSchedule
from mflow_kernels.ops.penalty_functions import RHOS

NUMBERS = "finite numbers >= 0, not all 0, got numbers in"
LATENT = "a number or a map in the latent domain, got"


@pytest.mark.parametrize(
    ("domain", "weight", "error", "words"),
    [
        ("data", 0.0, ValueError, "a finite number > 0, got 0.0"),
        ("data", math.inf, ValueError, "a finite number > 0, got inf"),
        ("data", None, TypeError, "a number, got NoneType"),
        ("data", "std", ValueError, "a number, a map or 'variance', got 'std'"),
        ("latent", "variance", ValueError, f"{LATENT} 'variance': stretching v"),
        ("latent", ErrorBound(0.1), ValueError, f"{LATENT} ErrorBound: the weight"),
        ("latent", WeightSchedule(2, 1, 3), ValueError, f"{LATENT} WeightSchedule: the weight"),
        ("latent", torch.ones(3), TypeError, "a tuple .* latent domain, got a Tensor"),
        ("latent", (torch.tensor([1.0, 0.0]),), ValueError, "finite numbers > 0, .* .0.0, 1.0."),
        ("data", (torch.ones(3),), TypeError, "one map .* in the data domain, got a tuple"),
        ("data", torch.tensor([-1.0, 0.0]), ValueError, f"{NUMBERS} .-1.0, 0.0."),
        ("data", torch.zeros(3), ValueError, f"{NUMBERS} .0.0, 0.0."),
        ("data", torch.tensor([1.0, math.nan]), ValueError, f"{NUMBERS} .nan, nan."),
        ("data", torch.ones(0), ValueError, "a map that is not empty"),
        ("data", torch.ones(3).int(), TypeError, ".*got int32"),
    ],
    ids=str,
)
def test_bad_weights(domain, weight, error, words):
    name = r"weight\[0\]" if isinstance(weight, tuple) and domain == "latent" else "weight"
    with pytest.raises(error, match=f"^{name}: expected {words}"):
        ManifoldObjective(domain, weight=weight)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ManifoldObjective("pixel"), ValueError, "domain: .* latent, data, got 'pixel'"),
        (lambda: ManifoldObjective(rho="l3"), ValueError, f"rho: .* {', '.join(RHOS)}, got 'l3'"),
        (lambda: ManifoldObjective(delta=0), ValueError, "delta: .* finite number > 0, got 0"),
        (lambda: ManifoldObjective(sigma=math.nan), ValueError, "sigma: .* number > 0, got nan"),
        (lambda: ErrorBound(0.0), ValueError, "error: expected a finite number > 0, got 0.0"),
        (lambda: ErrorBound(0.1, math.inf), ValueError, "start: expected a finite number > 0"),
        (lambda: WeightSchedule(1, -1, 5), ValueError, "end: expected a finite number > 0, got -1"),
        (lambda: WeightSchedule(1, 2, 0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: WeightSchedule(1, 2, 0.6), TypeError, "steps: expected a whole number, got float"),
    ],
)
def test_bad_numbers_and_names(build, error, message):
    with pytest.raises(error, match=message):
        build()
