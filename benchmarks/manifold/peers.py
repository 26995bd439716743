r"""Training losses of other manifold flows, to compare with the penalized likelihood.

A model has a chart, from x to a code of d numbers and back, and a prior flow h on the code:

- `HierarchicalFlow([first, prior])`, if the chart is an invertible flow. `first` and `prior` are
  manifold flows; the code is u of `first`, and `prior` keeps all d dimensions.
- `Autoencoder`, if the chart is any pair of networks.

method                    source                              losses
PIE                       Beitler et al., arXiv 2111.00619    pie_loss
M-flow, two phases        Brehmer, Cranmer, arXiv 2003.13913  reconstruction_loss, prior_loss
denoising flow            Horvat, Pfister, NeurIPS 2021       denoising_loss
rectangular flow          Caterini et al., arXiv 2106.01413   rectangular_loss
free-form injective flow  Sorrenson et al., arXiv 2306.01843  free_form_loss
VAE                       Kingma, Welling, arXiv 1312.6114    VariationalAutoencoder.loss

Each loss is (N,), one number per sample, in nats up to a constant. The reconstruction error of a
sample is |x - g(f(x))|^2, with f the encoder and g the decoder. A loss with a `weight` contains it
as weight / 2 |x - g(f(x))|^2, the `l2` penalty of `ManifoldObjective`.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from mflow_kernels.layers.flow import Context, given
from mflow_kernels.models.chart import Chart, normal_score
from mflow_kernels.models.hierarchy import HierarchicalFlow
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.mixture import GaussianMixture
from mflow_kernels.models.penalty_weight import check_positive
from mflow_kernels.models.volume import Method, log_volume, push_forward
from mflow_kernels.ops.checks import check_count


class Autoencoder(Chart):
    """A pair of free networks as a chart, with an optional prior flow on the code.

    It has no density in the space of x, so `log_prob` raises NotImplementedError. As in
    `HierarchicalFlow`, `stages=1` leaves out the prior.

    Args:
        encoder: maps x (N, *input_shape) to the code (N, d).
        decoder: maps a code (N, d) to x.
        input_shape: shape of x without N.
        manifold_dim: d.
        prior: manifold flow on the code that keeps all d dimensions; None for a standard normal
            code.

    Raises:
        ValueError: the prior does not map d dimensions to d dimensions.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: tuple[int, ...],
        manifold_dim: int,
        prior: ManifoldFlow | None = None,
    ) -> None:
        super().__init__()
        check_count("manifold_dim", manifold_dim, 1, math.prod(input_shape))
        if prior is not None:
            dims = (*prior.input_shape, prior.manifold_dim)
            if dims != (manifold_dim, manifold_dim):
                raise ValueError(
                    f"prior: expected a flow from {manifold_dim} to {manifold_dim} dimensions, "
                    f"got one from {tuple(prior.input_shape)} to {prior.manifold_dim}"
                )
        self.encoder, self.decoder, self.prior_flow = encoder, decoder, prior
        self.input_shape, self.manifold_dim = input_shape, manifold_dim

    @property
    def prior(self) -> GaussianMixture | None:  # type: ignore[override]
        """The density of u at the end of the prior flow; see `Chart`."""
        return None if self.prior_flow is None else self.prior_flow.prior

    def encode(
        self, x: Tensor, *, stages: int | None = None, context: Context | None = None
    ) -> Tensor:
        """Return the coordinates u (N, d) of x; with `stages=1`, the code before the prior."""
        code = self._code(x, context)
        prior = None if stages == 1 else self.prior_flow
        return code if prior is None else prior.encode(code, context=context)

    def decode(
        self, u: Tensor, *, stages: int | None = None, context: Context | None = None
    ) -> Tensor:
        """Return the point with coordinates u (N, d); with `stages=1`, u is the code."""
        prior = None if stages == 1 else self.prior_flow
        code = u if prior is None else prior.decode(u, context=context)
        return self._point(code, context)

    def _code(self, x: Tensor, context: Context | None) -> Tensor:
        """Return the code (N, d) of x, before the prior."""
        return self.encoder(x, *given(context, x, self.encoder))

    def _point(self, code: Tensor, context: Context | None) -> Tensor:
        """Return the x of a code (N, d)."""
        return self.decoder(code, *given(context, code, self.decoder))


