r"""The manifold objective: a penalized log-likelihood (arXiv 2206.03293).

A mask says which latent pixels are u, on the manifold; the rest are v, off it.

    L(x) = -log N(u; 0, I) - log p_V(v) - log |det df/dx| + sum_i w rho(e_i)

rho(e) is "l2" e^2 / 2, "l1" |e| or "huber": e^2 / 2 up to delta and delta (|e| - delta / 2) beyond.
The paper's abstract leaves open whose pixels e are; two domains are offered:

    "latent"  e = v, and the penalty stands in place of -log p_V: p_V is proportional to
              exp(-w rho). Its normalizer enters the reported likelihood, never the gradient. With
              l2 this is PIE's Gaussian of variance 1 / w.
    "data"    e = x - f^-1(u, 0), one term a pixel of the image; p_V = N(0, sigma^2 I) stays in,
              since stretching v would raise the log-determinant for nothing. The reported
              likelihood is without the penalty.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mflow_kernels.ops._checks import check_choice
from mflow_kernels.ops.masked_penalty import (
    masked_penalty,
    masked_penalty_gaussian,
    penalty_log_normalizer,
)

Rho = Literal["l2", "l1", "huber"]
Domain = Literal["latent", "data"]


class Terms(NamedTuple):
    """The parts of the objective, (N,) each, nats.

    loss is what training minimizes; log_likelihood = on_manifold + off_manifold + logdet is the
    flow's log p(x), normalizers included, the penalty of the data domain excluded.
    """

    loss: Tensor
    log_likelihood: Tensor
    on_manifold: Tensor
    off_manifold: Tensor
    logdet: Tensor
    penalty: Tensor


class Manifold(Protocol):
    """What an objective asks of a model: latents, the masks of their v pixels, and decoding."""

    def latents(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]: ...
    def off_masks(self) -> tuple[Tensor, ...]: ...
    def gather(self, latents: tuple[Tensor, ...]) -> Tensor: ...
    def decode(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ManifoldObjective:
    """The penalized log-likelihood of joint manifold learning (arXiv 2206.03293).

    Attributes:
        domain: "latent" or "data", whose pixels the penalty is on.
        rho: "l2", "l1" or "huber".
        weight: w > 0, of each penalty term.
        delta: where "huber" turns from quadratic to linear, > 0.
        sigma: standard deviation of p_V in the data domain, > 0.
    """

    domain: Domain = "latent"
    rho: Rho = "l2"
    weight: float = 100.0
    delta: float = 1.0
    sigma: float = 0.1

    def __post_init__(self) -> None:
        check_choice("domain", self.domain, ("latent", "data"))
        check_choice("rho", self.rho, ("l2", "l1", "huber"))
        for name in ("weight", "delta", "sigma"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number > 0, got {value}")

    def __call__(self, model: Manifold, x: Tensor) -> Terms:
        """The terms for a batch x."""
        latents, logdet = model.latents(x)
        off_loss, on, off = self._densities(model, latents)
        if self.domain == "latent":
            penalty = off_loss
            return Terms(off_loss - on - logdet, on + off + logdet, on, off, logdet, penalty)
        projection = model.decode(model.gather(latents))
        penalty = masked_penalty(
            x, projection.to(x.dtype), weight=self.weight, rho=self.rho, delta=self.delta
        )
        likelihood = on + off + logdet
        return Terms(penalty - likelihood, likelihood, on, off, logdet, penalty)

    def log_likelihood(self, model: Manifold, x: Tensor) -> Tensor:
        """log p(x) of the flow, (N,), nats."""
        latents, logdet = model.latents(x)
        _, on, off = self._densities(model, latents)
        return on + off + logdet

    def off_density(self, model: Manifold, latents: tuple[Tensor, ...]) -> Tensor:
        """log p_V(v), (N,), nats, normalizer included."""
        return self._densities(model, latents)[2]

    def _densities(
        self, model: Manifold, latents: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-log p_V without its normalizer, log N(u), and log p_V."""
        if self.domain == "latent":
            rho, weight = self.rho, self.weight
        else:
            rho, weight = "l2", self.sigma**-2
        masks = model.off_masks()
        parts = [
            masked_penalty_gaussian(z, mask=mask, weight=weight, rho=rho, delta=self.delta)
            for z, mask in zip(latents, masks, strict=True)
        ]
        penalty = torch.stack([p for p, _ in parts]).sum(0)
        on = torch.stack([g for _, g in parts]).sum(0)
        # In the penalty's dtype: an integer times a float would be a float32.
        count = torch.stack([mask.sum() for mask in masks]).sum().to(penalty.dtype)
        return penalty, on, -penalty - count * penalty_log_normalizer(rho, weight, self.delta)


def bits_per_dimension(log_likelihood: Tensor, dimensions: int, n_bits: int) -> Tensor:
    """Bits per dimension of images that were scaled from 2 ** n_bits levels to unit range.

    Args:
        log_likelihood: (N,) nats, of the dequantized, scaled images.
        dimensions: D, the number of pixels times channels.
        n_bits: bits of an image's levels.
    """
    return n_bits - log_likelihood / (dimensions * math.log(2))
