"""Train the decoder of Glow-TTS (arXiv 2005.11129) on padded batches of synthetic mel frames.

python examples/glow_tts.py
"""

import torch
from torch import Tensor, nn

import mflow_kernels as mf


class WaveNet(nn.Module):
    """The network of a coupling: gated convolutions with residual and skip connections."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.start, self.end = nn.Conv1d(channels, width, 1), nn.Conv1d(width, 2 * channels, 1)
        nn.init.zeros_(self.end.weight), nn.init.zeros_(self.end.bias)
        sizes = [2 * width] * (depth - 1) + [width]
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 5, padding=2) for _ in sizes)
        self.skips = nn.ModuleList(nn.Conv1d(width, size, 1) for size in sizes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h, total = self.start(x) * mask, 0
        for gate, skip in zip(self.gates, self.skips, strict=True):
            signal, gain = gate(h).chunk(2, dim=1)
            *residual, skipped = skip(signal.tanh() * gain.sigmoid()).split(h.shape[1], dim=1)
            h, total = (h + sum(residual)) * mask, total + skipped
        return self.end(total)


def decoder(mels: int, blocks: int, width: int, depth: int) -> mf.ReversibleChain:
    """Return the flow of frames (N, mels, T); lengths and T are even."""
    c, scale = 2 * mels, mf.ScaleFunction("exp", order="scale-shift")
    layers = [mf.PixelPairs("neighbours"), mf.PixelPairs("neighbours", inverted=True)]
    for _ in range(blocks):
        coupling = mf.AffineCoupling(c, WaveNet(mels, width, depth), scale=scale)
        layers[-1:-1] = mf.ActNorm(c), mf.InvertibleConv1x1(c, n_split=4), coupling
    return mf.ReversibleChain(layers, masked=True)


def main() -> None:
    torch.manual_seed(0)
    flow = decoder(mels=8, blocks=3, width=16, depth=2)
    masks = torch.arange(48) < 2 * torch.randint(8, 25, (30, 32, 1, 1))  # 16 to 48 frames
    frames = torch.randn(30, 32, 8, 52).unfold(3, 5, 1).mean(4) * masks  # smooth noise
    flow.initialize(frames[0], masks[0])
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for x, mask in zip(frames, masks, strict=True):
        loss = -flow.log_prob(x, context=mask).sum() / (8 * mask.sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f} nats per value")
    print("round trip within", (flow.inverse(flow(x, mask)[0], mask)[0] - x).abs().max().item())


if __name__ == "__main__":
    main()
