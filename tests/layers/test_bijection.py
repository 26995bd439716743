"""Properties that every layer has: round trip, logdets, dtypes, copies and compilation."""

import copy
import io

import pytest
import torch
from cases import normal, not_about_kernels, perturbed
from torch import Tensor

from layers.chains import inverse_of
from layers.table import LAYERS
from mflow_kernels.testing import assert_close, check_bijection

every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def flat(z) -> list[Tensor]:
    return [z] if isinstance(z, Tensor) else [t for part in z for t in flat(part)]


@every_layer
def test_round_trip_jacobian_and_logdets(make, shape, device):
    check_bijection(make().to(device), shape)


@not_about_kernels
@every_layer
def test_second_derivatives(make, shape, device):
    """In both directions, of the state and of the parameters."""
    layer = perturbed(make().double()).to(device)
    if len(list(layer.parameters())) > 20:
        pytest.skip("test_any_bijection compares the second derivatives of chains")
    x = normal(*shape, dtype=torch.float64, device=device).requires_grad_()
    z = [part.detach().requires_grad_() for part in flat(layer(x)[0])]
    for call, states in ((layer, [x]), (inverse_of(layer), z)):
        count, leaves = len(states), [*states, *layer.parameters()]

        def results(*given, call=call, count=count):
            state, logdet = call(*given[:count])
            return *flat(state), logdet

        assert torch.autograd.gradgradcheck(results, leaves, fast_mode=True)


@every_layer
def test_float32(make, shape, device):
    """In each memory format, results are float32, equal those in float64, and invert, all up to
    rounding."""
    layer = perturbed(make()).to(device)
    x = normal(*shape, device=device)
    exact, exact_logdet = copy.deepcopy(layer).double()(x.double())
    formats = [torch.contiguous_format] + [torch.channels_last] * (x.dim() == 4)
    for given in (x.contiguous(memory_format=format) for format in formats):
        z, logdet = layer(given)
        assert logdet.dtype == torch.float32
        # About six operators in sequence round their results.
        for got, want in zip(flat(z), flat(exact), strict=True):
            assert got.dtype == torch.float32
            assert_close(got, want, terms=36, scale=exact[0].abs().max().item())
        assert_close(logdet, exact_logdet, terms=x[0].numel(), scale=4.0)
        back, negative = layer.inverse(z)
        assert_close(back, x, terms=36, scale=8.0)
        assert_close(negative, -logdet, terms=x[0].numel(), scale=4.0)


@not_about_kernels
@every_layer
def test_empty_batch(make, shape, device):
    layer = make().to(device)
    z, logdet = layer(torch.ones(0, *shape[1:], device=device))
    assert logdet.shape == (0,)
    back, negative = layer.inverse(z)
    assert back.shape == (0, *shape[1:])
    assert negative.shape == (0,)


@not_about_kernels
@every_layer
def test_copies_pickles_and_state_dicts_compute_the_same(make, shape, device):
    layer = perturbed(make()).to(device)
    x = normal(*shape, device=device)
    z, logdet = layer(x)
    if logdet.requires_grad:  # a reversible backward pass stores its drift in the chain
        logdet.sum().backward()
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    restored = torch.load(stored, weights_only=False)
    fresh = make().to(device)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), restored, fresh):
        torch.testing.assert_close(other(x), (z, logdet), rtol=0, atol=0)


@every_layer
def test_initialize_returns_the_result_of_forward(make, shape, device):
    layer = perturbed(make()).to(device)
    x = normal(*shape, device=device)
    torch.testing.assert_close(layer.initialize(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["coupling, images", "coupling, vectors", "split", "step", "chain"]
)
def test_autocast_keeps_the_state_in_float32(name, device):
    """Only the network computes in bfloat16, so inversion is as exact as without autocast."""
    make, shape = LAYERS[name]
    layer = perturbed(make()).to(device)
    x = normal(*shape, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        z, logdet = layer(x)
        back, negative = layer.inverse(z)
    assert logdet.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in flat(z))
    assert_close(back, x, terms=36, scale=8.0)
    assert_close(negative, -logdet, terms=x[0].numel(), scale=4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["actnorm, images", "conv1x1, vectors", "split", "step", "chain"])
def test_16_bit_states(name, dtype, device):
    """Each operator computes in float32 and rounds once, forward and backward."""
    make, shape = LAYERS[name]
    layer = perturbed(make()).to(device, dtype)
    x = normal(*shape, dtype=dtype, device=device).requires_grad_()
    z, logdet = layer(x)
    exact, exact_logdet = copy.deepcopy(layer).double()(x.double())
    assert logdet.dtype == torch.float32
    for got, want in zip(flat(z), flat(exact), strict=True):
        assert got.dtype == dtype
        assert_close(got, want)
    # The network reads a rounded state, and its params are rounded too.
    assert_close(logdet.to(dtype), exact_logdet, scale=4.0)
    leaves = [x, *layer.parameters()]
    loss = logdet.sum() + sum(part.float().square().sum() for part in flat(z))
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.dtype == dtype
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()
