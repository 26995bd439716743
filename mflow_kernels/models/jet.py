"""Jet: couplings whose networks are small vision transformers."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mflow_kernels.layers import AffineCoupling, Permutation, PixelPairs, Squeeze
from mflow_kernels.layers.networks import with_context
from mflow_kernels.models.glow import ChainFlow, check_image_shape
from mflow_kernels.ops.checks import check_count
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.scale import Kind, ScaleFunction


class Jet(ChainFlow):
    """The flow of Kolesnikov, Pinto and Tschannen, "Jet" (arXiv 2412.15129).

    The image is cut into patches, which become tokens of C * patch^2 channels. Of each three
    couplings, two split the channels, in a random order that is fixed, and one splits the tokens as
    the squares of a checkerboard, white and black in turn. The network of a coupling is a vision
    transformer. There is one level, and no actnorm. A new flow only reorders the numbers of x.

    `(z,), logdet = jet(x)` maps x (N, C, H, W) to z (N, C * patch^2, H / patch, W / patch), which
    is standard normal under the model. x and z have the dtype of the parameters.

    Args:
        image_shape: (C, H, W).
        patch: side of the patches, a power of 2. It must divide H, and 2 * patch must divide W.
        couplings: number of couplings.
        depth: number of transformer blocks in each network.
        width: channels of a network's tokens, divisible by heads.
        heads: number of attention heads.
        scale: scale function of the couplings, as for `AffineCoupling`.
        context_channels: as for `Glow`.
        seed: of the random orders of channels, which the state dict contains.
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a number is not positive, or patches, channels or heads do not fit.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        patch: int,
        couplings: int,
        depth: int = 2,
        width: int = 64,
        heads: int = 4,
        *,
        scale: ScaleFunction | Kind = "double-sigmoid",
        context_channels: int = 0,
        seed: int = 0,
        reversible: bool = True,
        checkpoint_every: int | None = 8,
    ) -> None:
        super().__init__()
        c, h, w = check_image_shape(image_shape)
        for name, number, least in (
            *(("patch", patch, 1), ("couplings", couplings, 1), ("depth", depth, 1)),
            *(("width", width, 1), ("heads", heads, 1), ("seed", seed, 0)),
            ("context_channels", context_channels, 0),
        ):
            check_count(name, number, least)
        if patch & (patch - 1):
            raise ValueError(f"patch: expected a power of 2, got {patch}")
        if h % patch or w % (2 * patch):
            raise ValueError(
                f"image_shape: expected a height divisible by patch = {patch} and a width "
                f"divisible by 2 * patch = {2 * patch}, got {h}x{w}"
            )
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")
        channels, tokens = c * patch**2, h * w // patch**2
        if channels < 2:
            raise ValueError("patch: expected at least 2 for images with one channel, got 1")
        self.input_shape = (c, h, w)
        self.patch, self.couplings = patch, couplings
        self.depth, self.width, self.heads = depth, width, heads
        self.scale = ScaleFunction.of(scale)
        self.context_channels = context_channels
        generator = torch.Generator("cpu").manual_seed(seed)

        def coupling(channels: int, tokens: int) -> AffineCoupling:
            a, b = channels // 2, channels - channels // 2
            net = TokenNetwork(a, 2 * b, tokens, depth, width, heads, context_channels)
            return AffineCoupling(channels, net, scale=scale)

        layers: list[nn.Module] = [Squeeze() for _ in range(patch.bit_length() - 1)]
        for i in range(couplings):
            if i % 3 < 2:
                order = torch.randperm(channels, generator=generator, device="cpu")
                layers.append(Permutation(order.tolist()))
                layers.append(coupling(channels, tokens))
                continue
            swap = [*range(channels, 2 * channels), *range(channels)]
            layers += [
                PixelPairs("checkerboard"),
                *([Permutation(swap)] if i % 2 else []),  # the other squares change
                coupling(2 * channels, tokens // 2),
                *([Permutation(swap)] if i % 2 else []),
                PixelPairs("checkerboard", inverted=True),
            ]
        self._join(layers, reversible, checkpoint_every)


class TokenNetwork(nn.Module):
    """A vision transformer from (N, in_channels, h, w) to (N, out_channels, h, w), h * w tokens.

    Its last layer is initialized to zero. With context_channels, calls take a context; see
    `CouplingNetwork`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        tokens: int,
        depth: int,
        width: int,
        heads: int,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        self.context_channels = context_channels
        self.embed = nn.Linear(in_channels + context_channels, width)
        self.position = nn.Parameter(torch.randn(tokens, width) / width**0.5)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_channels)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        sides = x.shape[2:]
        if context is not None or self.context_channels:
            x = with_context(x, context, self.context_channels)
        tokens = self.blocks(self.embed(x.flatten(2).mT) + self.position)
        return self.out(self.norm(tokens)).mT.unflatten(2, sides)


class TransformerBlock(nn.Module):
    """Attention and two dense layers on tokens (N, T, width), each after a layer norm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.dense_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.dense = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # Only this backend has forward-mode and higher derivatives.
        with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
            read = F.scaled_dot_product_attention(query, key, value)
        x = x + self.attention_out(read.transpose(1, 2).flatten(2))
        return x + self.dense(self.dense_norm(x))
