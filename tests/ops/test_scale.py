import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from cases import SCALES
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.scale import Kind, ScaleFunction, log_scale_ref
from mflow_kernels.testing import assert_close

KINDS = ", ".join(get_args(Kind))
RAW = torch.linspace(-6, 6, 49, dtype=torch.float64)
loops = pytest.mark.skipif(cpu._C is None, reason="csrc is not built")
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{s.kind} {s.eps}")
def test_formulas(scale):
    expected = {
        "sigmoid": lambda r: 1 / (1 + (-(r + scale.offset)).exp()) + scale.eps,
        "double-sigmoid": lambda r: 2 / (1 + (-r).exp()),
        "softplus": lambda r: ((1 + r.exp()).log() + scale.eps).clamp(max=math.exp(scale.clamp)),
        "exp": torch.exp,
        "tanh": lambda r: torch.exp(scale.clamp * torch.tanh(r / scale.clamp)),
        "atan": lambda r: torch.exp(scale.clamp * 0.636 * torch.atan(r / scale.clamp)),
        "softsign": lambda r: torch.exp(torch.sign(r) / (1 / r.abs() + 1 / scale.clamp)),
    }[scale.kind]
    log_s = log_scale_ref(RAW, scale)
    assert_close(log_s.exp(), expected(RAW))


def slope_ref(raw: Tensor, scale: ScaleFunction) -> Tensor:
    """d log s / d raw."""
    leaf = raw.clone().requires_grad_()
    return torch.autograd.grad(log_scale_ref(leaf, scale).sum(), leaf)[0]


@pytest.mark.parametrize("kind", ["tanh", "atan", "softsign"])
def test_bounded(kind):
    raw = torch.tensor([-1e30, -1e4, 0, 1e4, 1e30])
    scale = ScaleFunction(kind, clamp=1.5)
    log_s, slope = log_scale_ref(raw, scale), slope_ref(raw, scale)
    assert log_s.abs().max() <= 1.5
    assert slope.isfinite().all()


def by_loops(raw: Tensor, scale: ScaleFunction) -> tuple[Tensor, Tensor]:
    """Compute log s and its slope by the loops of csrc.

    Each sample has one scaled channel, so its ledger is log s. With dlogdet = 1, the gradient of
    raw is the slope.
    """
    x, params = raw.new_zeros(len(raw), 2), torch.stack([raw, torch.zeros_like(raw)], dim=1)
    how = params, scale.args, 1, False
    ledger = cpu.change_half("coupling", x, *how)[1]
    ones = raw.new_ones(len(raw))
    slope = cpu.change_half_backward("coupling", x, ones, x, *how)[1][:, 0]
    if scale.kind == "exp":  # s = e^raw overflows, and infinity times a gradient of 0 is NaN
        slope = slope.where(log_scale_ref(raw, scale).exp().isfinite(), 1.0)
    return ledger[:, 0], slope


@loops
@floats
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_loops_are_accurate_to_the_last_places(scale, dtype):
    """Errors are relative to each value, not to the largest, from 1e-30 up to overflow."""
    magnitudes = torch.logspace(-30, 2.5, 4001, dtype=torch.float64)
    raw = torch.cat([magnitudes, -magnitudes, torch.linspace(-12, 12, 4001).double()]).to(dtype)
    raw = raw[raw.abs() <= 300]
    got = by_loops(raw, scale)
    log_s = log_scale_ref(raw.double(), scale)
    # Autograd's own formulas of these lose digits for large raw even in float64.
    exact = {
        "tanh": lambda raw: 1 / torch.cosh(raw / scale.clamp).square(),
        "double-sigmoid": lambda raw: torch.sigmoid(-raw),
        "softplus": lambda raw: (F.logsigmoid(raw) - log_s).exp() * (log_s < scale.clamp),
    }
    slope = exact.get(scale.kind, lambda raw: slope_ref(raw, scale))
    wants = log_s, slope(raw.double())
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # A slope that falls as e^-|raw| amplifies the rounding of raw / clamp and raw + offset.
    growth = 1 + 2 * raw.double().abs()
    for name, a, b, grown in zip(("log s", "slope"), got, wants, (1, growth), strict=True):
        # If s is near 1, its rounding error is large relative to its logarithm.
        absolute = 4 * eps if scale.kind in ("sigmoid", "softplus") else 4 * tiny
        error = (a.double() - b).abs()
        assert (error <= 8 * eps * grown * b.abs() + absolute).all(), name


@loops
@floats
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_loops_neither_overflow_nor_swallow_nan(scale, dtype):
    raw = torch.tensor([1e4, -1e4, 3e38, -3e38, -120.0, 0.0, float("nan")], dtype=dtype)
    log_s, slope = by_loops(raw, scale)
    assert log_s[:-1].isfinite().all()
    assert slope[:-1].isfinite().all()
    assert log_s[-1].isnan()
    assert slope[-1].isnan() or scale.kind == "exp"
    infinite = torch.tensor([float("inf")], dtype=dtype)
    want = log_scale_ref(infinite, scale)
    assert torch.equal(by_loops(infinite, scale)[0].isinf(), want.isinf())
