"""TarFlow, an autoregressive flow of causal transformers (Zhai et al., arXiv 2412.06329)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.layers import Bijection

Cache = list[tuple[Tensor, Tensor]]  # keys and values of the tokens so far, of each layer


class TarFlow(Bijection):
    """Blocks z_t = (x_t - mu_t) exp(-alpha_t); mu_t and alpha_t depend on the tokens before t.

    Tokens are patches of the image. Each block reads them in the reverse order of the one before,
    and gives mu and alpha by a causal transformer, so its inverse goes from token to token.
    `(z,), logdet = flow(x)` maps x (N, C, H, W) to z (N, tokens, C * patch^2). A new flow only
    reorders the numbers of x. The guidance and the denoising of the paper are left out: they
    change samples, and not the density.

    Args:
        image_shape: (C, H, W).
        patch: side of the patches; it divides H and W.
        blocks: number of blocks.
        layers, width, heads: of the transformer of each block.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        patch: int,
        blocks: int,
        layers: int,
        width: int,
        heads: int,
    ) -> None:
        super().__init__()
        c, h, w = image_shape
        self.patch = patch
        tokens, channels = h * w // patch**2, c * patch**2
        self.input_shape: tuple[int, ...] = image_shape
        self.latent_shapes: tuple[tuple[int, ...], ...] = ((tokens, channels),)
        self.blocks = nn.ModuleList(
            [_Block(tokens, channels, layers, width, heads) for _ in range(blocks)]
        )

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        z = F.pixel_unshuffle(x, self.patch).flatten(2).mT
        logdet = torch.zeros(len(x), dtype=x.dtype)
        for block in self.blocks:
            mu, alpha = block(z)
            z = ((z - mu) * (-alpha).exp()).flip(1)
            logdet = logdet - alpha.flatten(1).sum(1)
        return (z,), logdet

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = z[0], torch.zeros(len(z[0]), dtype=z[0].dtype)
        for block in reversed(self.blocks):
            x, alphas = block.inverse(x.flip(1))
            logdet = logdet + alphas
        _, h, w = self.input_shape
        image = x.mT.unflatten(2, (h // self.patch, w // self.patch))
        return F.pixel_shuffle(image, self.patch), logdet

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        return self(x)


class _Block(nn.Module):
    """Gives mu and alpha of each token by a causal transformer."""

    def __init__(self, tokens: int, channels: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.position = nn.Parameter(torch.randn(tokens, width) / 50)
        self.layers = nn.ModuleList([_Layer(width, heads) for _ in range(layers)])
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * channels))
        nn.init.zeros_(self.out[1].weight)
        nn.init.zeros_(self.out[1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and alpha of the tokens x (N, tokens, channels). The first token's are 0."""
        h = self.embed(x[:, :-1]) + self.position[:-1]
        for layer in self.layers:
            h = layer(h)
        return F.pad(self.out(h), (0, 0, 1, 0)).chunk(2, 2)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the sum of alpha (N,)."""
        x, total = [z[:, :1]], torch.zeros(len(z), dtype=z.dtype)
        cache: Cache = [(z.new_empty(0), z.new_empty(0))] * len(self.layers)
        for t in range(1, z.shape[1]):
            h = self.embed(x[-1]) + self.position[t - 1]
            for i, layer in enumerate(self.layers):
                h, cache[i] = layer.next(h, cache[i])
            mu, alpha = self.out(h).chunk(2, 2)
            x.append(z[:, t : t + 1] * alpha.exp() + mu)
            total = total + alpha.flatten(1).sum(1)
        return torch.cat(x, 1), total


class _Layer(nn.Module):
    """Causal self-attention and a network of one hidden layer, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self._qkv(h)
        return self._rest(h, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def next(
        self, h: Tensor, before: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the next token's h (N, 1, width), and the keys and values up to it."""
        q, k, v = self._qkv(h)
        if before[0].numel():
            k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        # Written out, because torch's own attention has no forward-mode derivative.
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self._rest(h, weights @ v), (k, v)

    def _qkv(self, h: Tensor) -> list[Tensor]:
        """Return query, key and value, each (N, heads, tokens, width / heads)."""
        qkv = self.qkv(self.norm(h)).unflatten(2, (3, self.heads, -1))
        return [part.transpose(1, 2) for part in qkv.unbind(2)]

    def _rest(self, h: Tensor, attended: Tensor) -> Tensor:
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))
