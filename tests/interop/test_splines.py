"""nflows' spline functions, imported from here."""

import pytest
import torch

from interop import peers
from mflow_kernels.interop.nflows import splines

theirs = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
base = pytest.importorskip("nflows.transforms.base")

INTERVALS = {
    "the same": {"left": -1.3, "right": 2.0, "bottom": -1.3, "top": 2.0},
    "the default": {},
    "another": {"left": -1.3, "right": 2.0, "bottom": -4.0, "top": 7.0, "min_derivative": 0.02},
    "linear tails": {"tail_bound": 1.5, "min_bin_width": 1e-2},
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interval", INTERVALS)
def test_values_and_gradients_are_those_of_nflows(interval, inverse):
    torch.manual_seed(0)
    options, tails = INTERVALS[interval], interval == "linear tails"
    shares = torch.rand(4, 3, 5, dtype=torch.float64)
    low, high = (options.get(k, d) for k, d in (("left", 0.0), ("right", 1.0)))
    x = 4 * shares - 2 if tails else low + (high - low) * shares
    raw = [torch.randn(4, 3, 5, k).double() for k in (6, 6, 5 if tails else 7)]
    name = "unconstrained_rational_quadratic_spline" if tails else "rational_quadratic_spline"
    found = []
    for module in (splines, theirs):
        given = [t.clone().requires_grad_() for t in (x, *raw)]
        y, log_slope = getattr(module, name)(*given, inverse=inverse, **options)
        total = peers.input_gradient(given[0], [y, log_slope])
        (y.cos().sum() + log_slope.square().sum()).backward()
        found.append([y, log_slope, total, *(t.grad for t in given)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-10, atol=1e-10)


def test_circular_tails_are_those_of_normflows():
    theirs = pytest.importorskip("normflows.utils.splines")
    x = torch.linspace(-2, 2, 30, dtype=torch.float64)[:, None]
    raw = [torch.randn(30, 1, 6).double() for _ in range(3)]
    pairs = (
        m.unconstrained_rational_quadratic_spline(x, *raw, tails="circular", tail_bound=1.5)
        for m in (splines, theirs)
    )
    torch.testing.assert_close(*pairs)


def test_errors_are_those_of_nflows():
    x, raw = torch.tensor([0.5, 1.5]), [torch.zeros(2, k) for k in (4, 4, 5)]
    with pytest.raises(base.InputOutsideDomain, match=r"inputs: expected elements in \[0"):
        splines.rational_quadratic_spline(x, *raw)
    with pytest.raises(RuntimeError, match="cubic tails are not implemented"):
        splines.unconstrained_rational_quadratic_spline(x, *raw, tails="cubic")
    with pytest.raises(ValueError, match=r"unnormalized_derivatives: expected shape \(2, 3\)"):
        splines.unconstrained_rational_quadratic_spline(x, *raw)
    with pytest.raises(ValueError, match="min_width: expected"):
        splines.rational_quadratic_spline(x / 2, *raw, min_bin_width=0.5)
