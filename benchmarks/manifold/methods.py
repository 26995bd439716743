"""Methods to train a manifold flow: this package's, those of other papers, and baselines.

A method is a model and its training phases. Each phase takes a share of the CPU time that all
methods have. All methods of a comparison use the same flow, the same prior flow on its coordinates
and batches of the same size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.manifold.peers import (
    Autoencoder,
    denoising_loss,
    free_form_loss,
    pie_loss,
    prior_loss,
    reconstruction_loss,
    rectangular_loss,
    warm_up,
)
from benchmarks.manifold.principal_components import PrincipalComponents
from benchmarks.manifold.training import Loss, Method, Phase
from mflow_kernels import ErrorBound, HierarchicalFlow, ManifoldFlow, ManifoldObjective
from mflow_kernels.layers import Bijection


@dataclass(frozen=True)
class Networks:
    """The networks of a comparison, the same for all methods.

    A comparison leaves out the methods that need a field which is None.

    Attributes:
        input_shape, dim: shape of x without N; dimension of the manifolds.
        flow, wide_flow: build an invertible flow on x, and one with as many parameters as `flow`
            and `prior` together.
        prior: builds a flow on the coordinates.
        autoencoder: builds an encoder and a decoder with about as many parameters as `flow` or, if
            given True, as `flow` and `prior` together.
        training_data: draws data (M, *input_shape) to fit principal components.
        deviation: standard deviation of v in PIE and in denoising flows.
        less_noise: another, smaller standard deviation of v in denoising flows.
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


NORMAL = ManifoldObjective("latent", weight=1.0)  # v is standard normal, like u
CHART_SHARE = 0.85  # CPU time of the first flow of a hierarchy; the prior has the rest
FALL, FALL_SHARE = 10.0, 0.6  # a falling weight starts at FALL times its last value


def one_stage(flow: Bijection, dim: int, objective: ManifoldObjective) -> Method:
    """Train one manifold flow with an objective."""
    model = HierarchicalFlow([ManifoldFlow(flow, dim, objective=objective)])
    phases = [_first_phase(model, 1.0, _objective(model))]
    return Method(model, phases, _deviation(objective), ambient=objective is NORMAL)


def hierarchy(networks: Networks, objective: ManifoldObjective) -> Method:
    """Train a manifold flow with an objective, then a prior flow on its u."""
    model = _two_stages(networks, objective)
    first = _first_phase(model, CHART_SHARE, _objective(model))
    phases = [first, _prior_phase(model, 1 - CHART_SHARE)]
    return Method(model, phases, _deviation(objective), ambient=objective is NORMAL)


