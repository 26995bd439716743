"""Rational-quadratic splines: by hand, at knots and at extremes.

tests/interop compares them with those of nflows, normflows and zuko.
"""

import math

import pytest
import torch
from cases import normal

from mflow_kernels import ops
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.rational_quadratic import transform_ref
from mflow_kernels.ops.spline import bins_ref
from mflow_kernels.testing import assert_close

FUNCTIONS = {False: ops.rational_quadratic, True: ops.rational_quadratic_inverse}
EPS = torch.finfo(torch.float32).eps
both = pytest.mark.parametrize("inverse", [False, True])


def test_by_hand(device):
    """Widths 2 and 2, heights 3 and 1, and the slope d = 1/2 + log 2 at the knot (0, 1)."""
    options = {"min_width": 0.0, "min_height": 0.0, "min_slope": 0.5}
    x = torch.tensor([[-1.0], [-2.0], [0.0], [2.0], [5.0]], dtype=torch.float64, device=device)
    raw = torch.tensor([0.0, 0.0, math.log(3), 0.0, 0.0], dtype=torch.float64, device=device)
    d = 0.5 + math.log(2)
    y, logdet = ops.rational_quadratic(x, raw.expand(5, 5).contiguous(), 2, 2.0, **options)
    below = 1.5 * (0.25 + 0.25) + (1 + d) * 0.25
    slope = (0.25 * d + 2 * 1.5 * 0.25 + 0.25) * (1.5 / below) ** 2
    middle = -2 + 3 * (1.5 * 0.25 + 0.25) / below
    want = torch.tensor([middle, -2, 1, 2, 5], dtype=torch.float64)
    assert_close(y[:, 0].cpu(), want, terms=4, name="y")
    logs = torch.tensor([slope, 1, d, 1, 1], dtype=torch.float64).log()
    assert_close(logdet.cpu(), logs, terms=4, name="logdet")


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_knots(dtype, inverse, device):
    """A spline maps knot to knot, with the knot's slope; at and beyond the bound it is linear."""
    spline = ops.Spline(8, 3.0)
    params = normal(1, spline.numbers, dtype=torch.float64).to(dtype)
    widths, heights, slopes = (part[0, 0] for part in bins_ref(params.double(), spline))
    knots = [torch.cat([part.new_zeros(1), part.cumsum(0)]) - 3 for part in (widths, heights)]
    outside = torch.tensor([-1e30, -3.5, 3.5, 1e30], dtype=torch.float64)
    x = torch.cat([knots[inverse], outside])
    want = torch.cat([knots[not inverse], outside])
    logs = torch.cat([slopes.log() * (-1 if inverse else 1), torch.zeros(4)])
    rows = params.expand(len(x), -1).contiguous().to(device)
    y, logdet = FUNCTIONS[inverse](x.to(device, dtype)[:, None], rows, 8, 3.0)
    y, logdet = y[:, 0].cpu(), logdet.cpu()
    assert_close(y[:9], want[:9], terms=8)
    assert torch.equal(y[9:], outside.to(dtype))
    # Dividing by the smallest bin multiplies the rounding of a knot, a few eps of the interval.
    smallest = min(widths.min().item(), heights.min().item()) / 6
    assert_close(logdet[1:8], logs[1:8], terms=round((4 / smallest) ** 2), scale=1.0)
    assert not logdet[9:].any()


@both
@pytest.mark.parametrize("tails", ["linear", "circular", None])
def test_infinities_and_nan(tails, inverse, device):
    """Tails pass infinities through. Without tails, and for NaN, an element becomes NaN."""
    special = torch.tensor([math.inf, -math.inf, math.nan, 4.0], device=device)[:, None]
    params = normal(4, {"linear": 23, "circular": 24, None: 25}[tails], device=device)
    y, logdet = FUNCTIONS[inverse](special, params, 8, 3.0, tails=tails)
    if tails:
        torch.testing.assert_close(y, special, rtol=0, atol=0, equal_nan=True)
        assert not logdet.any()
    else:
        assert y.isnan().all()
        assert logdet.isnan().all()
    y, _ = FUNCTIONS[inverse](torch.zeros(1, 1), params[:1].cpu() * math.nan, 8, 3.0, tails=tails)
    assert y.isnan().all()


