import math

import pytest
import torch
from torch import nn

from mflow_kernels import ActNorm, AffineCoupling, InvertibleConv1x1
from mflow_kernels.testing import EPS, SAFETY, assert_close, check_bijection, tolerance


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_assert_close_at_its_bound(dtype):
    bound = tolerance(dtype, terms=4)
    expected = torch.tensor([1.0, -0.5], dtype=torch.float64)
    inside = (expected + 0.5 * bound).to(dtype)
    outside = (expected + 2.0 * bound).to(dtype)
    assert_close(inside, expected, terms=4)
    with pytest.raises(AssertionError, match=r"sum: largest error .* exceeds .* 4 terms"):
        assert_close(outside, expected, terms=4, name="sum")


def test_tolerance_grows_as_the_root_of_terms():
    assert tolerance(torch.float32, 100) == pytest.approx(10 * tolerance(torch.float32))
    assert tolerance(torch.float64) == SAFETY * 2**-52
    # A 16-bit result is rounded once; the error of its float32 sum is small beside that.
    assert tolerance(torch.bfloat16, 100) < 1.001 * SAFETY * (2**-7) + 1e-5


def test_a_scale_bounds_errors_of_small_values():
    assert_close(torch.tensor([1e-5]), torch.tensor([0.0]), scale=100.0)


def test_slack_belongs_to_one_element():
    expected, slack = torch.zeros(2), torch.tensor([0.5, 0.0])
    assert_close(torch.tensor([0.4, 0.0]), expected, slack=slack)
    for wrong in ([0.6, 0.0], [0.0, 0.4], [math.nan, 0.0]):
        with pytest.raises(AssertionError, match="less slack, exceeds"):
            assert_close(torch.tensor(wrong), expected, slack=slack)


ONES = torch.ones(2)
REFUSED = [
    (lambda: assert_close(torch.tensor([1e-5]), torch.zeros(1)), AssertionError, "exceeds"),
    *(
        (lambda a=a, b=b: assert_close(torch.tensor([a]), torch.tensor([b])), AssertionError, ".")
        for a, b in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan))
    ),
    (lambda: assert_close(ONES[:1], ONES), AssertionError, r"shape \(1,\), not \(2,\)"),
    (lambda: tolerance(torch.int64), TypeError, "dtype: expected one of torch.float64, .*int64"),
    (lambda: assert_close(ONES, ONES, terms=0), ValueError, "terms: expected at least 1, got 0"),
    (lambda: assert_close(ONES, ONES.long()), TypeError, "expected dtype float32, .*got int64"),
    *(
        (lambda s=s: assert_close(ONES, ONES, scale=s), ValueError, f"a finite number, got {s}")
        for s in (math.inf, math.nan)
    ),
    *(
        (lambda s=s: check_bijection(ActNorm(3), s), ValueError, r"shape: expected \(N, C, ")
        for s in ((1, 3), (2,), (2, 3, 0))
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


class Squares(nn.Module):
    """The Jacobian is invertible, but x and -x have the same z."""

    def forward(self, x):
        return x.square(), (2 * x).abs().log().flatten(1).sum(1)

    def inverse(self, z):
        return z.sqrt(), -(4 * z).log().flatten(1).sum(1) / 2


class Wrong(nn.Module):
    """A correct layer, whose results are changed."""

    def __init__(self, layer, forward, inverse) -> None:
        super().__init__()
        self.layer, self.change, self.change_inverse = layer, forward, inverse

    def forward(self, x):
        return self.change(*self.layer(x))

    def inverse(self, z):
        return self.change_inverse(*self.layer.inverse(z))


def scale():
    return ActNorm(3)


def coupling():
    return AffineCoupling(3, width=4)


def right(result, logdet):
    return result, logdet


def wrong_sign(result, logdet):
    return result, -logdet


def single_pixel(result, logdet):
    return result, logdet / result[0, 0].numel()


JACOBIAN = "logdet against autograd's Jacobian: .*"
# A layer, the mistakes in its forward and inverse, and the message that names them.
PLANTED = {
    "NoPixels": (scale, single_pixel, right, JACOBIAN + "it is that of a single pixel, of 4"),
    "WrongSign": (scale, wrong_sign, right, JACOBIAN + "the sign is wrong"),
    "OverTheBatch": (
        *(coupling, lambda z, logdet: (z, logdet.mean().expand(len(z))), right),
        JACOBIAN + "the same for all samples",
    ),
    "SumOverTheBatch": (
        *(coupling, lambda z, logdet: (z, logdet.sum()), right),
        r"logdet: expected shape \(2,\), got \(\)",
    ),
    "InverseKeepsSign": (coupling, right, wrong_sign, "logdet of the inverse: "),
    "NoInverse": (
        *(coupling, right, lambda x, logdet: (x * (1 + 1e-9), logdet)),
        r"inverse\(forward\(x\)\): ",
    ),
    "Singular": (  # the last channel is lost
        *(scale, lambda z, logdet: (torch.cat([z[:, :2], z[:, 1:2]], 1), logdet), right),
        "not invertible, its Jacobian has condition",
    ),
    "Shrinks": (
        *(scale, lambda z, logdet: (z[:, :2], logdet), right),
        "z: expected 12 elements per sample as in x, got 8",
    ),
    "MixesSamples": (
        *(scale, lambda z, logdet: (z + 1e-3 * z.mean(0), logdet), right),
        "a sample's z depends on another sample",
    ),
    "Draws": (
        *(scale, lambda z, logdet: (z + 1e-6 * torch.rand(()), logdet), right),
        "two calls on one input differ",
    ),
    "Squares": (Squares, right, right, r"inverse\(forward\(x\)\): "),
    "LogdetInFloat32": (
        *(coupling, lambda z, logdet: (z, logdet.float()), right),
        "logdet: expected the input's dtype float64, got float32",
    ),
    "Widens": (  # a float64 constant widens float32 results
        *(scale, lambda z, logdet: (z * torch.ones(3, 2, 2).double(), logdet), right),
        "z: expected the input's dtype float32, got float64",
    ),
}


@pytest.mark.parametrize(("layer", "forward", "inverse", "message"), PLANTED.values(), ids=PLANTED)
def test_check_bijection_finds(layer, forward, inverse, message):
    with pytest.raises(AssertionError, match=message):
        check_bijection(Wrong(layer(), forward, inverse), (2, 3, 2, 2))


def test_check_bijection_leaves_the_layer_alone():
    layer = InvertibleConv1x1(3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    check_bijection(layer, (2, 3, 2))
    for name, value in layer.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
