"""Conditional flows: contexts of the built-in networks and of networks that the caller makes."""

import pytest
import torch
import torch.nn.functional as F
from cases import normal, perturbed
from torch import Tensor, nn

from layers.chains import assert_all_close, gradients
from mflow_kernels import FlowStep, Glow, VectorFlow
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
    assert torch.equal(net(x, context), expected)
    assert not torch.equal(net(x, 2 * context), expected)


def test_a_map_is_averaged_to_the_state(device):
    net = trained(coupling_net(3, 4, 8, 2, context_channels=2)).to(device)
    x, context = normal(2, 3, 4, 6, device=device), normal(2, 2, 8, 18, device=device)
    averaged = F.avg_pool2d(context, (2, 3))
    expected = nn.Sequential.forward(net, torch.cat([x, averaged], 1))
    assert_close(net(x, context), expected, terms=100)
    exact = nn.Sequential.forward(net, torch.cat([x, context[:, :, :4, :6]], 1))
    assert torch.equal(net(x, context[:, :, :4, :6]), exact)


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)], ids=str)
def test_gradients_reach_the_context(shape):
    """All gradients, that of the context included, equal those of stored activations."""

    def make(reversible: bool) -> nn.Module:
        how = {"context_channels": 2, "reversible": reversible}
        torch.manual_seed(0)
        flow = VectorFlow(3, 2, 4, **how) if len(shape) == 1 else Glow(shape, 2, 1, 4, **how)
        return perturbed(flow).double()

    x, context = normal(2, *shape).double(), normal(2, 2).double()
    flow, stored = make(True), make(False)
    got, want = (gradients(f, x, context, call=f) for f in (flow, stored))
    assert len(got) == 3 + len(list(flow.parameters()))
    assert got[2].any()
    assert_all_close(got, want, terms=1000)
    z, logdet = flow(x, context=context)
    back, negative = flow.inverse(z, context=context)
    assert_close(back, x, terms=1000)
    assert_close(negative, -logdet, terms=1000)


class Net(nn.Module):
    """A network of the caller, from x_a and a context (N, 5) with any meaning."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.sizes = in_channels, out_channels
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
    nets = [m for m in flow.modules() if isinstance(m, Net)]
    assert len(nets) == (2 if len(shape) == 1 else 3)
    couplings = [m for m in flow.modules() if type(m).__name__ == "AffineCoupling"]
    for net, coupling in zip(nets, couplings, strict=True):
        c = coupling.channels
        assert net.sizes == (c // 2, 2 * (c - c // 2))
    x, context = normal(3, *shape), normal(3, 5)
    flow.initialize(x, context=context)
    z, _ = flow(x, context)
    back, _ = flow.inverse(z, context)
    assert_close(back, x, terms=1000)
    flow.log_prob(x, context=context).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
    assert flow.sample(3, context=context).shape == (3, *shape)


def glow(**options):
    return Glow((1, 4, 4), 1, 1, 4, **options)


@pytest.mark.parametrize(
    ("channels", "context", "error", "message"),
    [
        (0, torch.ones(2, 3), TypeError, "context: expected none, .* no context_channels"),
        (0, torch.tensor([0, 1]), TypeError, "context: expected none, .* no context_channels"),
        (3, None, TypeError, r"context: expected classes, vectors \(N, 3\) or maps, got none"),
        (3, torch.ones(2, 4), ValueError, r"context: expected shape \(2, 3\) or .*, got \(2, 4\)"),
        (3, torch.ones(1, 4), ValueError, r"context: expected shape \(2, 3\) or .*, got \(2, 4\)"),
        (3, torch.ones(2, 3, 3, 4), ValueError, r"multiples of the sides \(2, 2\), got \(2, 3, 3,"),
        (3, torch.tensor([0, 3]), ValueError, "context: expected classes from 0 to 2, got 0 to 3"),
        (3, torch.tensor([1, 1, 1]), ValueError, r"context: expected one class .*got \(3,\)"),
        (3, 3, ValueError, "context: expected classes from 0 to 2, got 3 to 3"),
        (3, [0, 1], TypeError, "context: expected a torch.Tensor, got list"),
    ],
)
def test_contexts_that_do_not_fit(channels, context, error, message):
    flow, x = glow(context_channels=channels), normal(2, 1, 4, 4)
    for call in (flow, flow.initialize, flow.log_prob):
        with pytest.raises(error, match=message):
            call(x, context=context)
    z = (normal(2, 4, 2, 2),)
    with pytest.raises(error, match=message):
        flow.inverse(z, context=context)


def test_bad_networks():
    with pytest.raises(ValueError, match=r"context_channels: expected 0 with `network`.* got 2"):
        glow(context_channels=2, network=Net)
    with pytest.raises(ValueError, match="context_channels: expected at least 0, got -1"):
        glow(context_channels=-1)
    with pytest.raises(TypeError, match=r"net: expected a torch.nn.Module, got int"):
        glow(network=lambda i, o: 3)
    flow = glow(network=lambda i, o: nn.Conv2d(i, o + 1, 1))
    message = r"net's output: expected shape \(2, 4, 2, 2\), got \(2, 5, 2, 2\)"
    for call in (flow, FlowStep(4, nn.Conv2d(2, 5, 1)), flow.chain.layers[1].coupling):
        x = normal(2, 1, 4, 4) if call is flow else normal(2, 4, 2, 2)
        with pytest.raises(ValueError, match=message):
            call(x)
