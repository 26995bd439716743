r"""The manifold objective: a penalized log-likelihood (arXiv 2206.03293).

A mask says which latent pixels are u, on the manifold; the rest are v, off it.

    L(x) = -log N(u; 0, I) - log p_V(v) - log |det df/dx| + sum_i w_i rho(e_i)

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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels.layers.actnorm import over_ranks
from mflow_kernels.models.penalty_weight import Domain, Weight, check_positive, check_weight
from mflow_kernels.ops.checks import (
    check_broadcast,
    check_choice,
    check_state,
)
from mflow_kernels.ops.masked_penalty import (
    RHOS,
    Rho,
    masked_penalty,
    masked_penalty_gaussian,
    penalty_log_normalizer,
)

MEMORY = 100  # batches that the tracked variance looks back on
LEAST_VARIANCE = 1e-8  # keeps w finite where reconstructions are exact


class Terms(NamedTuple):
    """The parts of the objective, (N,) each, nats; float32, or float64 for float64 data.

    Attributes:
        loss: what training minimizes: L(x), in the latent domain without the normalizer of p_V.
        log_likelihood: log p(x) of the flow, on_manifold + off_manifold + logdet; a penalty of the
            data domain is not in it.
        on_manifold: log N(u; 0, I).
        off_manifold: log p_V(v), its normalizer included.
        logdet: log |det df/dx|.
        penalty: sum w rho(e), >= 0.
    """

    loss: Tensor
    log_likelihood: Tensor
    on_manifold: Tensor
    off_manifold: Tensor
    logdet: Tensor
    penalty: Tensor


class Manifold(Protocol):
    """What an objective asks of a model: latents, the masks of their v pixels, and decoding."""

    input_shape: tuple[int, ...]
    latent_shapes: tuple[tuple[int, ...], ...]

    def latents(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]: ...
    def off_masks(self) -> tuple[Tensor, ...]: ...
    def gather(self, latents: tuple[Tensor, ...]) -> Tensor: ...
    def decode(self, u: Tensor) -> Tensor: ...


class ManifoldObjective(nn.Module):
    """The penalized log-likelihood of joint manifold learning (arXiv 2206.03293).

    Args:
        domain: "latent" or "data", whose pixels the penalty is on.
        rho: "l2", "l1" or "huber".
        weight: w, of each penalty term. A number > 0. Or a map: in the data domain a tensor that
            broadcasts to an image, of finite numbers >= 0; in the latent domain a tuple of one
            tensor for each latent, that broadcasts to it, of numbers > 0, so that p_V is a density.
            Or, in the data domain, "variance": w = 1 / (2 variance), with the variance of e about
            0, over samples and pixels, tracked while training (the mean of all batches, from the
            100th on a running one) and kept in the state dict; a constant to the gradient. After
            arXiv 2308.13792, of which a summary speaks of a variance-derived factor. In the latent
            domain it would be no penalty: as w falls with the variance of v, stretching v raises
            the log-determinant without bound.
        delta: where "huber" turns from quadratic to linear, > 0, in units of e.
        sigma: standard deviation of p_V in the data domain, > 0. It is the unit of v: a flow with v
            and sigma scaled alike has the same loss.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    variance: Tensor
    batches: Tensor

    def __init__(
        self,
        domain: Domain = "data",
        rho: Rho = "l2",
        weight: Weight = 1000.0,
        delta: float = 1.0,
        sigma: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("domain", domain, ("latent", "data"))
        check_choice("rho", rho, RHOS)
        for name, value in (("delta", delta), ("sigma", sigma)):
            check_positive(name, value)
        self.domain, self.rho, self.delta, self.sigma = domain, rho, float(delta), float(sigma)
        self._weight = check_weight(weight, domain)
        self._maps = 0
        if isinstance(weight, tuple | Tensor):
            maps = weight if isinstance(weight, tuple) else (weight,)
            self._maps = len(maps)
            for i, part in enumerate(maps):
                self.register_buffer(f"weight_{i}", part.detach().clone())
        elif weight == "variance":
            self.register_buffer("variance", torch.ones((), dtype=torch.float32))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def weight(self) -> Weight:
        """w: a number, a map on the module's device, or "variance"."""
        if not self._maps:
            return self._weight
        maps = tuple(getattr(self, f"weight_{i}") for i in range(self._maps))
        return maps if self.domain == "latent" else maps[0]

    def check_fits(self, model: Manifold) -> None:
        """ValueError where a map of weights does not broadcast to the image or the latents."""
        weight = self.weight
        if isinstance(weight, Tensor):
            check_broadcast("weight", weight, model.input_shape)
        elif isinstance(weight, tuple):
            if len(weight) != len(model.latent_shapes):
                raise ValueError(
                    f"weight: expected one map for each of {len(model.latent_shapes)} latents, "
                    f"got {len(weight)}"
                )
            for i, (part, shape) in enumerate(zip(weight, model.latent_shapes, strict=True)):
                check_broadcast(f"weight[{i}]", part, shape)

    def forward(self, model: Manifold, x: Tensor) -> Terms:
        """The terms for a batch x, in training mode with the tracked variance brought up to date.

        Raises:
            TypeError: x is not of a floating dtype.
            ValueError: x has no samples or another shape than the model's input, or a map of
                weights does not fit the model.
        """
        self.check_fits(model)
        if not len(check_state("x", x)):
            raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
        return self.of_latents(model, x, *model.latents(x))

    def of_latents(
        self, model: Manifold, x: Tensor, latents: tuple[Tensor, ...], logdet: Tensor
    ) -> Terms:
        """As `forward`, for a batch x whose `model.latents(x)` are at hand."""
        off_loss, on, off = self._densities(model, latents)
        likelihood = on + off + logdet
        if self.domain == "latent":
            return Terms(off_loss - on - logdet, likelihood, on, off, logdet, off_loss)
        u = model.gather(latents)
        if u.shape[1] == math.prod(model.input_shape):
            # Nothing is off the manifold: every x is its own projection.
            penalty = torch.zeros_like(off_loss)
        else:
            penalty = self._reconstruction(x, model.decode(u).to(x.dtype))
        return Terms(penalty - likelihood, likelihood, on, off, logdet, penalty)

    def log_likelihood(self, model: Manifold, x: Tensor) -> Tensor:
        """log p(x) of the flow, (N,), nats."""
        latents, logdet = model.latents(x)
        _, on, off = self._densities(model, latents)
        return on + off + logdet

    def off_density(self, model: Manifold, latents: tuple[Tensor, ...]) -> Tensor:
        """log p_V(v), (N,), nats, normalizer included."""
        return self._densities(model, latents)[2]

    def extra_repr(self) -> str:
        shown = f"map of {self._maps} tensors" if self._maps else repr(self._weight)
        return (
            f"{self.domain!r}, {self.rho!r}, weight={shown}, delta={self.delta}, sigma={self.sigma}"
        )

    def _densities(
        self, model: Manifold, latents: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-log p_V without its normalizer, log N(u), and log p_V."""
        masks = model.off_masks()
        rho: Rho = self.rho
        weight = self.weight
        if self.domain == "data":
            rho, weight = "l2", self.sigma**-2
        weights = weight if isinstance(weight, tuple) else (weight,) * len(masks)
        parts, normalizers = [], []
        for z, mask, w in zip(latents, masks, weights, strict=True):
            assert not isinstance(w, str)  # never in the latent domain
            parts.append(masked_penalty_gaussian(z, mask=mask, weight=w, rho=rho, delta=self.delta))
            normalizers.append(_log_normalizer(mask, w, rho, self.delta))
        penalty = torch.stack([p for p, _ in parts]).sum(0)
        on = torch.stack([g for _, g in parts]).sum(0)
        return penalty, on, -penalty - torch.stack(normalizers).sum().to(penalty.dtype)

    def _reconstruction(self, x: Tensor, projection: Tensor) -> Tensor:
        """sum w rho(x - projection) (N,)."""
        weight = self.weight
        assert not isinstance(weight, tuple)  # never in the data domain
        if not isinstance(weight, str):
            return masked_penalty(x, projection, weight=weight, rho=self.rho, delta=self.delta)
        penalty = masked_penalty(x, projection, rho=self.rho, delta=self.delta)
        if self.training:
            self._track(x, projection)
        return penalty / (2 * self.variance.to(penalty.dtype).clamp(min=LEAST_VARIANCE))

    @torch.no_grad()
    def _track(self, x: Tensor, projection: Tensor) -> None:
        """Bring the variance of x - projection about 0 up to date with one more batch."""
        squares = 2 * masked_penalty(x, projection, rho="l2").double().sum()
        # All ranks see the same sums, and keep the same variance.
        squares, count = over_ranks(torch.stack([squares, torch.full_like(squares, x.numel())]))
        self.batches += 1
        share = (1 / self.batches.clamp(max=MEMORY)).to(self.variance.dtype)
        self.variance.lerp_((squares / count).to(share.dtype), share)


def _log_normalizer(mask: Tensor, weight: Tensor | float, rho: Rho, delta: float) -> Tensor:
    """log of the integral of exp(-w rho) over the masked pixels, a float64 scalar."""
    if isinstance(weight, Tensor):
        each = penalty_log_normalizer(rho, weight.double(), delta)
        return torch.where(mask, each, 0.0).sum()
    return mask.sum().double() * penalty_log_normalizer(rho, weight, delta)
