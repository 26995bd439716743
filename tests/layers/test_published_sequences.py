"""The flows of Glow-TTS and VITS, rebuilt here from their published definitions, compute what
masked chains compute: latents, log-determinants, inverses and gradients."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import perturbed
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from layers.chains import assert_all_close, gradients
from mflow_kernels import AffineCoupling, Permutation, ReversibleChain
from mflow_kernels.testing import assert_close

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "glow_tts.py"))
MELS, BLOCKS, WIDTH, DEPTH = 8, 3, 6, 3


class WN(nn.Module):
    """WaveNet's stack of gated convolutions, its output zero at padding."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        for i in range(depth):
            out = width if i == depth - 1 else 2 * width
            setattr(self, f"in{i}", weight_norm(nn.Conv1d(width, 2 * width, 5, padding=2)))
            setattr(self, f"out{i}", weight_norm(nn.Conv1d(width, out, 1)))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        skip = torch.zeros_like(h)
        for i in range(self.depth):
            both = getattr(self, f"in{i}")(h)
            gated = both[:, : self.width].tanh() * both[:, self.width :].sigmoid()
            update = getattr(self, f"out{i}")(gated)
            if i < self.depth - 1:
                h = (h + update[:, : self.width]) * mask
            skip = skip + update[:, -self.width :]
        return skip * mask


class GlowTTSBlock(nn.Module):
    """Actnorm, grouped 1x1 convolution and affine coupling of Glow-TTS, each times the mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.logs, self.bias = (nn.Parameter(torch.zeros(1, channels, 1)) for _ in range(2))
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
        self.start = weight_norm(nn.Conv1d(channels // 2, WIDTH, 1))
        self.wn, self.end = WN(WIDTH, DEPTH), nn.Conv1d(WIDTH, channels, 1)

    def mixed(self, x: Tensor, weight: Tensor) -> Tensor:
        b, c, t = x.shape
        grouped = x.view(b, 2, c // 4, 2, t).transpose(2, 3).reshape(b, 4, c // 4, t)
        y = F.conv2d(grouped, weight[:, :, None, None])
        return y.view(b, 2, 2, c // 4, t).transpose(2, 3).reshape(b, c, t)

    def stats(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.end(self.wn(self.start(x) * mask, mask))
        return out.tensor_split(2, dim=1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        length = mask.sum((1, 2))
        x = (self.bias + self.logs.exp() * x) * mask
        logdet = self.logs.sum() * length
        x = self.mixed(x, self.weight) * mask
        logdet = logdet + self.weight.det().abs().log() * (x.shape[1] / 4) * length
        kept, changed = x.tensor_split(2, dim=1)
        m, logs = self.stats(kept, mask)
        changed = (m + logs.exp() * changed) * mask
        return torch.cat([kept, changed], 1), logdet + (logs * mask).sum((1, 2))

    def inverse(self, z: Tensor, mask: Tensor) -> Tensor:
        kept, changed = z.tensor_split(2, dim=1)
        m, logs = self.stats(kept, mask)
        x = torch.cat([kept, (changed - m) * (-logs).exp() * mask], 1)
        x = self.mixed(x, self.weight.inverse()) * mask
        return (x - self.bias) * (-self.logs).exp() * mask


class GlowTTSDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GlowTTSBlock(2 * MELS) for _ in range(BLOCKS))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b, c, t = x.shape
        mask, total = mask[:, :, 1::2], x.new_zeros(b)
        x = x.view(b, c, t // 2, 2).permute(0, 3, 1, 2).reshape(b, 2 * c, t // 2) * mask
        for block in self.blocks:
            x, logdet = block(x, mask)
            total = total + logdet
        return x.view(b, 2, c, t // 2).permute(0, 2, 3, 1).reshape(b, c, t), total

    def inverse(self, z: Tensor, mask: Tensor) -> Tensor:
        b, c, t = z.shape
        mask = mask[:, :, 1::2]
        z = z.view(b, c, t // 2, 2).permute(0, 3, 1, 2).reshape(b, 2 * c, t // 2) * mask
        for block in reversed(self.blocks):
            z = block.inverse(z, mask)  # type: ignore[operator]
        return z.view(b, 2, c, t // 2).permute(0, 2, 3, 1).reshape(b, c, t)


def convolutions(net: nn.Module) -> list[nn.Module]:
    """The convolutions of either network, in one order."""
    if isinstance(net, GlowTTSBlock):
        wn = [getattr(net.wn, f"{name}{i}") for name in ("in", "out") for i in range(DEPTH)]
        return [net.start, *wn, net.end]
    return [net.start, *net.gates, *net.skips, net.end]  # type: ignore[misc]


def parameters(layers: list[nn.Module]) -> list[Tensor]:
    """The parameters of one of our steps whose gradients are compared."""
    actnorm, conv, coupling = layers
    own = [actnorm.log_scale, actnorm.bias, conv.lower, conv.upper, conv.log_diagonal]
    return [*own, *(p for c in convolutions(coupling.net) for p in c.parameters())]  # type: ignore[misc]


def published_gradients(block: GlowTTSBlock, layers: list[nn.Module]) -> list[Tensor]:
    """The gradients of the block's parameters, by the chain rule as those of our `parameters`:
    ours scale x + bias, and factor the weight."""
    conv, scale = layers[1], block.logs.exp()
    dbias, dlogs = block.bias.grad, block.logs.grad
    own = [(dlogs + block.bias * dbias).flatten(), (scale * dbias).flatten()]  # type: ignore[operator]
    small = torch.arange(0, conv.channels, conv.channels // 2)[:, None] + torch.arange(2)
    weight = conv.weight()[small.flatten()][:, small.flatten()]  # type: ignore[operator]
    factors = [conv.lower, conv.upper, conv.log_diagonal]
    own += torch.autograd.grad(weight, factors, block.weight.grad)  # type: ignore[arg-type]
    *nets, end = (list(c.parameters()) for c in convolutions(block))
    own += [p.grad for parts in nets for p in parts]  # type: ignore[misc]
    return [*own, *(p.grad.roll(MELS, 0) for p in end)]  # type: ignore[union-attr]


def glow_tts(**options: object) -> tuple[GlowTTSDecoder, ReversibleChain]:
    """The published decoder, and the example's with its weights."""
    torch.manual_seed(0)
    published = perturbed(GlowTTSDecoder()).double()
    chain = EXAMPLE["decoder"](MELS, BLOCKS, WIDTH, DEPTH)
    chain.__dict__.update(options)
    with torch.no_grad():
        for i, block in enumerate(published.blocks):
            actnorm, conv, coupling = chain.double().layers[1 + 3 * i : 4 + 3 * i]
            for own in convolutions(coupling.net)[:-1]:
                weight_norm(own)
            actnorm.log_scale.copy_(block.logs.flatten())  # type: ignore[union-attr, operator]
            actnorm.bias.copy_((block.bias * (-block.logs).exp()).flatten())  # type: ignore[operator]
            conv.factor_(block.weight)
            pairs = zip(convolutions(coupling.net), convolutions(block), strict=True)
            for own, theirs in pairs:
                own.load_state_dict(theirs.state_dict())
            for parameter in own.parameters():  # theirs returns the shift first
                parameter.copy_(parameter.roll(MELS, 0))
    return published, chain


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(12) < torch.tensor([12, 4, 8])[:, None, None]).double()
    return torch.randn(3, MELS, 12, generator=generator, dtype=torch.float64) * mask, mask


