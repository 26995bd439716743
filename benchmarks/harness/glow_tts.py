"""The decoder of Glow-TTS (arXiv 2005.11129), rebuilt from its published definition, and with the
same weights the masked chain of `examples/glow_tts.py`.

The definition is that of github.com/jaywalnut310/glow-tts.
"""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mflow_kernels import ReversibleChain

EXAMPLE = Path(__file__).parents[2] / "examples" / "glow_tts.py"


class Size(NamedTuple):
    """The size of a decoder; the default is that of the published configuration."""

    mels: int = 80
    blocks: int = 12
    width: int = 192
    depth: int = 4


class WN(nn.Module):
    """WaveNet's stack of gated convolutions, its output zero at padding."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.inputs, self.outputs = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            out = width if i == depth - 1 else 2 * width
            self.inputs.append(weight_norm(nn.Conv1d(width, 2 * width, 5, padding=2)))
            self.outputs.append(weight_norm(nn.Conv1d(width, out, 1)))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        skip = torch.zeros_like(h)
        for i in range(self.depth):
            both = self.inputs[i](h)
            gated = both[:, : self.width].tanh() * both[:, self.width :].sigmoid()
            update = self.outputs[i](gated)
            if i < self.depth - 1:
                h = (h + update[:, : self.width]) * mask
            skip = skip + update[:, -self.width :]
        return skip * mask


class Block(nn.Module):
    """Actnorm, grouped 1x1 convolution and affine coupling, each times the mask."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.logs, self.bias = (nn.Parameter(torch.zeros(1, channels, 1)) for _ in range(2))
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
        self.start = weight_norm(nn.Conv1d(channels // 2, width, 1))
        self.wn, self.end = WN(width, depth), nn.Conv1d(width, channels, 1)

    @property
    def convolutions(self) -> list[nn.Module]:
        return [self.start, *self.wn.inputs, *self.wn.outputs, self.end]

    def mixed(self, x: Tensor) -> Tensor:
        b, c, t = x.shape
        grouped = x.view(b, 2, c // 4, 2, t).transpose(2, 3).reshape(b, 4, c // 4, t)
        y = F.conv2d(grouped, self.weight[:, :, None, None])
        return y.view(b, 2, 2, c // 4, t).transpose(2, 3).reshape(b, c, t)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        length = mask.sum((1, 2))
        x = (self.bias + self.logs.exp() * x) * mask
        logdet = self.logs.sum() * length
        x = self.mixed(x) * mask
        logdet = logdet + self.weight.det().abs().log() * (x.shape[1] / 4) * length
        kept, changed = x.tensor_split(2, dim=1)
        m, logs = self.end(self.wn(self.start(kept) * mask, mask)).tensor_split(2, dim=1)
        changed = (m + logs.exp() * changed) * mask
        return torch.cat([kept, changed], 1), logdet + (logs * mask).sum((1, 2))


class Decoder(nn.Module):
    """The flow of mel frames (B, mels, T), T even, with a mask (B, 1, T)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        channels = 2 * size.mels
        blocks = (Block(channels, size.width, size.depth) for _ in range(size.blocks))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = _squeezed(x, mask)
        total = x.new_zeros(len(x))
        for block in self.blocks:
            x, logdet = block(x, mask)
            total = total + logdet
        return _unsqueezed(x), total


def _squeezed(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    b, c, t = x.shape
    mask = mask[:, :, 1::2]
    return x.view(b, c, t // 2, 2).permute(0, 3, 1, 2).reshape(b, 2 * c, t // 2) * mask, mask


def _unsqueezed(z: Tensor) -> Tensor:
    b, c, t = z.shape
    return z.view(b, 2, c // 2, t).permute(0, 2, 3, 1).reshape(b, c // 2, 2 * t)


def convolutions(net: Any) -> list[nn.Module]:
    """Those of the example's network, in the order of `Block.convolutions`."""
    return [net.start, *net.gates, *net.skips, net.end]


def masked_chain(published: Decoder, size: Size) -> ReversibleChain:
    """The example's decoder with the published decoder's weights, also normalized ones."""
    chain: ReversibleChain = runpy.run_path(str(EXAMPLE))["decoder"](*size)
    chain.to(published.blocks[0].weight)
    with torch.no_grad():
        for block, (actnorm, conv, coupling) in zip(published.blocks, steps_of(chain), strict=True):
            actnorm.log_scale.copy_(block.logs.flatten())
            actnorm.bias.copy_((block.bias * (-block.logs).exp()).flatten())
            actnorm.keep_as_set()
            conv.factor_(block.weight)
            own = convolutions(coupling.net)
            for convolution in own[:-1]:
                weight_norm(convolution)
            for convolution, theirs in zip(own, block.convolutions, strict=True):
                convolution.load_state_dict(theirs.state_dict())
            for parameter in own[-1].parameters():  # published: shift first
                parameter.copy_(parameter.roll(size.mels, 0))
    return chain


def steps_of(chain: ReversibleChain) -> list[list[Any]]:
    """The actnorm, 1x1 convolution and coupling of each step of the example's decoder."""
    layers = list(chain.layers)[1:-1]
    return [layers[i : i + 3] for i in range(0, len(layers), 3)]
