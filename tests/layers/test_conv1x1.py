import pytest
import torch
from cases import normal

from mflow_kernels import InvertibleConv1x1
from mflow_kernels.testing import assert_close


@pytest.mark.parametrize("channels", [1, 2, 7, 48])
def test_starts_as_a_rotation(channels):
    weight = InvertibleConv1x1(channels).double().weight()
    # The factors were rounded to float32, a sum of C products each.
    unit = torch.eye(channels, dtype=torch.float64)
    assert (weight @ weight.t() - unit).abs().max() < 1e-6 * channels


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3, 4)], ids=str)
def test_logdet_is_that_of_the_weight(shape, device):
    layer = InvertibleConv1x1(5).to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape).to(device)
    x = normal(*shape, device=device)
    z, logdet = layer(x)
    weight = layer.weight().double()
    pixels = x[0, 0].numel()
    expected = pixels * torch.linalg.slogdet(weight).logabsdet
    assert_close(logdet, expected.expand(2), terms=5, scale=float(pixels))
    assert_close(z, torch.einsum("oc,nc...->no...", weight, x.double()), terms=5)


def test_permutation_and_signs_stay():
    layer = InvertibleConv1x1(6)
    assert {name for name, _ in layer.named_parameters()} == {"lower", "upper", "log_diagonal"}
    assert set(layer.state_dict()) > {"permutation", "sign"}
    assert (layer.sign.abs() == 1).all()
    assert torch.equal(layer.permutation @ layer.permutation.t(), torch.eye(6))


def test_entries_outside_the_triangles_do_nothing():
    layer = InvertibleConv1x1(4)
    weight = layer.weight()
    with torch.no_grad():
        layer.lower += torch.ones(4, 4).triu()
        layer.upper += torch.ones(4, 4).tril()
    assert torch.equal(layer.weight(), weight)


def test_a_weight_that_is_not_finite_says_so():
    layer = InvertibleConv1x1(3)
    with torch.no_grad():
        layer.lower[1, 0] = float("nan")
    with pytest.raises(
        ValueError, match="weight: expected an invertible matrix, got one that is not"
    ):
        layer.inverse(normal(2, 3))


def test_channels_that_do_not_match():
    with pytest.raises(ValueError, match=r"weight: expected shape \(3, 3\), got \(2, 2\)"):
        InvertibleConv1x1(2)(normal(4, 3))
