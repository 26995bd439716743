"""The normalizers of the densities exp(-weight rho(e)) / Z."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mflow_kernels.ops.penalty_functions import RHOS, penalty_function, penalty_log_normalizer
from mflow_kernels.testing import assert_close


@pytest.mark.parametrize("rho", RHOS)
def test_normalizer_is_the_integral(rho: Any) -> None:
    delta = 0.8
    for weight in (1e-3, 0.1, 1.0, 7.0, 1e4):
        width = 60 * max(weight**-0.5, 1 / (weight * delta), 1 / weight)
        # Finest at zero, where the density peaks (and l1 has its kink).
        e = torch.from_numpy(np.linspace(0, 1, 400_001) ** 3 * width)
        density = torch.exp(-weight * penalty_function(rho).value(e, delta))
        integral = 2 * torch.trapezoid(density, e)
        got = penalty_log_normalizer(rho, weight, delta)
        assert got == pytest.approx(integral.log().item(), rel=1e-7, abs=1e-7)


def test_normalizer_at_the_ends() -> None:
    for weight in (1e-300, 1e-30, 1e30, 1e300):
        tails = math.log(2 / 0.5) - math.log(weight)
        gaussian = 0.5 * math.log(2 * math.pi / weight)
        want = tails if weight < 1 else gaussian
        assert penalty_log_normalizer("huber", weight, 0.5) == pytest.approx(want, rel=1e-12)
    w = torch.tensor([1e-30, 1.0, 1e30, 0.0])
    for rho in RHOS:
        got = penalty_log_normalizer(rho, w, 0.5)
        want = [penalty_log_normalizer(rho, v, 0.5) for v in w[:3].double().tolist()]
        assert got.dtype == torch.float32
        assert_close(got[:3], torch.tensor(want, dtype=torch.float64))
        assert got[3] == math.inf
    assert penalty_log_normalizer("l2", w.bfloat16()).dtype == torch.float32
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="weight: expected a finite number above 0"):
            penalty_log_normalizer("l2", bad)
    with pytest.raises(ValueError, match="rho: expected one of"):
        penalty_log_normalizer("l3", 1.0)  # type: ignore[call-overload]
