"""Masked chains compute what the flows of Glow-TTS and VITS, rebuilt from their published
definitions, compute: latents, log-determinants, inverses and gradients."""

from collections.abc import Callable

import pytest
import torch
from cases import perturbed
from torch import Tensor, nn

from benchmarks.harness.glow_tts import WN, Decoder, Size, masked_chain
from layers.chains import assert_all_close, gradients
from mflow_kernels import AffineCoupling, Permutation, ReversibleChain
from mflow_kernels.testing import assert_close

Make = Callable[[], tuple[nn.Module, ReversibleChain]]
SIZE = Size(mels=8, blocks=3, width=6, depth=3)


def glow_tts() -> tuple[nn.Module, ReversibleChain]:
    """The published decoder, and the example's with its weights."""
    published = perturbed(Decoder(SIZE)).double()
    return published, masked_chain(published, SIZE)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(12) < torch.tensor([12, 4, 8])[:, None, None]).double()
    return torch.randn(3, 8, 12, generator=generator, dtype=torch.float64) * mask, mask


class VITSNet(nn.Module):
    """pre, WN and post of VITS' coupling with mean_only."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.wn = nn.Conv1d(4, 6, 1), WN(6, 3)
        self.post = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.post(self.wn(self.pre(x) * mask, mask)) * mask


class VITS(nn.Module):
    """VITS' flow: mean-only couplings, and a flip of the channels after each."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(perturbed(VITSNet()) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for net in self.nets:
            x0, x1 = x.tensor_split(2, dim=1)
            x = torch.cat([x0, net(x0, mask) + x1 * mask], 1).flip(1)
        return x, x.new_zeros(len(x))


def vits() -> tuple[nn.Module, ReversibleChain]:
    published, flip = VITS().double(), Permutation(range(8)[::-1])
    layers = [m for net in published.nets for m in (AffineCoupling(8, net, scale=None), flip)]
    return published, ReversibleChain(layers, masked=True)


# `test_masks.py` compares the gradients of parameters with those of each sequence alone.
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("make", [glow_tts, vits])
def test_a_masked_chain_computes_the_published_flow(make: Make, reversible: bool) -> None:
    torch.manual_seed(0)
    published, chain = make()
    chain.reversible = reversible
    x, mask = batch()
    ours, theirs = (gradients(m, x, call=lambda x, m=m: m(x, mask)) for m in (chain, published))
    assert_all_close(ours[:2], theirs[:2], terms=1000)  # the loss, and the gradient of x
    (z, logdet), (want, want_logdet) = chain(x, mask), published(x, mask)
    assert_close(z, want, terms=1000)
    assert_close(logdet, want_logdet, terms=1000, scale=1.0)
    assert_close(chain.inverse(want, mask)[0], x, terms=1000)
