"""A flow on the real line, where couplings do not work: they need two dimensions."""

import math

import torch
from torch import Tensor, nn

from mflow_kernels.layers import Bijection

_TINY = 1e-12


class MixtureFlow(Bijection):
    """z = Phi^-1(sum_k p_k Phi((x - m_k) / s_k)), where Phi is the normal distribution function.

    The sum is the distribution function of a mixture of K Gaussians. Flow++ (arXiv 1902.00275) does
    the same with logistics. `(z,), logdet = flow(x)` for x (N, 1); it computes in float64.
    """

    def __init__(self, components: int = 8) -> None:
        super().__init__()
        self.input_shape: tuple[int, ...] = (1,)
        self.latent_shapes: tuple[tuple[int, ...], ...] = ((1,),)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.linspace(-1, 1, components))
        self.log_deviations = nn.Parameter(torch.zeros(components))

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Place the components at quantiles of a first batch x (N, 1), and return `forward(x)`."""
        with torch.no_grad():
            k = len(self.means)
            self.means.copy_(x[:, 0].quantile((torch.arange(k, dtype=x.dtype) + 0.5) / k))
            self.log_deviations.fill_(math.log(2 * x.std().item() / k + 1e-6))
        return self(x)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        cdf, log_density = self._mixture(x.double())
        z = torch.special.ndtri(cdf.clamp(_TINY, 1 - _TINY))
        logdet = log_density + z.square() / 2 + math.log(2 * math.pi) / 2
        return (z[:, None].to(x.dtype),), logdet.to(x.dtype)

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        """Invert by bisection, then by one step of Newton's method, which carries the gradient."""
        target = torch.special.ndtr(z[0][:, 0].double()).clamp(_TINY, 1 - _TINY)
        with torch.no_grad():
            reach = 10 * self.log_deviations.exp().max().double()
            low = torch.full_like(target, (self.means.min() - reach).item())
            high = torch.full_like(target, (self.means.max() + reach).item())
            for _ in range(50):
                middle = (low + high) / 2
                below = self._mixture(middle[:, None])[0] < target
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            slope = self._mixture(low[:, None])[1].exp().clamp_min(_TINY)
        x = (low - (self._mixture(low[:, None])[0] - target) / slope)[:, None].to(z[0].dtype)
        return x, -self(x)[1]

    def _mixture(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution function and the log-density at x (N, 1), (N,) each, float64."""
        log_s = self.log_deviations.double()
        e = (x - self.means.double()) / log_s.exp()
        weights = self.logits.double().softmax(0)
        log_parts = -e.square() / 2 - log_s - math.log(2 * math.pi) / 2 + weights.log()
        return (weights * torch.special.ndtr(e)).sum(1), log_parts.logsumexp(1)
