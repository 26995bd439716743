"""Masked chains compute what the flows of Glow-TTS and VITS, rebuilt from their published
definitions, compute: latents, log-determinants, inverses and gradients."""

from typing import Any

import pytest
import torch
from cases import perturbed
from torch import Tensor, nn

from benchmarks.harness.glow_tts import (
    WN,
    Block,
    Decoder,
    Size,
    convolutions,
    masked_chain,
    steps_of,
)
from layers.chains import assert_all_close, gradients
from mflow_kernels import AffineCoupling, Permutation, ReversibleChain
from mflow_kernels.testing import assert_close

SIZE = Size(mels=8, blocks=3, width=6, depth=3)


def parameters(layers: list[Any]) -> list[Tensor]:
    """The parameters of one of our steps whose gradients are compared."""
    actnorm, conv, coupling = layers
    own = [actnorm.log_scale, actnorm.bias, conv.lower, conv.upper, conv.log_diagonal]
    return [*own, *(p for c in convolutions(coupling.net) for p in c.parameters())]  # type: ignore[misc]


def published_gradients(block: Block, layers: list[Any]) -> list[Tensor]:
    """The gradients of the block's parameters, by the chain rule as those of our `parameters`:
    our actnorm scales x + bias, and our 1x1 convolution factors its weight."""
    conv, scale = layers[1], block.logs.exp()
    dbias, dlogs = block.bias.grad, block.logs.grad
    own = [(dlogs + block.bias * dbias).flatten(), (scale * dbias).flatten()]  # type: ignore[operator]
    small = torch.arange(0, conv.channels, conv.channels // 2)[:, None] + torch.arange(2)
    weight = conv.weight()[small.flatten()][:, small.flatten()]  # type: ignore[operator]
    factors = [conv.lower, conv.upper, conv.log_diagonal]
    own += torch.autograd.grad(weight, factors, block.weight.grad)  # type: ignore[arg-type]
    *nets, end = (list(c.parameters()) for c in block.convolutions)
    own += [p.grad for parts in nets for p in parts]  # type: ignore[misc]
    return [*own, *(p.grad.roll(SIZE.mels, 0) for p in end)]  # type: ignore[union-attr]


def glow_tts(reversible: bool = True) -> tuple[Decoder, ReversibleChain]:
    """The published decoder, and the example's with its weights."""
    torch.manual_seed(0)
    published = perturbed(Decoder(SIZE)).double()
    chain = masked_chain(published, SIZE)
    chain.reversible = reversible
    return published, chain


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(12) < torch.tensor([12, 4, 8])[:, None, None]).double()
    return torch.randn(3, 8, 12, generator=generator, dtype=torch.float64) * mask, mask


def test_glow_tts_values() -> None:
    published, chain = glow_tts()
    x, mask = batch()
    (z, logdet), (want, want_logdet) = chain(x, mask), published(x, mask)
    assert_close(z, want, terms=1000)
    assert_close(logdet, want_logdet, terms=1000)
    assert_close(chain.inverse(want, mask)[0], x, terms=1000)


@pytest.mark.parametrize("reversible", [False, True])
def test_glow_tts_gradients(reversible: bool) -> None:
    published, chain = glow_tts(reversible=reversible)
    x, mask = batch()
    want = gradients(published, x, call=lambda x: published(x, mask))
    got = gradients(chain, x, call=lambda x: chain(x, mask))
    assert_all_close(got[:2], want[:2], terms=1000)  # the loss, and the gradient of x
    for block, layers in zip(published.blocks, steps_of(chain), strict=True):
        got = [p.grad for p in parameters(layers)]
        want = published_gradients(block, layers)  # type: ignore[arg-type]
        assert_all_close(got, want, terms=4096)  # type: ignore[arg-type]


class VITSNet(nn.Module):
    """pre, WN and post of VITS' coupling with mean_only."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.wn = nn.Conv1d(4, 6, 1), WN(6, 3)
        self.post = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.post(self.wn(self.pre(x) * mask, mask)) * mask


def vits(nets: list[nn.Module], x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """VITS' flow: mean-only couplings, and a flip of the channels after each."""
    for net in nets:
        x0, x1 = x.tensor_split(2, dim=1)
        x = torch.cat([x0, net(x0, mask) + x1 * mask], 1).flip(1)
    return x, x.new_zeros(len(x))


@pytest.mark.parametrize("reversible", [False, True])
def test_vits(reversible: bool) -> None:
    torch.manual_seed(0)
    nets = [perturbed(VITSNet()).double() for _ in range(3)]
    flip = Permutation(range(8)[::-1])
    layers = [m for net in nets for m in (AffineCoupling(8, net, scale=None), flip)]
    chain, (x, mask) = ReversibleChain(layers, masked=True, reversible=reversible), batch()
    got = gradients(chain, x, call=lambda x: chain(x, mask))
    want = gradients(chain, x, call=lambda x: vits(nets, x, mask))
    assert_all_close(got, want, terms=1000)
    assert torch.equal(chain(x, mask)[0], vits(nets, x, mask)[0])
    assert not chain(x, mask)[1].any()
    assert_close(chain.inverse(vits(nets, x, mask)[0], mask)[0], x, terms=100)
