"""A flow like SRFlow's, whose layers depend on features of the small image, built of our layers.

A step is an actnorm, a 1x1 convolution, an affine map of all channels by the features (the affine
injector), and a coupling whose network reads the features too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    Bijection,
    InvertibleConv1x1,
    ReversibleChain,
    ScaleFunction,
    Squeeze,
    ops,
)

CHANNELS, FEATURES, STEPS = 12, 5, 4
SCALE = ScaleFunction("sigmoid", offset=2.0, eps=1e-4)


class Net(nn.Module):
    """A network of channels and features; raw scales come first."""

    def __init__(self, channels, out):
        super().__init__()
        self.first = nn.Conv2d(channels + FEATURES, 8, 3, padding=1)
        self.last = nn.Conv2d(8, out, 3, padding=1)

    def forward(self, x, features):
        return self.last(self.first(torch.cat([x, features], 1)).relu())


class AffineInjector(Bijection):
    """y = s * (x + shift), with scales and shifts of the features alone."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.net = channels, Net(0, 2 * channels)

    def forward(self, x, features):
        return self._map(x, features, ops.affine_coupling)

    def inverse(self, z, features):
        return self._map(z, features, ops.affine_coupling_inverse)

    def _map(self, x, features, run):
        # The operator keeps the first half, which is empty of data here.
        wide = F.pad(x, (0, 0, 0, 0, self.channels, 0))
        y, logdet = run(wide, self.net(x[:, :0], features), SCALE)
        return y[:, self.channels :], logdet


def flow(reversible):
    torch.manual_seed(0)
    layers = [Squeeze()]
    for _ in range(STEPS):
        coupling = AffineCoupling(CHANNELS, Net(CHANNELS // 2, CHANNELS), scale=SCALE)
        layers += [
            ActNorm(CHANNELS),
            InvertibleConv1x1(CHANNELS),
            AffineInjector(CHANNELS),
            coupling,
        ]
    return ReversibleChain(layers, reversible=reversible).double()


def by_definition(chain, x, features):
    z, total = F.pixel_unshuffle(x, 2), 0.0
    for actnorm, conv, injector, coupling in zip(*[iter(chain.layers[1:])] * 4, strict=True):
        scale = actnorm.log_scale.exp().view(-1, 1, 1)
        z = scale * (z + actnorm.bias.view(-1, 1, 1))
        weight = conv.weight()
        z = torch.einsum("ij,njhw->nihw", weight, z)
        logs = [actnorm.log_scale.sum() + weight.det().abs().log()]
        total = total + logs[0] * z.shape[2] * z.shape[3]
        raw, shift = injector.net(z[:, :0], features).chunk(2, 1)
        s = torch.sigmoid(raw + 2) + 1e-4
        z, total = s * (z + shift), total + s.log().sum((1, 2, 3))
        a, b = z.chunk(2, 1)
        raw, shift = coupling.net(a, features).chunk(2, 1)
        s = torch.sigmoid(raw + 2) + 1e-4
        z, total = torch.cat([a, s * (b + shift)], 1), total + s.log().sum((1, 2, 3))
    return z, total


@pytest.mark.parametrize("reversible", [False, True], ids=["stored", "reversible"])
def test_equals_the_definition(reversible):
    chain = flow(reversible)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    features = torch.randn(3, FEATURES, 4, 4, dtype=torch.float64, requires_grad=True)
    chain.initialize(x, features)
    results = []
    for run in (chain, lambda *args: by_definition(chain, *args)):
        z, logdet = run(x, features)
        sources = [features, *chain.parameters()]
        gradients = torch.autograd.grad(z.square().sum() / 2 - logdet.sum(), sources)
        results.append([z, logdet, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    back, logdet_back = chain.inverse(results[0][0].detach(), features)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logdet_back, -results[0][1], rtol=1e-9, atol=1e-9)
