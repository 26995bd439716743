import math

import pytest
import torch
from torch import nn

from mflow_kernels import AffineCoupling, InvertibleConv1x1
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


def test_assert_close_uses_scale():
    assert_close(torch.tensor([1e-5]), torch.tensor([0.0]), scale=100.0)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1e-5]), torch.tensor([0.0]))


def test_slack_belongs_to_one_element():
    expected, slack = torch.zeros(2), torch.tensor([0.5, 0.0])
    assert_close(torch.tensor([0.4, 0.0]), expected, slack=slack)
    for wrong in ([0.6, 0.0], [0.0, 0.4], [math.nan, 0.0]):
        with pytest.raises(AssertionError, match="less slack, exceeds"):
            assert_close(torch.tensor(wrong), expected, slack=slack)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_assert_close_never_passes_inf_or_nan(bad):
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([bad]), torch.tensor([1.0]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0]), torch.tensor([math.nan]))


def test_bad_dtypes_terms_and_scales_are_refused():
    ones = torch.ones(2)
    with pytest.raises(TypeError, match=r"dtype: expected one of torch.float64, .*got torch.int64"):
        tolerance(torch.int64)
    with pytest.raises(ValueError, match="terms: expected at least 1, got 0"):
        assert_close(ones, ones, terms=0)
    with pytest.raises(TypeError, match=r"expected: expected dtype float32, .*got int64"):
        assert_close(ones, ones.long())
    for scale in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"scale: expected a finite number, got {scale}"):
            assert_close(ones, 2 * ones, scale=scale)


def test_assert_close_never_broadcasts():
    with pytest.raises(AssertionError, match=r"shape \(1,\), not \(2,\)"):
        assert_close(torch.ones(1), torch.ones(2))
    assert_close(torch.ones(0), torch.ones(0))


class Scale(nn.Module):
    """y = exp(a) x for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))

    def _s(self, x):
        return self.a.exp().view(-1, *(1,) * (x.dim() - 2))

    def forward(self, x):
        return x * self._s(x), (self.a.sum() * x[0, 0].numel()).expand(x.shape[0])

    def inverse(self, z):
        return z / self._s(z), -(self.a.sum() * z[0, 0].numel()).expand(z.shape[0])


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
    "NoPixels": (Scale, single_pixel, right, JACOBIAN + "it is that of a single pixel, of 4"),
    "WrongSign": (Scale, wrong_sign, right, JACOBIAN + "the sign is wrong"),
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
        *(Scale, lambda z, logdet: (torch.cat([z[:, :2], z[:, 1:2]], 1), logdet), right),
        "not invertible, its Jacobian has condition",
    ),
    "Shrinks": (
        *(Scale, lambda z, logdet: (z[:, :2], logdet), right),
        "z: expected 12 elements per sample as in x, got 8",
    ),
    "MixesSamples": (
        *(Scale, lambda z, logdet: (z + 1e-3 * z.mean(0), logdet), right),
        "a sample's z depends on another sample",
    ),
    "Draws": (
        *(Scale, lambda z, logdet: (z + 1e-6 * torch.rand(()), logdet), right),
        "two calls on one input differ",
    ),
    "Squares": (Squares, right, right, r"inverse\(forward\(x\)\): "),
    "NoPixelsBack": (Scale, right, single_pixel, "logdet of the inverse: "),
    "OthersLogdet": (  # all samples get the log-determinant of the first one
        *(coupling, lambda z, logdet: (z, logdet[:1].expand(len(z))), right),
        JACOBIAN + "the same for all samples",
    ),
    "Column": (  # (N, 1) broadcasts with (N,) to (N, N)
        *(coupling, lambda z, logdet: (z, logdet[:, None]), right),
        r"logdet: expected shape \(2,\), got \(2, 1\)",
    ),
    "LogdetInFloat32": (
        *(coupling, lambda z, logdet: (z, logdet.float()), right),
        "logdet: expected the input's dtype float64, got float32",
    ),
    "Widens": (  # a float64 constant widens float32 results
        *(Scale, lambda z, logdet: (z * torch.ones(3, 2, 2).double(), logdet), right),
        "z: expected the input's dtype float32, got float64",
    ),
}


@pytest.mark.parametrize(("layer", "forward", "inverse", "message"), PLANTED.values(), ids=PLANTED)
def test_check_bijection_finds(layer, forward, inverse, message):
    with pytest.raises(AssertionError, match=message):
        check_bijection(Wrong(layer(), forward, inverse), (2, 3, 2, 2))


@pytest.mark.parametrize("layer", [Scale, coupling], ids=["Scale", "Coupling"])
def test_check_bijection_passes_correct_layers(layer):
    check_bijection(layer(), (2, 3, 2, 2))


def test_check_bijection_needs_the_perturbation():
    """The initial scale is 1, so logdet is 0 and a wrong sign does not show."""
    check_bijection(Wrong(Scale(), wrong_sign, right), (2, 3, 2, 2), perturb=0.0)


def test_check_bijection_leaves_the_layer_alone():
    layer = InvertibleConv1x1(3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    check_bijection(layer, (2, 3, 2))
    for name, value in layer.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("shape", [(1, 3), (2,), (2, 3, 0)])
def test_check_bijection_needs_two_samples(shape):
    with pytest.raises(ValueError, match=r"shape: expected \(N, C, \*spatial\) with N >= 2, got"):
        check_bijection(Scale(), shape)