def steep(count: int) -> torch.Tensor:
    """Raw numbers that reach the least widths, heights and slopes of 1e-3, in any order."""
    sizes = 12 * torch.randint(-1, 2, (count, 16)).float()
    slopes = torch.tensor([-20.0, 0.0, 3.0])[torch.randint(0, 3, (count, 7))]
    return torch.cat([sizes, slopes], 1)


@both
def test_least_bins_and_slopes(inverse, device):
    """float32 at widths, heights and slopes of 1e-3 of their units.

    The result lies between those of float64 at the two ends of the rounding of a position: a few
    eps of the interval. Beyond that only the formula's own rounding is allowed.
    """
    count = 400
    x, params = 6 * torch.rand(count, 1) - 3, steep(count)
    y, logdet = FUNCTIONS[inverse](x.to(device), params.to(device), 8, 3.0)
    spline = ops.Spline(8, 3.0)
    shift = 4 * EPS * 6
    x, params = x.double(), params.double()
    near = [transform_ref(x + s, params, spline, 0, inverse) for s in (-shift, 0.0, shift)]
    for got, values in ((y, [n[0] for n in near]), (logdet[:, None], [n[1] for n in near])):
        spread = (torch.stack(values) - values[1]).abs().amax(0)
        # A position at a knot may fall into the next bin, from which `spread` sees the end.
        excess = (got.cpu().double() - values[1]).abs() - 2 * spread
        assert excess.max() <= 64 * EPS * values[1].abs().max().clamp(min=1)


@both
def test_identity(inverse, device):
    """With all raw numbers at `Spline.identity` the spline is the identity."""
    for kind in ("softplus", "exp"):
        spline = ops.Spline(5, 2.0, kind=kind)
        x = normal(6, 3, device=device)
        params = torch.full((6, 3 * spline.numbers), spline.identity, device=device)
        y, logdet = FUNCTIONS[inverse](x, params, 5, 2.0, kind=kind)
        assert_close(y, x.double(), terms=5, scale=2.0)
        assert_close(logdet, torch.zeros(6).double().to(device), terms=15, scale=1.0)


@pytest.mark.skipif(KERNELS_ON_CPU, reason="the loops of csrc are compared")
def test_float32_is_as_exact_as_nflows():
    """For raw numbers from N(0, 1). From N(0, 10), nflows raises an error."""
    nflows = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(50_000, 1, generator=generator) - 3
    params = torch.randn(50_000, 23, generator=generator)
    theirs, _ = nflows.unconstrained_rational_quadratic_spline(
        x, *params[:, None].split([8, 8, 7], -1), tails="linear", tail_bound=3.0
    )
    exact, _ = ops.rational_quadratic(x.double(), params.double(), 8, 3.0)
    ours, _ = ops.rational_quadratic(x, params, 8, 3.0)
    for norm in (torch.amax, torch.mean):
        assert norm((ours - exact).abs(), (0, 1)) < norm((theirs - exact).abs(), (0, 1))
    steep, logdet = ops.rational_quadratic(x, 10 * params, 8, 3.0)
    assert steep.isfinite().all()
    assert logdet.isfinite().all()


@both
def test_circular_tails_share_a_slope(inverse, device):
    """On a circle a spline is that of a bounded interval whose two end slopes are one number."""
    x = (6 * torch.rand(7, 2, dtype=torch.float64, device=device) - 3).requires_grad_()
    raw = normal(7, 2, 12, dtype=torch.float64, device=device).requires_grad_()
    bounded = torch.cat([raw, raw[..., 8:9]], 2).flatten(1)
    got = FUNCTIONS[inverse](x, raw.flatten(1), 4, 3.0, tails="circular")
    want = FUNCTIONS[inverse](x, bounded, 4, 3.0, tails=None)
    weights = [normal(*y.shape, dtype=torch.float64, device=device) for y in got]
    grads = (torch.autograd.grad(result, (x, raw), weights) for result in (got, want))
    for one, other in zip((*got, *next(grads)), (*want, *next(grads)), strict=True):
        assert_close(one, other, terms=16)
    outside = torch.tensor([[-4.0, 5.0]], dtype=torch.float64, device=device)
    y, logdet = FUNCTIONS[inverse](outside, raw[:1].flatten(1), 4, 3.0, tails="circular")
    assert torch.equal(y, outside)
    assert not logdet.any()
