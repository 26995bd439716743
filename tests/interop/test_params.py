"""Networks of other libraries' couplings that run as one operator."""

import pytest
import torch
from cases import normal
from torch import Tensor, nn

from mflow_kernels.interop import params as module
from mflow_kernels.interop.params import Params
from mflow_kernels.layers.networks import coupling_net, is_glow_network
from mflow_kernels.testing import tolerance

EVEN_AND_ODD = slice(0, None, 2), slice(1, None, 2)
HALVES = slice(0, 3), slice(3, None)


@pytest.mark.parametrize("channels", [EVEN_AND_ODD, HALVES], ids=["interleaved", "in order"])
def test_params_of_a_network_like_glows(
    kernel_device: torch.device, channels: tuple[slice, slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor | None] = []
    run = module.fused_params

    def noted(*given: object) -> Tensor | None:
        found.append(run(*given))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(module, "fused_params", noted)
    net = nn.Sequential(*coupling_net(3, 6, 16, 2))
    nn.init.normal_(net[-1].weight, std=0.1)
    nn.init.normal_(net[-1].bias)
    net = net.to(kernel_device, torch.bfloat16)
    # The output has more numbers than the weights, so their order changes rather than its own.
    x = normal(2, 3, 8, 10, device=kernel_device).to(torch.bfloat16)
    params = Params(net, *channels, factors=(0.5, 1.0))(x)
    assert len(found) == 1
    assert found[0] is params
    raw, shift = (net(x)[:, part].float() for part in channels)
    expected = torch.cat([0.5 * raw, shift], 1)
    # Three layers, each rounding to bfloat16, and the factors.
    assert (params - expected).abs().max() <= 4 * tolerance(torch.bfloat16) * expected.abs().max()


def test_the_network_of_normflows_is_like_glows() -> None:
    nf = pytest.importorskip("normflows")
    assert is_glow_network(list(nf.nets.ConvNet2d((3, 16, 16, 6), (3, 1, 3)).net))
    assert not is_glow_network(list(nf.nets.ConvNet2d((3, 16, 16, 6), (3, 1, 3), leaky=0.1).net))
