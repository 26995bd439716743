import copy

import pytest
import torch
from cases import normal, not_about_kernels

from mflow_kernels import FlowStep, InvertibleConv1x1, ReversibleChain, Squeeze
from mflow_kernels.testing import assert_close, check_bijection


def test_entries_outside_the_triangles_do_nothing():
    layer = InvertibleConv1x1(4)
    weight = layer.weight()
    with torch.no_grad():
        layer.lower += torch.ones(4, 4).triu()
        layer.upper += torch.ones(4, 4).tril()
    assert torch.equal(layer.weight(), weight)


@torch.no_grad()
def test_a_chain_names_the_layer_that_cannot_be_inverted():
    chain = ReversibleChain([FlowStep(2, width=4), Squeeze(), *(FlowStep(8) for _ in range(3))])
    z = chain(normal(1, 2, 4, 4))[0].detach()
    chain.layers[3].actnorm.log_scale[1] = -1e4  # e^-10000 is 0
    with pytest.raises(ValueError, match=r"^layers\.3\.conv: .* one that is singular"):
        chain.inverse(z)
    chain.layers[3].conv.log_diagonal[1] = float("nan")
    with pytest.raises(ValueError, match=r"^layers\.3\.conv: .* one that is not finite"):
        chain.inverse(z)
    with pytest.raises(ValueError, match=r"^conv: .* one that is not finite"):
        chain.layers[3].inverse(z)


@pytest.mark.parametrize("reversible", [True, False])
def test_a_singular_weight_gives_nan_with_gradients(reversible):
    """LAPACK returns finite numbers for a singular matrix; training on them would be wrong."""
    layers = [FlowStep(2, width=4) for _ in range(2)]
    chain = ReversibleChain(layers, reversible=reversible)
    z = chain(normal(1, 2, 4, 4))[0].detach()
    with torch.no_grad():
        chain.layers[0].actnorm.log_scale[1] = -1e4  # e^-10000 is 0
    x, _ = chain.inverse(z)
    assert x.isnan().all()
    x.sum().backward()


def ill_conditioned(channels):
    """A layer with singular values from 0.01 to 100."""
    layer, other = (InvertibleConv1x1(channels) for _ in range(2))
    u, v = layer.weight().detach().double(), other.weight().detach().double()
    layer.factor_((u * torch.logspace(-2, 2, channels, dtype=torch.float64)) @ v)
    return layer


@pytest.mark.parametrize("channels", [1, 2, 12, 48])
def test_condition_number(channels):
    layer = ill_conditioned(channels)
    singular = torch.linalg.svdvals(copy.deepcopy(layer).double().weight().detach())
    torch.testing.assert_close(layer.condition_number(), singular[0] / singular[-1])
    layer = InvertibleConv1x1(channels)
    assert layer.condition_number() < 1 + 1e-5 * channels
    for entry in (-1e4, float("nan")):  # e^-10000 is 0
        layer.log_diagonal.data[0] = entry
        assert layer.condition_number() > 1e15


@not_about_kernels
@pytest.mark.parametrize("limit", [1.0, 3.0, 100.0])
@pytest.mark.parametrize("channels", [2, 12, 48])
def test_bounding_the_condition(channels, limit):
    torch.manual_seed(channels)
    layer = ill_conditioned(channels)
    state = copy.deepcopy(layer.state_dict())
    condition = layer.condition_number().item()
    assert condition > limit
    assert not layer.bound_condition_(1.01 * condition)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
    before = copy.deepcopy(layer).double().weight().detach()
    assert layer.bound_condition_(limit)
    # The new factors are rounded to float32, which changes W by about C roundings and its smallest
    # singular value by as much as its largest.
    assert layer.condition_number() <= limit * (1 + limit * channels * 1e-6)
    assert torch.equal(layer.permutation @ layer.permutation.t(), torch.eye(channels))
    assert (layer.sign.abs() == 1).all()
    # Singular values inside the range are unchanged.
    u, singular, vh = torch.linalg.svd(before)
    middle = singular.log().mean().exp()
    clipped = singular.clamp(middle / limit**0.5, middle * limit**0.5)
    assert_close(layer.weight(), (u * clipped) @ vh, terms=channels * channels)
    check_bijection(layer, (2, channels, 1, 2))
