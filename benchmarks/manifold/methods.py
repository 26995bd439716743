"""Methods to train a manifold flow: this package's, those of other papers, and baselines.

A method is a model and its training phases. Each phase takes a share of the CPU time that all
methods have. All methods of a comparison use the same flow, the same prior flow on its coordinates
and batches of the same size.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels import ErrorBound, HierarchicalFlow, ManifoldFlow, ManifoldObjective
from mflow_kernels.layers import Bijection
from mflow_kernels.models.peers import (
    Autoencoder,
    denoising_loss,
    free_form_loss,
    pie_loss,
    prior_loss,
    reconstruction_loss,
    rectangular_loss,
    warm_up,
)

Batches = Iterator[Tensor]
WARM_UP = 50  # steps in which the learning rate rises
FINAL_RATE = 0.02  # learning rate at the end of a phase, as a share of the highest one
TIMED_STEPS = 5  # steps that measure the cost of a step, after equally many to warm up
CURVE_POINTS = 6


@dataclass(frozen=True)
class Networks:
    """The networks of a comparison, the same for all methods.

    Attributes:
        input_shape, dim: shape of x without N; dimension of the manifolds.
        flow, wide_flow: build an invertible flow on x, and one with as many parameters as `flow`
            and `prior` together (None leaves out the method that needs it).
        prior: builds a flow on the coordinates.
        autoencoder: builds an encoder and a decoder with about as many parameters as `flow` or, if
            given True, as `flow` and `prior` together.
        training_data: draws data (M, *input_shape) to fit principal components (None leaves out
            the methods that need it).
        deviation: standard deviation of v in PIE and in denoising flows.
        volume: keyword arguments of `rectangular_loss` for the volume.
    """

    input_shape: tuple[int, ...]
    dim: int
    flow: Callable[[], Bijection]
    prior: Callable[[], Bijection]
    autoencoder: Callable[[bool], tuple[nn.Module, nn.Module]]
    deviation: float
    wide_flow: Callable[[], Bijection] | None = None
    training_data: Callable[[], Tensor] | None = None
    volume: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """Minimize `loss(x, progress)` (N,) over the parameters of `trained`.

    Attributes:
        share: share of the method's CPU time.
        initialize: sets the actnorms from the first batch.
        loss: progress rises from 0 to 1 during the phase.
    """

    share: float
    trained: nn.Module
    initialize: Callable[[Tensor], None]
    loss: Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Method:
    """A model and its training phases.

    Attributes:
        off_deviation: standard deviation of v under the model; None if the method does not learn
            the density of v, and so has no likelihood in the space of x.
        ambient: whether the model has a density in the space of x, so that its samples have v
            drawn.
    """

    model: HierarchicalFlow | Autoencoder
    phases: Sequence[Phase]
    off_deviation: float | None
    ambient: bool = False

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def sample(
        self, n: int, temperature: float, generator: torch.Generator, off: bool = False
    ) -> Tensor:
        """Draw n samples: on the manifold, or with v drawn as well if `off`."""
        if not off:
            return self.model.sample(n, temperature, generator)
        assert self.off_deviation is not None
        assert isinstance(self.model, HierarchicalFlow)
        first = self.model.stages[0]
        assert isinstance(first, ManifoldFlow)
        u = temperature * torch.randn(n, self.model.manifold_dim, generator=generator)
        for stage in reversed(list(self.model.stages)[1:]):
            u = stage.decode(u)  # type: ignore[operator]
        scale = temperature * self.off_deviation
        latents = tuple(
            z + scale * mask * torch.randn(z.shape, generator=generator)
            for z, mask in zip(first.scatter(u), first.off_masks(), strict=True)
        )
        return first.flow.inverse(latents)[0]


def train(
    method: Method,
    batches: Batches,
    steps: Sequence[int],
    rate: float,
    watch: Callable[[float], None] = lambda progress: None,
) -> float:
    """Train all phases with Adam, gradients clipped to norm 1; return the CPU seconds.

    In each phase the rate rises for WARM_UP steps and falls along a cosine. `watch(progress)` is
    called CURVE_POINTS times per training, and its time does not count.

    Args:
        steps: number of steps of each phase.
        rate: highest learning rate.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
    """
    seconds, done, watched = 0.0, 0, 0
    for phase, count in zip(method.phases, steps, strict=True):
        step = _stepper(phase, batches, rate, count)
        for i in range(count):
            started = time.process_time()
            step(i)
            seconds += time.process_time() - started
            done += 1
            if done * CURVE_POINTS >= (watched + 1) * sum(steps):
                watched += 1
                method.model.eval()
                with torch.no_grad():
                    watch(done / sum(steps))
                method.model.train()
    method.model.eval()
    return seconds


def step_seconds(method: Method, batches: Batches, rate: float) -> list[float]:
    """Return the CPU seconds of one step in each phase, as a mean over the phase."""
    costs = []
    for phase in method.phases:
        step = _stepper(phase, batches, rate, TIMED_STEPS)
        times = []
        for i in [*range(TIMED_STEPS), *range(TIMED_STEPS)]:
            started = time.process_time()
            step(i)
            times.append(time.process_time() - started)
        costs.append(statistics.fmean(times[TIMED_STEPS:]))
    return costs


def _stepper(phase: Phase, batches: Batches, rate: float, count: int) -> Callable[[int], None]:
    """Start a phase of `count` steps; return the function that makes step i."""
    phase.initialize(next(batches))
    # Gradients of other stages' parameters, if there are any, are ignored.
    parameters = list(phase.trained.parameters())
    optimizer = torch.optim.Adam(parameters, rate, fused=True)

    def step(i: int) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * i / count))
        falling = FINAL_RATE + (1 - FINAL_RATE) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate * min((i + 1) / WARM_UP, falling)
        loss = phase.loss(next(batches), (i + 0.5) / count).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if i % 50 == 0 and not math.isfinite(loss.item() + norm.item()):
            raise FloatingPointError(f"loss {loss.item()} at step {i} of {count}")
        optimizer.step()

    return step


# Each builder takes the networks, the weight of the reconstruction error, and a generator for the
# noise and the probes of the loss.


NORMAL = ManifoldObjective("latent", weight=1.0)  # v is standard normal, like u


def one_stage(flow: Bijection, dim: int, objective: ManifoldObjective) -> Method:
    """One manifold flow, trained with an objective."""
    model = HierarchicalFlow([ManifoldFlow(flow, dim, objective=objective)])
    phases = [_objective_phase(model, 1.0)]
    return Method(model, phases, _deviation(objective), ambient=objective is NORMAL)


def plain(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Maximum likelihood with standard normal latents (Glow, arXiv 1807.03039).

    The choice of u only affects projections and samples with v = 0.
    """
    return one_stage(networks.flow(), networks.dim, NORMAL)


