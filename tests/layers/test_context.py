"""Conditional flows: contexts of the built-in networks and of networks that the caller makes."""

import pytest
import torch
import torch.nn.functional as F
from cases import normal
from torch import Tensor, nn

from mflow_kernels import Glow, VectorFlow
from mflow_kernels.layers.networks import coupling_net
from mflow_kernels.testing import assert_close


def trained(net: nn.Module) -> nn.Module:
    nn.init.normal_(net[-1].weight, std=0.1)
    return net


@pytest.mark.parametrize("spatial", [(), (5,), (4, 6)], ids=str)
def test_a_vector_is_a_channel_at_every_pixel(spatial, device):
    net = trained(coupling_net(3, 4, 8, len(spatial), context_channels=2)).to(device)
    x, context = normal(2, 3, *spatial, device=device), normal(2, 2, device=device)
    pixels = context.view(2, 2, *[1] * len(spatial)).expand(2, 2, *spatial)
    expected = nn.Sequential.forward(net, torch.cat([x, pixels], 1))
    # The context's layout may choose another algorithm of torch's convolution.
    assert_close(net(x, context), expected, terms=5 * 9 + 8 + 8 * 9)
    assert not torch.equal(net(x, 2 * context), expected)


def test_a_map_is_averaged_to_the_state(device):
    net = trained(coupling_net(3, 4, 8, 2, context_channels=2)).to(device)
    x, context = normal(2, 3, 4, 6, device=device), normal(2, 2, 8, 18, device=device)
    averaged = F.avg_pool2d(context, (2, 3))
    expected = nn.Sequential.forward(net, torch.cat([x, averaged], 1))
    assert_close(net(x, context), expected, terms=100)
    exact = nn.Sequential.forward(net, torch.cat([x, context[:, :, :4, :6]], 1))
    assert_close(net(x, context[:, :, :4, :6]), exact, terms=100)


class Net(nn.Module):
    """A network of the caller, from x_a and a context (N, 5) with any meaning."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.x, self.c = nn.Linear(in_channels, out_channels), nn.Linear(5, out_channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        spread = self.c(context).view(len(x), -1, *[1] * (x.dim() - 2))
        return self.x(x.movedim(1, -1)).movedim(-1, 1).tanh() + spread


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: VectorFlow(5, 2, network=Net), (5,)),
        (lambda: Glow((1, 4, 4), 2, 1, network=Net), (1, 4, 4)),
    ],
    ids=["vectors", "images"],
)
def test_networks_of_a_factory(make, shape):
    flow = make()
    x, context = normal(3, *shape), normal(3, 5)
    flow.initialize(x, context=context)
    z, _ = flow(x, context)
    back, _ = flow.inverse(z, context)
    assert_close(back, x, terms=1000)
    flow.log_prob(x, context=context).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
    assert flow.sample(3, context=context).shape == (3, *shape)
