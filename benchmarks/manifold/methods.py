"""Methods to train a manifold flow: this package's, those of other papers, and baselines.

A method is a model and its training phases. Each phase takes a share of the CPU time that all
methods have. All methods of a comparison use the same flow, the same prior flow on its coordinates
and batches of the same size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.manifold.principal_components import PrincipalComponents
from benchmarks.manifold.training import Method, Phase
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
        less_noise: another, smaller standard deviation of v in denoising flows (None leaves out the
            method that needs it).
        volume: keyword arguments of `rectangular_loss` for the volume.
    """

    input_shape: tuple[int, ...]
    dim: int
    flow: Callable[[], Bijection]
    prior: Callable[[], Bijection]
    autoencoder: Callable[[bool], tuple[nn.Module, nn.Module]]
    deviation: float
    less_noise: float | None = None
    wide_flow: Callable[[], Bijection] | None = None
    training_data: Callable[[], Tensor] | None = None
    volume: Mapping[str, Any] = field(default_factory=dict)


# Each builder takes the networks, the weight of the reconstruction error, and a generator for the
# noise and the probes of the loss.


NORMAL = ManifoldObjective("latent", weight=1.0)  # v is standard normal, like u
CHART_SHARE = 0.85  # CPU time of the first flow of a hierarchy; the prior has the rest
FALL, FALL_SHARE = 10.0, 0.6  # a falling weight starts at FALL times its last value


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


def denoising_less(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """The same with less noise, which lowers the bound on its bits per dimension."""
    assert networks.less_noise is not None
    return denoising(replace(networks, deviation=networks.less_noise), weight, generator)


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


def calibrated(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """The penalized likelihood with w = 1 / variance of the errors, then a prior flow on u."""
    return _hierarchy(networks, ManifoldObjective("data", "l2", weight="variance"))


def falling(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """The penalized likelihood with a weight that falls to the given one, then a prior flow on u.

    As with `WeightSchedule`, every step multiplies the weight by the same factor, from FALL times
    the given weight at the start to the given weight after FALL_SHARE of the steps. The schedule
    follows the progress of the phase, because a method is built before its steps are known.
    """
    model = _two_stages(networks, ManifoldObjective("data", "l2", weight=1.0))

    def loss(x: Tensor, progress: float) -> Tensor:
        w = weight * FALL ** max(0.0, 1 - progress / FALL_SHARE)
        terms = model.terms(x, stage=0)
        return w * terms.penalty - terms.log_likelihood

    first = Phase(CHART_SHARE, model.stages[0], lambda x: model.initialize(x, 0), loss)
    return Method(model, [first, _prior_phase(model, 1 - CHART_SHARE)], 1.0)


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
    "denoising flow, less noise": Recipe(denoising_less, weighted=True),
    "rectangular flow": Recipe(rectangular, weighted=True),
    "free-form injective flow": Recipe(free_form, weighted=True),
    "penalized": Recipe(penalized, weighted=True),
    "penalized, hierarchy": Recipe(hierarchical, weighted=True),
    "calibrated weight, hierarchy": Recipe(calibrated),
    "falling weight, hierarchy": Recipe(falling, weighted=True),
    "error bound, hierarchy": Recipe(bounded, weighted=True),
}


def names(networks: Networks) -> list[str]:
    """Return the methods for which these networks have all parts."""
    missing: list[Any] = []
    if networks.wide_flow is None:
        missing += [plain_wide]
    if networks.training_data is None:
        missing += [components, components_with_prior]
    if networks.less_noise is None:
        missing += [denoising_less]
    return [name for name, recipe in RECIPES.items() if recipe.build not in missing]


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
    phases = [_objective_phase(model, CHART_SHARE), _prior_phase(model, 1 - CHART_SHARE)]
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
