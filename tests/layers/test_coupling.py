import pytest
import torch
from cases import normal
from torch import nn

from mflow_kernels import AffineCoupling, Split
from mflow_kernels.layers.networks import coupling_net
from mflow_kernels.ops.scale import ScaleFunction


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
