from typing import get_args

import pytest
import torch
from cases import SCALES

from mflow_kernels.ops.scale import Kind, ScaleFunction, log_scale_ref, slope_ref
from mflow_kernels.testing import assert_close

KINDS = ", ".join(get_args(Kind))
RAW = torch.linspace(-6, 6, 49, dtype=torch.float64)


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{s.kind} {s.eps}")
def test_formulas(scale):
    expected = {
        "sigmoid": lambda r: 1 / (1 + (-(r + scale.offset)).exp()) + scale.eps,
        "exp": torch.exp,
        "tanh": lambda r: torch.exp(scale.clamp * torch.tanh(r / scale.clamp)),
        "atan": lambda r: torch.exp(scale.clamp * 0.636 * torch.atan(r / scale.clamp)),
    }[scale.kind]
    log_s = log_scale_ref(RAW, scale)
    assert_close(log_s.exp(), expected(RAW))


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{s.kind} {s.eps}")
def test_slope_is_the_derivative(scale):
    raw = RAW.clone().requires_grad_()
    log_s, slope = log_scale_ref(raw, scale), slope_ref(raw, log_scale_ref(raw, scale), scale)
    (expected,) = torch.autograd.grad(log_s.sum(), raw)
    assert_close(slope.detach(), expected)


@pytest.mark.parametrize("kind", ["tanh", "atan"])
def test_bounded(kind):
    raw = torch.tensor([-1e30, -1e4, 0, 1e4, 1e30])
    scale = ScaleFunction(kind, clamp=1.5)
    log_s, slope = log_scale_ref(raw, scale), slope_ref(raw, log_scale_ref(raw, scale), scale)
    assert log_s.abs().max() <= 1.5
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "relu"}, f"scale.kind: expected one of {KINDS}, got 'relu'"),
        ({"order": "both"}, "scale.order: expected one of shift-scale, scale-shift, got 'both'"),
        ({"eps": -1e-3}, "scale.eps: expected a finite number >= 0, got -0.001"),
        ({"eps": float("nan")}, "scale.eps: .* got nan"),
        ({"clamp": 0.0}, "scale.clamp: expected a finite number > 0, got 0.0"),
        ({"clamp": float("inf")}, "scale.clamp: .* got inf"),
        ({"offset": float("inf")}, "scale.offset: expected a finite number, got inf"),
        ({"offset": float("nan")}, "scale.offset: .* got nan"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScaleFunction(**arguments)