def pie(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(networks, _gaussian(networks.deviation))
    return _joint(model, lambda x, _: pie_loss(model, x), networks.deviation)


def two_phases(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(networks, ManifoldObjective())
    chart = _first_phase(model, 0.6, lambda x, _: reconstruction_loss(model, x))
    return Method(model, [chart, _prior_phase(model, 0.4)], None)


def denoising(
    networks: Networks, weight: float, generator: torch.Generator, deviation: float
) -> Method:
    model = _two_stages(networks, _gaussian(deviation))
    return _joint(model, lambda x, _: denoising_loss(model, x, weight, generator), deviation)


def rectangular(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(networks, ManifoldObjective())

    def loss(x: Tensor, progress: float) -> Tensor:
        likelihood = warm_up(progress, 0.25, 0.5)
        return rectangular_loss(
            model, x, weight, likelihood=likelihood, generator=generator, **networks.volume
        )

    return _joint(model, loss, None)


def free_form(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = Autoencoder(*networks.autoencoder(True), networks.input_shape, networks.dim)
    return _joint(model, lambda x, _: free_form_loss(model, x, weight, generator=generator), None)


def autoencoder(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    prior = ManifoldFlow(networks.prior(), networks.dim)
    model = Autoencoder(*networks.autoencoder(False), networks.input_shape, networks.dim, prior)
    networks_of_x = nn.ModuleList([model.encoder, model.decoder])
    chart = Phase(0.6, networks_of_x, lambda x: None, lambda x, _: reconstruction_loss(model, x))
    return Method(model, [chart, _prior_phase(model, 0.4)], None)


def components(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    return Method(HierarchicalFlow([_components(networks)]), [], 1.0)


def components_with_prior(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    prior = ManifoldFlow(networks.prior(), networks.dim)
    model = HierarchicalFlow([_components(networks), prior])
    return Method(model, [_prior_phase(model, 1.0)], 1.0)


def falling(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    """The penalized likelihood with a weight that falls to the given one, then a prior flow on u.

    As with `WeightSchedule`, every step multiplies the weight by the same factor, from FALL times
    the given weight at the start to the given weight after FALL_SHARE of the steps. The schedule
    follows the progress of the phase, because a method is built before its steps are known.
    """
    model = _two_stages(networks, _penalty(1.0))

    def loss(x: Tensor, progress: float) -> Tensor:
        w = weight * FALL ** max(0.0, 1 - progress / FALL_SHARE)
        terms = model.terms(x, stage=0)
        return w * terms.penalty - terms.log_likelihood

    phases = [_first_phase(model, CHART_SHARE, loss), _prior_phase(model, 1 - CHART_SHARE)]
    return Method(model, phases, 1.0)


@dataclass(frozen=True)
class Recipe:
    """How a method is built and drawn.

    Attributes:
        build: takes the networks, the weight of the reconstruction error, and a generator for the
            noise and the probes of the loss.
        colour, marker: in all pictures. Baselines are grey, plain flows blue, and every form of the
            penalized likelihood is red; no other method is.
        short: name that fits beside a row of images, if the method's own is too long.
        weighted: whether it has a weight to choose.
        by_likelihood: whether it maximizes only the likelihood in the space of x.
        needs: field of `Networks` without which a comparison leaves the method out.
    """

    build: Callable[[Networks, float, torch.Generator], Method]
    colour: str
    marker: str
    short: str = ""
    weighted: bool = False
    by_likelihood: bool = False
    needs: str = ""


RECIPES = {
    # Probabilistic principal components (Tipping and Bishop 1999): a linear manifold.
    "principal components, Gaussian": Recipe(components, "0.6", "s", "PCA", needs="training_data"),
    "principal components, prior flow": Recipe(
        components_with_prior, "0.4", "D", "PCA, prior", needs="training_data"),
    # An autoencoder by reconstruction, then a prior flow on its code.
    "autoencoder, prior flow": Recipe(autoencoder, "0.2", "^", "autoencoder, prior"),
    # Maximum likelihood with standard normal latents (Glow, arXiv 1807.03039). The choice of u only
    # affects projections and samples with v = 0.
    "plain likelihood": Recipe(
        lambda networks, *_: one_stage(networks.flow(), networks.dim, NORMAL),
        "tab:blue", "o", "plain", by_likelihood=True),
    "plain likelihood, wider flow": Recipe(
        lambda networks, *_: one_stage(networks.wide_flow(), networks.dim, NORMAL),
        "tab:blue", "s", "plain, wider", by_likelihood=True, needs="wide_flow"),
    # The hierarchy without the penalty.
    "plain likelihood, prior flow": Recipe(
        lambda networks, *_: hierarchy(networks, NORMAL),
        "tab:cyan", "D", "plain, prior", by_likelihood=True),
    # arXiv 2111.00619, with a prior flow on u that is trained with the first flow.
    "PIE": Recipe(pie, "tab:olive", "v"),
    # arXiv 2003.13913: the manifold by reconstruction, then the prior by likelihood.
    "M-flow": Recipe(two_phases, "gold", "^"),
    # Horvat and Pfister, NeurIPS 2021, with a prior flow on u. Less noise lowers the bound on its
    # bits per dimension.
    "denoising flow": Recipe(
        lambda networks, *rest: denoising(networks, *rest, networks.deviation),
        "tab:green", "<", weighted=True),
    "denoising flow, less noise": Recipe(
        lambda networks, *rest: denoising(networks, *rest, networks.less_noise),
        "limegreen", "<", weighted=True, needs="less_noise"),
    # arXiv 2106.01413, with a prior flow on u and a likelihood that is warmed up.
    "rectangular flow": Recipe(rectangular, "tab:brown", ">", weighted=True),
    # arXiv 2306.01843, with a standard normal code as in the paper.
    "free-form injective flow": Recipe(free_form, "tab:purple", "P", "free-form", weighted=True),
    # The penalized likelihood (arXiv 2206.03293), alone and followed by a prior flow on u.
    "penalized": Recipe(
        lambda networks, weight, _: one_stage(networks.flow(), networks.dim, _penalty(weight)),
        "salmon", "X", weighted=True),
    "penalized, hierarchy": Recipe(
        lambda networks, weight, _: hierarchy(networks, _penalty(weight)),
        "tab:red", "*", "pen., hierarchy", weighted=True),
    # w = 1 / variance of the errors.
    "calibrated weight, hierarchy": Recipe(
        lambda networks, *_: hierarchy(networks, _penalty("variance")),
        "lightcoral", "h", "calibrated, hierarchy"),
    "falling weight, hierarchy": Recipe(
        falling, "tomato", "d", "falling, hierarchy", weighted=True),
    # The mean squared error is at most 1 / weight. Training finds the weight of the penalty that
    # keeps this bound; it starts at the given one.
    "error bound, hierarchy": Recipe(
        lambda networks, weight, _: hierarchy(networks, _penalty(ErrorBound(1 / weight))),
        "darkred", "p", "bound, hierarchy", weighted=True),
}  # fmt: skip


def names(networks: Networks) -> list[str]:
    """Return the methods for which these networks have all parts."""
    return [
        n for n, recipe in RECIPES.items() if not recipe.needs or getattr(networks, recipe.needs)
    ]


def _components(networks: Networks) -> ManifoldFlow:
    flow = PrincipalComponents(networks.training_data(), networks.dim)
    return ManifoldFlow(flow, networks.dim, objective=NORMAL)


def _gaussian(deviation: float) -> ManifoldObjective:
    return ManifoldObjective("latent", "l2", weight=deviation**-2)


def _penalty(weight: float | Literal["variance"] | ErrorBound) -> ManifoldObjective:
    return ManifoldObjective("data", "l2", weight=weight)


def _two_stages(networks: Networks, objective: ManifoldObjective) -> HierarchicalFlow:
    first = ManifoldFlow(networks.flow(), networks.dim, objective=objective)
    return HierarchicalFlow([first, ManifoldFlow(networks.prior(), networks.dim)])


def _deviation(objective: ManifoldObjective) -> float:
    """Return the standard deviation of v; if rho is not l2, of the Gaussian with the same w."""
    if objective.domain == "data":
        return objective.sigma
    assert isinstance(objective.weight, float)
    return objective.weight**-0.5


def _objective(model: HierarchicalFlow) -> Loss:
    return lambda x, progress: model.terms(x, stage=0).loss


def _first_phase(model: HierarchicalFlow, share: float, loss: Loss) -> Phase:
    return Phase(share, model.stages[0], lambda x: model.initialize(x, stage=0), loss)


def _prior_phase(model: HierarchicalFlow | Autoencoder, share: float) -> Phase:
    prior = model.prior_flow if isinstance(model, Autoencoder) else model.stages[1]
    assert isinstance(prior, ManifoldFlow)

    @torch.no_grad()
    def initialize(x: Tensor) -> None:
        prior.initialize(model.encode(x, stages=1))

    return Phase(share, prior, initialize, lambda x, progress: prior_loss(model, x))


def _joint(
    model: HierarchicalFlow | Autoencoder, loss: Loss, off_deviation: float | None
) -> Method:
    """Train all parts at once."""

    def initialize(x: Tensor) -> None:
        if isinstance(model, HierarchicalFlow):
            for stage in range(len(model.stages)):
                model.initialize(x, stage=stage)

    return Method(model, [Phase(1.0, model, initialize, loss)], off_deviation)
