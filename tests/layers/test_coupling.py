import pytest
import torch
from cases import normal
from torch import nn

from mflow_kernels import AffineCoupling, Split
from mflow_kernels.layers.networks import PointwiseConv2d, coupling_net
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_default_net_fits_and_starts_at_zero(dims):
    net = coupling_net(2, 6, 5, dims)
    x = normal(3, 2, *(4,) * dims)
    before = x.clone()
    params = net(x)
    assert params.shape == (3, 6, *(4,) * dims)
    assert not params.any()
    assert torch.equal(x, before)  # its ReLUs work in place, but not on the state


def test_net_reads_the_unchanged_half():
    """x_a is the smaller half if C is odd, and its bits do not change."""
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.cat([x, x, 2 * x], 1)  # 2 channels to 6: raw (3), shift (3)

    x = normal(2, 5, 3)
    layer = AffineCoupling(5, Net(), scale=ScaleFunction("exp"))
    y, logdet = layer(x)
    x_a, x_b = x[:, :2], x[:, 2:]
    assert torch.equal(seen[0], x_a)
    assert torch.equal(y[:, :2], x_a)
    raw, shift = torch.cat([x_a, x_a, 2 * x_a], 1).chunk(2, 1)
    torch.testing.assert_close(y[:, 2:], raw.exp() * (x_b + shift))
    torch.testing.assert_close(logdet, raw.flatten(1).sum(1))


def test_net_that_is_empty():
    """An empty `nn.Sequential` is falsy, but must not be replaced by the default net."""
    net = nn.Sequential()
    assert AffineCoupling(2, net).net is net


def test_split_makes_a_learned_normal_prior_standard():
    """log p(x_b | x_a) of a normal prior = log N(latent) + logdet."""
    x = normal(3, 4, 2).double()
    split = Split(4, width=3, spatial_dims=1, scale="exp").double()
    nn.init.normal_(split.coupling.net[-1].weight, std=0.3)
    (_, latent), logdet = split(x)
    raw, shift = split.coupling.net(x[:, :2]).chunk(2, 1)
    prior = torch.distributions.Normal(-shift, (-raw).exp())
    expected = prior.log_prob(x[:, 2:]).flatten(1).sum(1)
    standard = torch.distributions.Normal(0, 1).log_prob(latent).flatten(1).sum(1)
    torch.testing.assert_close(standard + logdet, expected)


@pytest.mark.parametrize("shape", [(8, 64, 16, 16), (2, 64, 24, 24), (3, 64, 32, 11)], ids=str)
def test_a_reshaped_pointwise_convolution_is_the_same(shape):
    conv = PointwiseConv2d(64)
    plain = nn.Conv2d(64, 64, 1).double()
    plain.load_state_dict(conv.state_dict())
    x = normal(*shape, layout="channels_last").requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, want = conv(x), plain(wide)
    assert type(y.grad_fn).__name__ == "_PointwiseFunctionBackward" or shape[0] * shape[2] % 16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, want, terms=64, name="y")
    dy = normal(*want.shape)
    # In a network, the ReLU after the convolution works in place on its output.
    grads = torch.autograd.grad(y.mul_(2), (x, *conv.parameters()), dy)
    wants = torch.autograd.grad(2 * want, (wide, *plain.parameters()), dy.double())
    pixels = shape[0] * shape[2] * shape[3]
    terms_of = {"dx": 64, "dW": pixels, "db": pixels}
    for (name, terms), a, b in zip(terms_of.items(), grads, wants, strict=True):
        assert_close(a, b, terms=terms, scale=terms**0.5, name=name)
    with torch.no_grad():
        assert torch.equal(conv(x), conv(x.clone()))


@pytest.mark.parametrize("frozen", [None, "weight", "bias", "x"])
def test_a_reshaped_pointwise_convolution_has_second_derivatives(frozen):
    conv, plain = PointwiseConv2d(64), nn.Conv2d(64, 64, 1)
    plain.load_state_dict(conv.state_dict())
    x = normal(8, 64, 16, 16, layout="channels_last").requires_grad_()
    assert type(conv(x).grad_fn).__name__ == "_PointwiseFunctionBackward"
    results = []
    for layer in (conv, plain):
        sources = {"x": x, "weight": layer.weight, "bias": layer.bias}
        for name, source in sources.items():
            source.requires_grad_(name != frozen)
        sources = [source for source in sources.values() if source.requires_grad]
        first = torch.autograd.grad(layer(x).pow(3).sum(), sources, create_graph=True)
        total = sum(g.square().mean() for g in first)
        results.append([*first, *torch.autograd.grad(total, sources)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want.detach(), terms=8 * 256 * 64)
