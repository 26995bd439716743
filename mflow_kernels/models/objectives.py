r"""The manifold objective: a penalized log-likelihood (arXiv 2206.03293).

A mask divides the latent pixels into u, coordinates on the manifold, and v, which is zero on it.

    L(x) = -log N(u; 0, I) - log p_V(v) - log |det df/dx| + sum_i w_i rho(e_i)

A `GaussianMixture` can take the place of N(u; 0, I). rho is "l2", e^2 / 2, or another function of
`ops/penalty_functions.py`.

The paper's abstract does not say what the errors e are. They belong to one of two domains:

    "latent"  e = v. p_V is proportional to exp(-w rho), so the penalty is -log p_V up to the
              normalizer, and L counts it once. The normalizer is part of the reported likelihood
              but not of the loss. With l2, p_V is the Gaussian of PIE, of variance 1 / w.
    "data"    e = x - f^-1(u, 0), one term per pixel of the image, and p_V = N(0, sigma^2 I). p_V
              keeps the flow from stretching v to raise the log-determinant. The reported
              likelihood does not include the penalty.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels.layers.actnorm import over_ranks
from mflow_kernels.layers.flow import Context
from mflow_kernels.models.mixture import GaussianMixture
from mflow_kernels.models.penalty_weight import (
    Domain,
    ErrorBound,
    Weight,
    WeightSchedule,
    check_positive,
    check_weight,
)
from mflow_kernels.ops.checks import check_broadcast, check_choice, check_state
from mflow_kernels.ops.masked_penalty import masked_penalty, masked_penalty_gaussian
from mflow_kernels.ops.penalty_functions import RHOS, Rho, penalty_function, penalty_log_normalizer

VARIANCE_WINDOW = 100  # number of batches that the tracked variance averages over
BOUND_WINDOW = 10  # the same for an ErrorBound; short, so that the mean follows changes of w
LEAST_VARIANCE = 1e-8  # keeps w finite if reconstructions are exact
# log w changes by this rate times log(error / bound) in a batch. The error follows w over tens of
# batches, and is large in the first hundred batches with any w. A faster rate would overshoot.
BOUND_RATE = 0.005
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-3, 1e8  # limits of an ErrorBound's weight


class Terms(NamedTuple):
    """The parts of the objective, (N,) each, in nats; float64 for float64 data, otherwise float32.

    Attributes:
        loss: L(x), which training minimizes. In the latent domain it lacks the normalizer of p_V.
        log_likelihood: log p(x) of the flow, on_manifold + off_manifold + logdet. It does not
            include the penalty of the data domain.
        on_manifold: log p(u), by default log N(u; 0, I).
        off_manifold: log p_V(v), including its normalizer.
        logdet: log |det df/dx|.
        penalty: sum of w rho(e), >= 0.
    """

    loss: Tensor
    log_likelihood: Tensor
    on_manifold: Tensor
    off_manifold: Tensor
    logdet: Tensor
    penalty: Tensor


class Manifold(Protocol):
    """The part of `ManifoldFlow` that an objective uses."""

    input_shape: tuple[int, ...]
    latent_shapes: tuple[tuple[int, ...], ...]
    prior: GaussianMixture | None

    def latents(
        self, x: Tensor, *, context: Context | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]: ...
    def off_masks(self) -> tuple[Tensor, ...]: ...
    def gather(self, latents: tuple[Tensor, ...]) -> Tensor: ...
    def decode(self, u: Tensor, *, context: Context | None = None) -> Tensor: ...


class ManifoldObjective(nn.Module):
    """The penalized log-likelihood of joint manifold learning (arXiv 2206.03293).

    Args:
        domain: "latent" or "data": the pixels that the penalty applies to.
        rho: name of a penalty function (`ops/penalty_functions.py`), such as "l2".
        weight: w, the weight of each penalty term, in one of these forms:

            - A number > 0.
            - A map. In the data domain it is a tensor of finite numbers >= 0, not all 0, that
              broadcasts to the image. In the latent domain it is a tuple with one tensor of
              numbers > 0 per latent, each broadcasting to its latent; p_V needs them positive.
            - "variance", in the data domain only: the w with which exp(-w rho) fits the errors
              best. This is 1 / variance for "l2", where variance is the mean of e^2 over samples
              and pixels, and 1 / mean |e| for "l1". In training mode, the mean of rho is tracked:
              over all batches at first, and from the 100th batch on as a running mean. It is part
              of the state dict and gets no gradient. Rybkin et al. (arXiv 2006.13202) calibrate a
              decoder's noise in this way; the summary of arXiv 2308.13792 mentions a
              variance-derived factor. In the latent domain, stretching v would lower w and raise
              the log-determinant without bound.
            - A `WeightSchedule` or an `ErrorBound`, in the data domain only: w changes in training
              mode, once per batch, before it is used. Its state is part of the state dict and gets
              no gradient.
        delta: |e| at which "huber" turns from quadratic to linear, > 0. The default suits images
            with a range of 1, whose errors have a deviation of about 0.05.
        sigma: standard deviation of p_V in the data domain, > 0. It only sets the scale of v:
            scaling v and sigma together leaves the loss unchanged. Actnorm starts with a deviation
            of 1, so with sigma = 1 training need not shrink v first.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
    """

    variance: Tensor
    batches: Tensor
    log_weight: Tensor

    def __init__(
        self,
        domain: Domain = "data",
        rho: Rho = "l2",
        weight: Weight = 400.0,
        delta: float = 0.1,
        sigma: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("domain", domain, ("latent", "data"))
        check_choice("rho", rho, RHOS)
        for name, value in (("delta", delta), ("sigma", sigma)):
            check_positive(name, value)
        self.domain, self.rho, self.delta, self.sigma = domain, rho, float(delta), float(sigma)
        self._weight = check_weight(weight, domain)
        self._maps = 0
        if isinstance(weight, (tuple, Tensor)):
            maps = weight if isinstance(weight, tuple) else (weight,)
            self._maps = len(maps)
            for i, part in enumerate(maps):
                self.register_buffer(f"weight_{i}", part.detach().clone())
        elif not isinstance(self._weight, float):
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
            if not isinstance(weight, WeightSchedule):
                self.register_buffer("variance", torch.ones((), dtype=torch.float32))
            if isinstance(weight, ErrorBound):
                start = math.log(weight.start or 1 / weight.error)
                self.register_buffer("log_weight", torch.tensor(start, dtype=torch.float32))

    @property
    def weight(self) -> Weight:
        """The weight that was passed to the constructor; a map is on the module's device."""
        if not self._maps:
            return self._weight
        maps = tuple(getattr(self, f"weight_{i}") for i in range(self._maps))
        return maps if self.domain == "latent" else maps[0]

    @property
    def trained_weight(self) -> Tensor | None:
        """The current w, a scalar on the module's device; None if training does not change w."""
        weight = self._weight
        if weight == "variance":
            mean = self.variance.clamp(min=LEAST_VARIANCE) / 2
            return penalty_function(self.rho).fitted_weight(mean, self.delta)
        if isinstance(weight, WeightSchedule):
            share = (self.batches / weight.steps).clamp(max=1.0)
            return weight.start * (share * math.log(weight.end / weight.start)).exp()
        return self.log_weight.exp() if isinstance(weight, ErrorBound) else None

    def check_fits(self, model: Manifold) -> None:
        """Raise ValueError if a map of weights does not broadcast to the image or the latents."""
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

    def forward(self, model: Manifold, x: Tensor, context: Context | None = None) -> Terms:
        """Return the terms for a batch x; in training mode, update the trained weight.

        Raises:
            TypeError: x does not have a floating dtype.
            ValueError: x has no samples or the wrong shape, or a map of weights does not fit the
                model.
        """
        self.check_fits(model)
        if not len(check_state("x", x)):
            raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
        return self.of_latents(model, x, *model.latents(x, context=context), context)

    def of_latents(
        self,
        model: Manifold,
        x: Tensor,
        latents: tuple[Tensor, ...],
        logdet: Tensor,
        context: Context | None = None,
    ) -> Terms:
        """Compute `forward` from `latents, logdet = model.latents(x, context=context)`."""
        off_loss, on, off = self._densities(model, latents)
        on = _of_prior(model, latents, on)
        likelihood = on + off + logdet
        if self.domain == "latent":
            return Terms(off_loss - on - logdet, likelihood, on, off, logdet, off_loss)
        u = model.gather(latents)
        if u.shape[1] == math.prod(model.input_shape):
            # The manifold is the whole space: every x is its own projection.
            penalty = torch.zeros_like(off_loss)
        else:
            penalty = self._reconstruction(x, model.decode(u, context=context).to(x.dtype))
        return Terms(penalty - likelihood, likelihood, on, off, logdet, penalty)

    def log_likelihood(self, model: Manifold, x: Tensor, context: Context | None = None) -> Tensor:
        """Return log p(x) of the flow, (N,), in nats."""
        latents, logdet = model.latents(x, context=context)
        _, on, off = self._densities(model, latents)
        return _of_prior(model, latents, on) + off + logdet

    def off_density(self, model: Manifold, latents: tuple[Tensor, ...]) -> Tensor:
        """Return log p_V(v), (N,), in nats, including the normalizer."""
        return self._densities(model, latents)[2]

    def draw_off_manifold(
        self,
        u: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        temperature: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, ...]:
        """Return the latents u with v drawn from p_V and scaled by the temperature.

        Args:
            u: all latents, with v = 0.
            masks: `model.off_masks()`.
            temperature: factor of v.
            generator: generator on the latents' device.
        """
        rho, weights = self._off_density(len(u))
        drawn = []
        for z, mask, w in zip(u, masks, weights, strict=True):
            each = torch.as_tensor(w, dtype=z.dtype, device=z.device).expand_as(z)
            v = temperature * penalty_function(rho).draw(each, self.delta, generator)
            drawn.append(torch.where(mask, v, z))
        return tuple(drawn)

    def extra_repr(self) -> str:
        shown = f"map of {self._maps} tensors" if self._maps else repr(self._weight)
        return (
            f"{self.domain!r}, {self.rho!r}, weight={shown}, delta={self.delta}, sigma={self.sigma}"
        )

    def _densities(
        self, model: Manifold, latents: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return -log p_V without its normalizer, log N(u), and log p_V, (N,) each."""
        masks = model.off_masks()
        rho, weights = self._off_density(len(masks))
        parts, normalizers = [], []
        for z, mask, w in zip(latents, masks, weights, strict=True):
            parts.append(masked_penalty_gaussian(z, mask=mask, weight=w, rho=rho, delta=self.delta))
            normalizers.append(_log_normalizer(mask, w, rho, self.delta))
        penalty = torch.stack([p for p, _ in parts]).sum(0)
        on = torch.stack([g for _, g in parts]).sum(0)
        return penalty, on, -penalty - torch.stack(normalizers).sum().to(penalty.dtype)

    def _off_density(self, latents: int) -> tuple[Rho, tuple[Tensor | float, ...]]:
        """Return rho, and for each latent the weight w of p_V, proportional to exp(-w rho)."""
        if self.domain == "data":
            return "l2", (self.sigma**-2,) * latents
        weight = self.weight
        assert isinstance(weight, (float, tuple))  # the other forms are for the data domain only
        return self.rho, weight if isinstance(weight, tuple) else (weight,) * latents

    def _reconstruction(self, x: Tensor, projection: Tensor) -> Tensor:
        """Return the sum of w rho(x - projection), (N,)."""
        weight = self.weight
        if isinstance(weight, (float, Tensor)):
            return masked_penalty(x, projection, weight=weight, rho=self.rho, delta=self.delta)
        penalty = masked_penalty(x, projection, rho=self.rho, delta=self.delta)
        if self.training:
            self._adapt(x, projection)
        trained = self.trained_weight
        assert trained is not None  # a tuple is for the latent domain only
        return penalty * trained.to(penalty.dtype)

    @torch.no_grad()
    def _adapt(self, x: Tensor, projection: Tensor) -> None:
        """Update the trained weight with one batch."""
        weight = self._weight
        if isinstance(weight, WeightSchedule):
            self.batches += 1
            return
        rho: Rho = "l2" if isinstance(weight, ErrorBound) else self.rho
        total = 2 * masked_penalty(x, projection, rho=rho, delta=self.delta).double().sum()
        # Sum over all ranks, so that each keeps the same weight.
        total, count = over_ranks(torch.stack([total, torch.full_like(total, x.numel())]))
        mean = (total / count).to(self.variance.dtype)
        # Training skips a step whose loss is not finite; the average leaves it out too.
        finite = mean.isfinite()
        self.batches += finite
        window = BOUND_WINDOW if isinstance(weight, ErrorBound) else VARIANCE_WINDOW
        share = (1 / self.batches.clamp(1, window)).to(self.variance.dtype)
        self.variance.lerp_(torch.where(finite, mean, self.variance), share)
        if isinstance(weight, ErrorBound):
            violation = (self.variance / weight.error).log().clamp(-1.0, 1.0)
            low, high = math.log(LEAST_WEIGHT), math.log(LARGEST_WEIGHT)
            self.log_weight.add_(BOUND_RATE * finite * violation).clamp_(low, high)


def _of_prior(model: Manifold, latents: tuple[Tensor, ...], gaussian: Tensor) -> Tensor:
    """Return log p(u), given log N(u)."""
    if model.prior is None:
        return gaussian
    return model.prior.log_prob(model.gather(latents)).to(gaussian.dtype)


def _log_normalizer(mask: Tensor, weight: Tensor | float, rho: Rho, delta: float) -> Tensor:
    """Return the log of the integral of exp(-w rho) over the masked pixels, a float64 scalar."""
    if isinstance(weight, Tensor):
        each = penalty_log_normalizer(rho, weight.double(), delta)
        return torch.where(mask, each, 0.0).sum()
    return mask.sum().double() * penalty_log_normalizer(rho, weight, delta)
