import math

import pytest
import torch

from mflow_kernels import ErrorBound, ManifoldObjective, WeightSchedule
from mflow_kernels.ops.penalty_functions import RHOS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"domain": "pixel"}, ValueError, "domain: expected one of latent, data, got 'pixel'"),
        ({"rho": "l3"}, ValueError, f"rho: expected one of {', '.join(RHOS)}, got 'l3'"),
        ({"weight": 0.0}, ValueError, "weight: expected a finite number > 0, got 0.0"),
        ({"weight": -2}, ValueError, "weight: expected a finite number > 0, got -2"),
        ({"weight": math.inf}, ValueError, "weight: expected a finite number > 0, got inf"),
        ({"weight": math.nan}, ValueError, "weight: expected a finite number > 0, got nan"),
        ({"weight": None}, TypeError, "weight: expected a number, got NoneType"),
        ({"weight": True}, TypeError, "weight: expected a number, got bool"),
        (
            {"domain": "data", "weight": "std"},
            ValueError,
            "weight: expected a number, a map or 'variance', got 'std'",
        ),
        (
            {"domain": "latent", "weight": "variance"},
            ValueError,
            "weight: expected a number or a map in the latent domain, got 'variance': stretching v",
        ),
        (
            {"domain": "latent", "weight": ErrorBound(0.1)},
            ValueError,
            "weight: expected a number or a map in the latent domain, got ErrorBound: the weight",
        ),
        (
            {"domain": "latent", "weight": WeightSchedule(2, 1, 3)},
            ValueError,
            "weight: expected a number or a map in the latent domain, got WeightSchedule",
        ),
        (
            {"domain": "latent", "weight": torch.ones(3)},
            TypeError,
            "weight: expected a tuple of one map per latent in the latent domain, got a Tensor",
        ),
        (
            {"domain": "data", "weight": (torch.ones(3),)},
            TypeError,
            "weight: expected one map of the image in the data domain, got a tuple",
        ),
        (
            {"domain": "latent", "weight": (torch.tensor([1.0, 0.0]),)},
            ValueError,
            r"weight\[0\]: expected finite numbers > 0, got numbers in .0.0, 1.0.",
        ),
        (
            {"domain": "data", "weight": torch.tensor([-1.0, 0.0])},
            ValueError,
            "weight: expected finite numbers >= 0, not all 0, got numbers in .-1.0, 0.0.",
        ),
        (
            {"domain": "data", "weight": torch.zeros(3)},
            ValueError,
            "not all 0, got numbers in .0.0, 0.0.",
        ),
        (
            {"domain": "data", "weight": torch.tensor([1.0, math.nan])},
            ValueError,
            "weight: expected finite numbers .* got numbers in .nan, nan.",
        ),
        (
            {"domain": "data", "weight": torch.tensor([1.0, math.inf])},
            ValueError,
            "weight: expected finite numbers .* got numbers in .1.0, inf.",
        ),
        (
            {"domain": "data", "weight": torch.ones(0)},
            ValueError,
            "weight: expected a map that is not empty",
        ),
        ({"domain": "data", "weight": torch.ones(3).int()}, TypeError, "weight: .*got int32"),
        ({"delta": 0}, ValueError, "delta: expected a finite number > 0, got 0"),
        ({"delta": -1.0}, ValueError, "delta: expected a finite number > 0, got -1.0"),
        ({"sigma": math.nan}, ValueError, "sigma: expected a finite number > 0, got nan"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ManifoldObjective(**arguments)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ErrorBound(0.0), ValueError, "error: expected a finite number > 0, got 0.0"),
        (lambda: ErrorBound(0.1, math.inf), ValueError, "start: expected a finite number > 0"),
        (lambda: WeightSchedule(1, -1, 5), ValueError, "end: expected a finite number > 0, got -1"),
        (lambda: WeightSchedule(1, 2, 0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: WeightSchedule(1, 2, 0.6), TypeError, "steps: expected a whole number, got float"),
    ],
)
def test_bad_schedules_and_bounds(build, error, message):
    with pytest.raises(error, match=message):
        build()
