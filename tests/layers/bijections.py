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
        negative = (x < 0).to(x.dtype)
        z = torch.where(x < 0, self.log_a.exp() * x, x)
        return z, self.log_a * negative.flatten(1).sum(1)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        negative = (z < 0).to(z.dtype)
        x = torch.where(z < 0, z / self.log_a.exp(), z)
        return x, -self.log_a * negative.flatten(1).sum(1)


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


class TokenCoupling(Bijection):
    """Half of the tokens (N, C, T) shift and scale the other half, by 2 sigmoid."""

    def __init__(self, channels: int, context: int = 0) -> None:
        super().__init__()
        self.net = Transformer(channels, 2 * channels, context)

    def _params(self, a: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(a, *context).chunk(2, dim=1)
        return raw.sigmoid().log() + torch.log(torch.tensor(2.0)), shift

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=2)
        log_s, shift = self._params(a, context)
        return torch.cat([a, (b + shift) * log_s.exp()], 2), log_s.flatten(1).sum(1)

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z.chunk(2, dim=2)
        log_s, shift = self._params(a, context)
        return torch.cat([a, b * (-log_s).exp() - shift], 2), -log_s.flatten(1).sum(1)


class Checkerboard(Bijection):
    """A masked affine coupling on the squares of a checkerboard (RealNVP)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(channels, 2 * channels, 3, padding=1)

    def _params(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
        mask = ((rows[:, None] + columns) % 2).to(x.dtype)
        raw, shift = self.net((1 - mask) * x).chunk(2, dim=1)
        return mask * raw.tanh(), mask * shift

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        log_s, shift = self._params(x)
        return x * log_s.exp() + shift, log_s.flatten(1).sum(1)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        log_s, shift = self._params(z)
        return (z - shift) * (-log_s).exp(), -log_s.flatten(1).sum(1)


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
