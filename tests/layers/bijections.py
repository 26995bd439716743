"""Bijections that a user would bring to a chain. None of them knows this package but its face."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels import Bijection


class LeakyReLU(Bijection):
    """y = x for x >= 0, else a x."""

    def __init__(self, a: float = 0.7) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.tensor(a).log())

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        log_s = self.log_a * (x < 0)
        return x * log_s.exp(), log_s.flatten(1).sum(1)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        log_s = self.log_a * (z < 0)
        return z / log_s.exp(), -log_s.flatten(1).sum(1)


class Transformer(nn.Module):
    """A network on tokens (N, C, T) with attention, as in couplings that are small ViTs."""

    def __init__(self, channels: int, out: int, context: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, out)
        self.context = nn.Linear(context, 8) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.embed(x.movedim(1, -1))
        if self.context is not None and context is not None:
            h = h + self.context(context)[:, None]
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        h = h + F.scaled_dot_product_attention(q, k, v)
        return self.out(h.tanh()).movedim(-1, 1)


class Affine(Bijection):
    """z = x exp(log_s) + shift. Elements whose log_s and shift are 0 choose those of the others."""

    def params(self, x: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """log_s and shift, each of the shape of x."""
        raise NotImplementedError

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        log_s, shift = self.params(x, context)
        return x * log_s.exp() + shift, log_s.flatten(1).sum(1)

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        log_s, shift = self.params(z, context)
        return (z - shift) * (-log_s).exp(), -log_s.flatten(1).sum(1)


class TokenCoupling(Affine):
    """Half of the tokens (N, C, T) shift and scale the other half."""

    def __init__(self, channels: int, context: int = 0) -> None:
        super().__init__()
        self.net = Transformer(channels, 2 * channels, context)

    def params(self, x: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(x.chunk(2, dim=2)[0], *context).chunk(2, dim=1)
        keep = torch.zeros_like(raw)
        return torch.cat([keep, F.logsigmoid(raw)], 2), torch.cat([keep, shift], 2)


class Checkerboard(Affine):
    """A masked affine coupling on the squares of a checkerboard (RealNVP)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(channels, 2 * channels, 3, padding=1)

    def params(self, x: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
        mask = ((rows[:, None] + columns) % 2).to(x.dtype)
        raw, shift = self.net((1 - mask) * x).chunk(2, dim=1)
        return mask * raw.tanh(), mask * shift


class Reversed(nn.Module):
    """A permutation of the channels. It is no `Bijection`, and has one logdet for all samples."""

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(())

    inverse = forward


def nflows_spline(channels: int) -> nn.Module:
    """A spline coupling of nflows, as it comes."""
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    return PiecewiseRationalQuadraticCouplingTransform(
        torch.arange(channels) % 2,
        lambda i, o: ResidualNet(i, o, hidden_features=8, num_blocks=1),
        num_bins=4,
        tails="linear",
        tail_bound=3.0,
    )