def plain_wide(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Maximum likelihood of a flow with as many parameters as a flow and its prior."""
    assert networks.wide_flow is not None
    return one_stage(networks.wide_flow(), networks.dim, NORMAL)


def plain_with_prior(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Maximum likelihood, then a prior flow on u: the hierarchy without the penalty."""
    return _hierarchy(networks, NORMAL)


def pie(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """PIE (arXiv 2111.00619) with a prior flow on u, trained with the first flow."""
    model = _two_stages(networks, _gaussian(networks))
    return _joint(model, lambda x, progress: pie_loss(model, x), networks.deviation)


def two_phases(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """M-flow (arXiv 2003.13913): the manifold by reconstruction, then the prior by likelihood."""
    model = _two_stages(networks, ManifoldObjective())
    first = model.stages[0]
    chart = Phase(
        0.6, first, lambda x: model.initialize(x, 0), lambda x, _: reconstruction_loss(model, x)
    )
    return Method(model, [chart, _prior_phase(model, 0.4)], None)


def denoising(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Denoising flow (Horvat and Pfister, NeurIPS 2021) with a prior flow on u."""
    model = _two_stages(networks, _gaussian(networks))
    return _joint(
        model, lambda x, _: denoising_loss(model, x, weight, generator), networks.deviation
    )


def rectangular(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Rectangular flow (arXiv 2106.01413) with a prior flow on u and a likelihood warm-up."""
    model = _two_stages(networks, ManifoldObjective())

    def loss(x: Tensor, progress: float) -> Tensor:
        likelihood = warm_up(progress, 0.25, 0.5)
        return rectangular_loss(
            model, x, weight, likelihood=likelihood, generator=generator, **networks.volume
        )

    return _joint(model, loss, None)


def free_form(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Free-form injective flow (arXiv 2306.01843) with a standard normal code, as in the paper."""
    model = Autoencoder(*networks.autoencoder(True), networks.input_shape, networks.dim)
    return _joint(model, lambda x, _: free_form_loss(model, x, weight, generator=generator), None)


def autoencoder(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """An autoencoder by reconstruction, then a prior flow on its code."""
    prior = ManifoldFlow(networks.prior(), networks.dim)
    model = Autoencoder(*networks.autoencoder(False), networks.input_shape, networks.dim, prior)
    networks_of_x = nn.ModuleList([model.encoder, model.decoder])
    chart = Phase(0.6, networks_of_x, lambda x: None, lambda x, _: reconstruction_loss(model, x))
    return Method(model, [chart, _prior_phase(model, 0.4)], None)


def components(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Probabilistic principal components (Tipping and Bishop 1999): a linear manifold."""
    return Method(HierarchicalFlow([_components(networks)]), [], 1.0)


def components_with_prior(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """Principal components, then a prior flow on them."""
    prior = ManifoldFlow(networks.prior(), networks.dim)
    model = HierarchicalFlow([_components(networks), prior])
    return Method(model, [_prior_phase(model, 1.0)], 1.0)


def penalized(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """The penalized likelihood (arXiv 2206.03293) without a hierarchy."""
    objective = ManifoldObjective("data", "l2", weight=weight)
    return one_stage(networks.flow(), networks.dim, objective)


def hierarchical(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """The penalized likelihood, then a prior flow on u while the first flow is frozen."""
    return _hierarchy(networks, ManifoldObjective("data", "l2", weight=weight))


def bounded(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """The likelihood with a bound of 1 / weight on the mean squared error, then a prior flow.

    Training finds the weight that keeps the bound; it starts at the given one.
    """
    return _hierarchy(networks, ManifoldObjective("data", "l2", weight=ErrorBound(1 / weight)))


@dataclass(frozen=True)
class Recipe:
    """How a method is built.

    Attributes:
        weighted: whether it has a weight to choose.
        by_likelihood: whether it maximizes only the likelihood in the space of x.
    """

    build: Callable[[Networks, float, torch.Generator], Method]
    weighted: bool = False
    by_likelihood: bool = False


RECIPES = {
    "principal components, Gaussian": Recipe(components),
    "principal components, prior flow": Recipe(components_with_prior),
    "autoencoder, prior flow": Recipe(autoencoder),
    "plain likelihood": Recipe(plain, by_likelihood=True),
    "plain likelihood, wider flow": Recipe(plain_wide, by_likelihood=True),
    "plain likelihood, prior flow": Recipe(plain_with_prior, by_likelihood=True),
    "PIE": Recipe(pie),
    "M-flow": Recipe(two_phases),
    "denoising flow": Recipe(denoising, weighted=True),
    "rectangular flow": Recipe(rectangular, weighted=True),
    "free-form injective flow": Recipe(free_form, weighted=True),
    "penalized": Recipe(penalized, weighted=True),
    "penalized, hierarchy": Recipe(hierarchical, weighted=True),
    "error bound, hierarchy": Recipe(bounded, weighted=True),
}


def names(networks: Networks) -> list[str]:
    """Return the methods for which these networks have all parts."""
    missing: list[Any] = []
    if networks.wide_flow is None:
        missing += [plain_wide]
    if networks.training_data is None:
        missing += [components, components_with_prior]
    return [name for name, recipe in RECIPES.items() if recipe.build not in missing]


class PrincipalComponents(Bijection):
    """The linear flow to whitened principal components, in one latent (D,), largest last.

    The smallest D - d components share one variance, their mean, as in probabilistic principal
    component analysis.

    Args:
        x: data (M, *input_shape) to fit.
        dim: d.
    """

    def __init__(self, x: Tensor, dim: int) -> None:
        super().__init__()
        self.input_shape: tuple[int, ...] = tuple(x.shape[1:])
        self.latent_shapes: tuple[tuple[int, ...], ...] = ((x[0].numel(),),)
        flat = x.flatten(1).double()
        variances, axes = torch.linalg.eigh(flat.T.cov())  # in ascending order
        off = len(variances) - dim
        variances[:off] = variances[:off].mean()
        scale = variances.sqrt()
        self.register_buffer("mean", flat.mean(0).float())
        self.register_buffer("inward", (axes / scale).float())  # x to latents
        self.register_buffer("rest", (axes * scale)[:, :off].float())
        self.components = nn.Parameter((axes * scale)[:, off:].float(), requires_grad=False)
        self.logdet = -scale.log().sum().item()

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        z = (x.flatten(1) - self.mean) @ self.inward  # type: ignore[operator]
        return (z,), torch.full_like(z[:, 0], self.logdet)

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        outward = torch.cat([self.rest, self.components], 1)  # type: ignore[list-item]
        x = (z[0] @ outward.T + self.mean).unflatten(1, self.input_shape)  # type: ignore[operator]
        return x, torch.full_like(z[0][:, 0], -self.logdet)


def _components(networks: Networks) -> ManifoldFlow:
    assert networks.training_data is not None
    flow = PrincipalComponents(networks.training_data(), networks.dim)
    return ManifoldFlow(flow, networks.dim, objective=NORMAL)


def _gaussian(networks: Networks) -> ManifoldObjective:
    return ManifoldObjective("latent", "l2", weight=networks.deviation**-2)


def _two_stages(networks: Networks, objective: ManifoldObjective) -> HierarchicalFlow:
    first = ManifoldFlow(networks.flow(), networks.dim, objective=objective)
    return HierarchicalFlow([first, ManifoldFlow(networks.prior(), networks.dim)])


def _hierarchy(networks: Networks, objective: ManifoldObjective) -> Method:
    model = _two_stages(networks, objective)
    phases = [_objective_phase(model, 0.85), _prior_phase(model, 0.15)]
    return Method(model, phases, _deviation(objective), ambient=objective is NORMAL)


def _deviation(objective: ManifoldObjective) -> float:
    """Return the standard deviation of v; if rho is not l2, of the Gaussian with the same w."""
    if objective.domain == "data":
        return objective.sigma
    assert isinstance(objective.weight, float)
    return objective.weight**-0.5


def _objective_phase(model: HierarchicalFlow, share: float) -> Phase:
    return Phase(
        share,
        model.stages[0],
        lambda x: model.initialize(x, 0),
        lambda x, progress: model.terms(x, stage=0).loss,
    )


def _prior_phase(model: HierarchicalFlow | Autoencoder, share: float) -> Phase:
    prior = model.prior if isinstance(model, Autoencoder) else model.stages[1]
    assert isinstance(prior, ManifoldFlow)

    @torch.no_grad()
    def initialize(x: Tensor) -> None:
        prior.initialize(model.encode(x, stages=1))

    return Phase(share, prior, initialize, lambda x, progress: prior_loss(model, x))


def _joint(
    model: HierarchicalFlow | Autoencoder,
    loss: Callable[[Tensor, float], Tensor],
    off_deviation: float | None,
) -> Method:
    """Train all parts at once."""

    def initialize(x: Tensor) -> None:
        if isinstance(model, HierarchicalFlow):
            for stage in range(len(model.stages)):
                model.initialize(x, stage)

    return Method(model, [Phase(1.0, model, initialize, loss)], off_deviation)