class VariationalAutoencoder(Autoencoder):
    """An autoencoder with q(code | x) and p(x | code), Gaussians with a deviation for each number.

    Args:
        encoder: maps x (N, *input_shape) to the means and log-deviations of the code, (N, 2 d).
        decoder: maps a code (N, d) to means and log-deviations, stacked along the channels of x.
        samples: codes drawn for each x by `log_prob`.
        input_shape, manifold_dim, prior: as for `Autoencoder`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: tuple[int, ...],
        manifold_dim: int,
        prior: ManifoldFlow | None = None,
        samples: int = 64,
    ) -> None:
        super().__init__(encoder, decoder, input_shape, manifold_dim, prior)
        check_count("samples", samples, 1)
        self.samples = samples

    def _code(self, x: Tensor, context: Context | None) -> Tensor:
        """Return the mean of q(code | x)."""
        return _normal(self.encoder(x)).mean

    def _point(self, code: Tensor, context: Context | None) -> Tensor:
        """Return the mean of p(x | code)."""
        return _normal(self.decoder(code)).mean

    def lift(
        self,
        u: Tensor,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw x from p(x | code), with its deviation scaled; return x and log p(x | code) (N,)."""
        given = _normal(self.decoder(u if self.prior_flow is None else self.prior_flow.decode(u)))
        noise = torch.randn(given.mean.shape, generator=generator)
        x = given.mean + temperature * given.stddev * noise
        return x, given.log_prob(x).flatten(1).sum(1)

    def loss(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        likelihood: float = 1.0,
        weight: float = 400.0,
    ) -> Tensor:
        """Return minus the evidence lower bound (N,) with N(0, I) as the density of the code.

        The loss is likelihood times that, plus (1 - likelihood) weight / 2 |x - mean|^2. Without a
        start of this kind, the deviations of dark pixels shrink before the means are learnt, and
        training stays at a large error.
        """
        code, log_q = self.draw(x, generator)
        given = _normal(self.decoder(code))
        bound = given.log_prob(x).flatten(1).sum(1) - log_q - normal_score(code)
        error = _squared_error(x, given.mean)
        return (1 - likelihood) * weight / 2 * error - likelihood * bound

    @torch.no_grad()
    def log_prob(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return a lower bound of log p(x) (N,), by importance weighting.

        It is log 1/K sum_k p(x | c_k) p(c_k) / q(c_k | x) for K = `samples` codes c_k from
        q(code | x) (Burda et al., arXiv 1509.00519). They are the same in every call.
        """
        generator = torch.Generator().manual_seed(0)
        logs = []
        for _ in range(self.samples):
            code, log_q = self.draw(x, generator)
            likelihood = _normal(self.decoder(code)).log_prob(x).flatten(1).sum(1)
            logs.append(likelihood + _log_prior(self, code) - log_q)
        return torch.stack(logs).logsumexp(0) - math.log(self.samples)

    def draw(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw codes from q(code | x), and return them with log q (N,)."""
        given = _normal(self.encoder(x))
        code = given.mean + given.stddev * torch.randn(given.mean.shape, generator=generator)
        return code, given.log_prob(code).sum(1)


def _normal(numbers: Tensor) -> Normal:
    """Return the Gaussian of means and log-deviations, without overflow."""
    mean, log_deviation = numbers.chunk(2, 1)
    return Normal(mean, log_deviation.clamp(-8.0, 4.0).exp(), validate_args=False)


Model = HierarchicalFlow | Autoencoder


def reconstruction_loss(model: Model, x: Tensor) -> Tensor:
    """Return |x - g(f(x))|^2 (N,): the first phase of M-flow, or the loss of an autoencoder."""
    return _squared_error(x, model.decode(model.encode(x, stages=1), stages=1))


def prior_loss(model: Model, code: Tensor) -> Tensor:
    """Return -log p(code) (N,), the second phase of M-flow.

    The volume of the chart is left out: it does not depend on the prior.
    """
    return -_log_prior(model, code)


def pie_loss(model: HierarchicalFlow, x: Tensor) -> Tensor:
    """Return -log p(x) (N,), where v is Gaussian with a small deviation (PIE).

    The first stage's objective sets the deviation: `ManifoldObjective("latent", "l2",
    weight=deviation**-2)`. With a prior flow on u, this is the PIE of the M-flow paper.

    Raises:
        ValueError: the first stage has another objective.
    """
    _deviation(model)
    return -model.log_prob(x)


def denoising_loss(
    model: HierarchicalFlow, x: Tensor, weight: float, generator: torch.Generator | None = None
) -> Tensor:
    """Return the loss (N,) of a denoising flow.

    It is -log p(x + e) + weight / 2 |x - g(f(x + e))|^2 with e ~ N(0, s^2). The deviation s of the
    noise is also that of v, so the first stage's objective sets it; see `pie_loss`.

    Args:
        weight: weight of the reconstruction of x from x + e, > 0.
        generator: generator for the noise, on the model's device.

    Raises:
        ValueError: the first stage has another objective, or the weight is not positive.
    """
    check_positive("weight", weight)
    s = _deviation(model)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    noisy = x + s * noise
    first = cast(ManifoldFlow, model.stages[0])
    latents, logdet = first.latents(noisy)
    code = first.gather(latents)
    off = first.objective.off_density(first, latents)
    error = _squared_error(x, model.decode(code, stages=1))
    return weight / 2 * error - (_log_prior(model, code) + off + logdet)


def rectangular_loss(
    model: Model,
    x: Tensor,
    weight: float,
    *,
    likelihood: float = 1.0,
    volume_samples: int | None = None,
    method: Method = "hutchinson",
    probes: int = 2,
    iterations: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the loss (N,) of a rectangular flow.

    It is weight / 2 |x - g(f(x))|^2 - likelihood (log p(code) - 1/2 log det J^T J), where J is the
    Jacobian of the decoder at the code.

    Args:
        weight: weight of the reconstruction error, > 0.
        likelihood: factor of the likelihood, from 0 to 1. With 0 the volume is not computed. The
            authors' image runs raise it from 0 to 1 early in training; see `warm_up`.
        volume_samples: number of samples of the batch whose volume is computed, or None for all.
            These are the first ones, and their volumes count N / volume_samples times, so that the
            mean over a batch in random order stays unbiased. (This saving is not in the paper.)
        method, probes, iterations, generator: how the volume is computed, as for
            `Chart.manifold_log_prob`. The authors use one probe and a tolerance at which conjugate
            gradients stop after few steps.

    Raises:
        ValueError: a number is out of range.
    """
    check_positive("weight", weight)
    if not 0 <= likelihood <= 1:
        raise ValueError(f"likelihood: expected a number from 0 to 1, got {likelihood}")
    code = model.encode(x, stages=1)
    loss = weight / 2 * _squared_error(x, model.decode(code, stages=1))
    if not likelihood:
        return loss
    n = len(x)
    chosen = n if volume_samples is None else volume_samples
    check_count("volume_samples", chosen, 1, n)
    volume = log_volume(
        lambda u: model.decode(u, stages=1),
        code[:chosen],
        math.prod(model.input_shape),
        method,
        probes=probes,
        iterations=iterations,
        generator=generator,
    ).value
    volumes = nn.functional.pad(volume * (n / chosen), (0, n - chosen))
    return loss - likelihood * (_log_prior(model, code) - volumes)


def free_form_loss(
    model: Autoencoder,
    x: Tensor,
    weight: float,
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the loss (N,) of a free-form injective flow.

    The loss to minimize is weight / 2 |x - g(f(x))|^2 - log p(code) - 1/2 log det F F^T, where F is
    the Jacobian of the encoder at x. Its volume term has the gradient of trace(F G), where G is the
    constant pseudoinverse of F. The authors take the decoder's Jacobian for G and estimate the
    trace by probes: E[v^T F G v] with E[v v^T] = I. They evaluate F at x and not at the projection,
    because otherwise training would bend the manifold without bound.

    Only the gradient of the volume term is computed: the term adds 0 to the value of the loss.

    Args:
        weight: weight of the reconstruction error, > 0.
        probes: number of Rademacher vectors v per sample, at least 1.
        generator: generator for the probes, on the model's device.

    Raises:
        ValueError: a number is out of range.
    """
    check_positive("weight", weight)
    check_count("probes", probes, 1)
    code = model.encode(x, stages=1)
    volume = torch.zeros_like(code[:, 0])
    for _ in range(probes):
        bits = torch.randint(0, 2, code.shape, generator=generator, device=code.device)
        v = (2 * bits - 1).to(code.dtype)
        with torch.no_grad():
            direction = push_forward(model.decoder, code, v).view_as(x)
        volume = volume + (push_forward(model.encoder, x, direction) * v).sum(1) / probes
    error = _squared_error(x, model.decode(code, stages=1))
    return weight / 2 * error - _log_prior(model, code) - (volume - volume.detach())


def warm_up(progress: float, start: float, end: float) -> float:
    """Return 0 up to `start`, 1 from `end` on, and a straight line between.

    Rectangular flows and VAEs multiply their likelihood by this factor. `progress` is the fraction
    of training that is done.
    """
    return min(1.0, max(0.0, (progress - start) / (end - start)))


def _squared_error(x: Tensor, other: Tensor) -> Tensor:
    return (x - other).flatten(1).square().sum(1)


def _log_prior(model: Model, code: Tensor) -> Tensor:
    """Return log p(code) (N,) under the prior flow, or under N(0, I) if there is none."""
    if isinstance(model, Autoencoder):
        priors = [] if model.prior_flow is None else [model.prior_flow]
    else:
        priors = cast(list[ManifoldFlow], list(model.stages)[1:])
    if not priors:
        return -normal_score(code)
    return HierarchicalFlow(priors).log_prob(code)


def _deviation(model: HierarchicalFlow) -> float:
    """Return the deviation of v under the first stage's objective, which must be PIE's."""
    objective = cast(ManifoldFlow, model.stages[0]).objective
    gaussian = (objective.domain, objective.rho) == ("latent", "l2")
    if not gaussian or not isinstance(objective.weight, float):
        raise ValueError(
            "model: expected a first stage with ManifoldObjective('latent', 'l2', weight=a number),"
            f" got {objective}"
        )
    return objective.weight**-0.5
