"""Coupling networks that run as one operator: the choice, the values and the training."""

from contextlib import suppress

import pytest
import torch
from cases import normal, perturbed
from torch import Tensor, nn

from layers.chains import gradients
from mflow_kernels import Glow
from mflow_kernels.layers import networks
from mflow_kernels.layers.networks import CouplingNetwork, coupling_net, is_glow_network
from mflow_kernels.ops.fastest import VARIABLE
from mflow_kernels.testing import tolerance

BF16 = torch.bfloat16


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with one entry for each network that has run as one operator."""
    if torch.cuda.is_available():  # there, the choice would depend on a measurement
        monkeypatch.setenv(VARIABLE, "fused")
    calls: list[int] = []
    real = networks.coupling_network

    def counted(*given: Tensor, kernels: bool) -> Tensor:
        calls.append(1)
        return real(*given, kernels=kernels)

    monkeypatch.setattr(networks, "coupling_network", counted)
    return calls


def trained_net(*sizes: int, device: torch.device) -> CouplingNetwork:
    """A network whose last layer is not zero."""
    net = coupling_net(*sizes)
    nn.init.normal_(net[-1].weight, std=0.1)
    return net.to(device)


@pytest.mark.parametrize("spatial", [(), (3, 4)], ids=["vectors", "images"])
def test_runs_as_one_operator_under_autocast(
    kernel_device: torch.device, spatial: tuple[int, ...], fused: list[int]
) -> None:
    net = trained_net(3, 6, 16, len(spatial), device=kernel_device)
    x = normal(2, 3, *spatial, device=kernel_device)
    expected = nn.Sequential.forward(net, x)
    assert not fused
    with torch.autocast(kernel_device.type, BF16):
        params = net(x)
    assert len(fused) == 1
    assert params.dtype == BF16
    # Three layers, each rounding to bfloat16.
    assert (params - expected).abs().max() <= 3 * tolerance(BF16) * expected.abs().max()
    net.double()(x.double())  # float64 stays with torch's layers
    assert len(fused) == 1


def test_a_network_on_another_device(kernel_device: torch.device, fused: list[int]) -> None:
    """A kernel would take the addresses of its weights for addresses on the state's device. Torch's
    layers raise an error, but accept the meta device beside the CPU."""
    net = trained_net(3, 6, 16, 2, device=torch.device("meta")).to(BF16)
    with suppress(RuntimeError):
        net(normal(2, 3, 3, 4, device=kernel_device).to(BF16))
    assert not fused


def test_torchs_layers_on_request(
    kernel_device: torch.device, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = trained_net(3, 6, 16, 2, device=kernel_device).to(BF16)
    x = normal(2, 3, 3, 4, device=kernel_device).to(BF16)
    monkeypatch.setenv(VARIABLE, "torch")
    assert torch.equal(net(x), nn.Sequential.forward(net, x))
    assert not fused
    monkeypatch.setenv(VARIABLE, "both")
    with pytest.raises(ValueError, match=VARIABLE):
        net(x)


def test_hooks_of_layers_are_called(kernel_device: torch.device, fused: list[int]) -> None:
    net = trained_net(3, 6, 16, 2, device=kernel_device).to(BF16)
    seen = []
    net[2].register_forward_hook(lambda *_: seen.append(1))
    net(normal(2, 3, 3, 4, device=kernel_device).to(BF16))
    assert seen
    assert not fused


def changed(at: int, layer: nn.Module) -> list[nn.Module]:
    layers = list(coupling_net(3, 6, 16, 2))
    layers[at] = layer
    return layers


@pytest.mark.parametrize(
    "layers",
    [
        changed(1, nn.LeakyReLU(0.1)),
        changed(1, nn.ELU()),
        changed(0, nn.Conv2d(3, 16, 3)),
        changed(0, nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect")),
        changed(0, nn.Conv2d(3, 16, 3, padding="same")),
        changed(0, nn.Conv2d(3, 16, 1)),
        changed(2, nn.Conv2d(16, 16, 1, groups=2)),
        changed(2, nn.Conv2d(16, 16, 1, stride=2)),
        changed(4, nn.Conv2d(16, 6, 3, padding=2, dilation=2)),
        changed(4, nn.Linear(16, 6)),
        list(coupling_net(3, 6, 16, 1)),
        list(coupling_net(3, 6, 16, 2))[:3],
    ],
    ids=str,
)
def test_other_chains_are_no_glow_networks(layers: list[nn.Module]) -> None:
    assert not is_glow_network(layers)


def test_glow_networks() -> None:
    assert is_glow_network(changed(1, nn.LeakyReLU(0.0)))  # as in normflows
    assert is_glow_network(list(coupling_net(3, 6, 16, 0)))


def test_a_reversible_chain_repeats_its_networks(
    kernel_device: torch.device, fused: list[int]
) -> None:
    """Gradients and drift equal those of a stored chain: a network gives the same bits with and
    without stored hidden tensors."""
    model = perturbed(Glow((1, 4, 4), levels=1, steps=3, width=16), 0.05)
    model.to(kernel_device, memory_format=torch.channels_last)
    x = normal(4, 1, 4, 4, device=kernel_device)

    def call(x: Tensor) -> object:
        with torch.autocast(kernel_device.type, BF16):
            return model(x)

    results = []
    for model.chain.reversible in (True, False):
        results.append(gradients(model, x, call=call))
    assert model.chain.drift is not None
    assert model.chain.drift <= tolerance(torch.float32, 100) * x.abs().max()
    assert fused
    for a, b in zip(*results, strict=True):
        # The rebuilt input of a network may round to its bfloat16 neighbour.
        assert (a - b).abs().max() <= tolerance(BF16) * max(b.abs().max(), 1.0)


def test_compiles_whole(
    kernel_device: torch.device, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator compiles on request. By default a compiler fuses torch's layers itself."""
    torch.compiler.reset()
    net = trained_net(3, 6, 16, 2, device=kernel_device).to(BF16)
    x = normal(2, 3, 3, 4, device=kernel_device).to(BF16).requires_grad_()
    eager = [net(x), *torch.autograd.grad(net(x).sum(), [x, *net.parameters()])]
    monkeypatch.setenv(VARIABLE, "fused")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    params = compiled(x)
    found = [params, *torch.autograd.grad(params.sum(), [x, *net.parameters()])]
    assert all(map(torch.equal, eager, found))