def test_glow_tts_values() -> None:
    published, chain = glow_tts()
    x, mask = batch()
    (z, logdet), (want, want_logdet) = chain(x, mask), published(x, mask)
    assert_close(z, want, terms=1000)
    assert_close(logdet, want_logdet, terms=1000)
    assert_close(chain.inverse(want, mask)[0], published.inverse(want, mask), terms=1000)


@pytest.mark.parametrize("reversible", [False, True])
def test_glow_tts_gradients(reversible: bool) -> None:
    published, chain = glow_tts(reversible=reversible)
    x, mask = batch()
    theirs = gradients(published, x, call=lambda x: published(x, mask))
    ours = gradients(chain, x, call=lambda x: chain(x, mask))
    assert_all_close(ours[:2], theirs[:2], terms=1000)  # the loss, and the gradient of x
    for i, block in enumerate(published.blocks):
        layers = list(chain.layers[1 + 3 * i : 4 + 3 * i])
        got = [p.grad for p in parameters(layers)]
        want = published_gradients(block, layers)  # type: ignore[arg-type]
        assert_all_close(got, want, terms=4096)  # type: ignore[arg-type]


class VITSNet(nn.Module):
    """pre, WN and post of VITS' coupling with mean_only."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.wn = nn.Conv1d(MELS // 2, WIDTH, 1), WN(WIDTH, DEPTH)
        self.post = nn.Conv1d(WIDTH, MELS // 2, 1)

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
    flip = Permutation(range(MELS)[::-1])
    layers = [m for net in nets for m in (AffineCoupling(MELS, net, scale=None), flip)]
    chain, (x, mask) = ReversibleChain(layers, masked=True, reversible=reversible), batch()
    ours = gradients(chain, x, call=lambda x: chain(x, mask))
    theirs = gradients(chain, x, call=lambda x: vits(nets, x, mask))
    assert_all_close(ours, theirs, terms=1000)
    assert torch.equal(chain(x, mask)[0], vits(nets, x, mask)[0])
    assert not chain(x, mask)[1].any()
    assert_close(chain.inverse(vits(nets, x, mask)[0], mask)[0], x, terms=100)
