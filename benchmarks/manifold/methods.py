"""Methods to train a manifold flow: this package's, those of other papers, and baselines.

A method is a model and its training phases. Each phase takes a share of the CPU time that all
methods have. All methods use the same networks and batches of the same size; the names of those
over another flow than Glow say which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.manifold import networks
from benchmarks.manifold.networks import CHANNELS, COMPONENTS, DIM, MORE_CHANNELS, SHAPE
from benchmarks.manifold.peers import (
    Autoencoder,
    Model,
    VariationalAutoencoder,
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
from mflow_kernels import (
    ErrorBound,
    GaussianMixture,
    HierarchicalFlow,
    ManifoldFlow,
    ManifoldObjective,
)
from mflow_kernels.layers import Bijection

NORMAL = ManifoldObjective("latent", weight=1.0)  # v is standard normal, like u
WEIGHT = 400.0  # of the penalty
CHART_SHARE = 0.85  # CPU time of a chart that is trained before its prior, which has the rest
FALL, FALL_SHARE = 10.0, 0.6  # a falling weight starts at FALL times its last value
DEVIATION, LESS_NOISE = 0.1, 0.02  # standard deviations of v in PIE and denoising flows
VOLUME: dict[str, Any] = {"volume_samples": 8, "probes": 2, "iterations": 8}  # rectangular flows'


def one_stage(flow: Bijection, dim: int, objective: ManifoldObjective) -> Method:
    """Train one manifold flow with an objective."""
    model = HierarchicalFlow([ManifoldFlow(flow, dim, objective=objective)])
    phase = _chart_phase(model, 1.0, _objective(model))
    return Method(model, [phase], density=True, ambient=objective is NORMAL)


def hierarchy(
    data: Tensor,
    objective: ManifoldObjective,
    flow: Bijection | None = None,
    prior: Bijection | None = None,
) -> Method:
    """Train a manifold flow with an objective, then a prior flow on its u."""
    model = _two_stages(objective, flow, prior)
    return _in_turn(model, data, _objective(model), density=True, ambient=objective is NORMAL)


def pie(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(_gaussian(DEVIATION))
    return _joint(model, data, lambda x, _: pie_loss(model, x), density=True)


def two_phases(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(ManifoldObjective())
    return _in_turn(model, data, lambda x, _: reconstruction_loss(model, x), density=False)


def denoising(
    data: Tensor, weight: float, generator: torch.Generator, deviation: float = DEVIATION
) -> Method:
    model = _two_stages(_gaussian(deviation))
    return _joint(
        model, data, lambda x, _: denoising_loss(model, x, weight, generator), density=True
    )


def rectangular(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(ManifoldObjective())

    def loss(x: Tensor, progress: float) -> Tensor:
        likelihood = warm_up(progress, 0.25, 0.5)
        return rectangular_loss(
            model, x, weight, likelihood=likelihood, generator=generator, **VOLUME
        )

    return _joint(model, data, loss, density=False)


def free_form(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    model = Autoencoder(*networks.autoencoder(MORE_CHANNELS), SHAPE, DIM)
    loss = partial(free_form_loss, model, weight=weight, generator=generator)
    return _joint(model, data, lambda x, _: loss(x), density=False)


def autoencoder(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    model = Autoencoder(*networks.autoencoder(CHANNELS), SHAPE, DIM, _prior())
    return _in_turn(model, data, lambda x, _: reconstruction_loss(model, x), density=False)


def variational(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    built = networks.autoencoder(networks.VAE_CHANNELS, 2)
    model = VariationalAutoencoder(*built, SHAPE, DIM, _prior())

    def loss(x: Tensor, progress: float) -> Tensor:
        return model.loss(x, generator, likelihood=warm_up(progress, 0.0, 0.5))

    code = torch.no_grad()(lambda x: model.draw(x, generator)[0])
    return _in_turn(model, data, loss, density=True, code=code)


def components(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    return Method(HierarchicalFlow([_components(data)]), [], density=True)


def components_with_prior(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    model = HierarchicalFlow([_components(data), _prior()])
    return Method(model, [_prior_phase(model, data, 1.0)], density=True)


def falling(data: Tensor, weight: float, generator: torch.Generator) -> Method:
    """The penalized likelihood with a weight that falls to the given one, then a prior flow on u.

    As with `WeightSchedule`, every step multiplies the weight by the same factor, from FALL times
    the given weight at the start to the given weight after FALL_SHARE of the steps. The schedule
    follows the progress of the phase, because a method is built before its steps are known.
    """
    model = _two_stages(_penalty(1.0))

    def loss(x: Tensor, progress: float) -> Tensor:
        w = weight * FALL ** max(0.0, 1 - progress / FALL_SHARE)
        terms = model.terms(x, stage=0)
        return w * terms.penalty - terms.log_likelihood

    return _in_turn(model, data, loss, density=True)


@dataclass(frozen=True)
class Recipe:
    """How a method is built and drawn.

    Attributes:
        build: takes the training data, to which components and mixtures are fitted, the weight of
            the reconstruction error, and a generator for the noise and the probes of the loss.
        colour, marker: in all pictures. Baselines are grey, plain flows blue, and every form of the
            penalized likelihood is red; no other method is.
        short: name that fits beside a row of images, if the method's own is too long.
        weighted: whether it has a weight to choose.
        by_likelihood: whether it maximizes only the likelihood in the space of x.
        weight: a weight that is not swept. The penalty's is a choice between likelihood and error,
            and all its methods have that of `mflow train`; other weights are runs of the frontier.
        slower: factor of the sweep's first learning rates. Transformers and networks that need a
            smaller rate start lower, so that the sweep finds theirs in as few trainings.
    """

    build: Callable[[Tensor, float, torch.Generator], Method]
    colour: str
    marker: str
    short: str = ""
    weighted: bool = False
    by_likelihood: bool = False
    weight: float | None = None
    slower: float = 1.0


RECIPES = {
    # Probabilistic principal components (Tipping and Bishop 1999): a linear manifold.
    "principal components, Gaussian": Recipe(components, "0.6", "s", "PCA"),
    "principal components, prior flow": Recipe(components_with_prior, "0.4", "D", "PCA, prior"),
    # An autoencoder by reconstruction, then a prior flow on its code.
    "autoencoder, prior flow": Recipe(autoencoder, "0.2", "^", "autoencoder, prior"),
    # Maximum likelihood with standard normal latents (Glow, arXiv 1807.03039). The choice of u only
    # affects projections and samples with v = 0.
    "plain likelihood": Recipe(
        lambda *_: one_stage(networks.glow(), DIM, NORMAL),
        "tab:blue", "o", "plain", by_likelihood=True),
    "plain likelihood, wider flow": Recipe(
        lambda *_: one_stage(networks.glow(networks.WIDE), DIM, NORMAL),
        "tab:blue", "s", "plain, wider", by_likelihood=True),
    # The hierarchy without the penalty.
    "plain likelihood, prior flow": Recipe(
        lambda data, *_: hierarchy(data, NORMAL),
        "tab:cyan", "D", "plain, prior", by_likelihood=True),
    # arXiv 2412.15129, couplings with vision transformers, alone and followed by a prior flow on u.
    "plain Jet": Recipe(
        lambda *_: one_stage(networks.jet(), DIM, NORMAL),
        "tab:blue", "v", by_likelihood=True, slower=0.4),
    "plain Jet, prior flow": Recipe(
        lambda data, *_: hierarchy(data, NORMAL, networks.jet()),
        "tab:cyan", "v", by_likelihood=True, slower=0.4),
    # arXiv 2412.06329, an autoregressive flow of causal transformers.
    "plain TarFlow": Recipe(
        lambda *_: one_stage(networks.tarflow(), DIM, NORMAL),
        "navy", "s", by_likelihood=True, slower=0.4),
    # arXiv 1312.6114, with a learned deviation of each pixel, then a prior flow on the code. Its
    # bits are a bound by importance weighting (arXiv 1509.00519).
    "VAE, prior flow": Recipe(variational, "0.2", "v", "VAE, prior"),
    # arXiv 2111.00619, with a prior flow on u that is trained with the first flow.
    "PIE": Recipe(pie, "tab:olive", "v"),
    # arXiv 2003.13913: the manifold by reconstruction, then the prior by likelihood.
    "M-flow": Recipe(two_phases, "gold", "^"),
    # Horvat and Pfister, NeurIPS 2021, with a prior flow on u. Less noise lowers the bound on its
    # bits per dimension.
    "denoising flow": Recipe(denoising, "tab:green", "<", weighted=True),
    "denoising flow, less noise": Recipe(
        partial(denoising, deviation=LESS_NOISE), "limegreen", "<", weighted=True),
    # arXiv 2106.01413, with a prior flow on u and a likelihood that is warmed up.
    "rectangular flow": Recipe(rectangular, "tab:brown", ">", weighted=True),
    # arXiv 2306.01843, with a standard normal code as in the paper.
    "free-form injective flow": Recipe(free_form, "tab:purple", "P", "free-form", weighted=True),
    # The penalized likelihood (arXiv 2206.03293), alone and followed by a prior flow on u.
    "penalized": Recipe(
        lambda _, weight, __: one_stage(networks.glow(), DIM, _penalty(weight)),
        "salmon", "X", weighted=True, weight=WEIGHT),
    "penalized, hierarchy": Recipe(
        lambda data, weight, _: hierarchy(data, _penalty(weight)),
        "tab:red", "*", "pen., hierarchy", weighted=True, weight=WEIGHT),
    # The same, with splines in the prior's couplings, or a transformer flow (arXiv 2412.06329) as
    # prior: training needs no inverse of it.
    "penalized, hierarchy, spline prior": Recipe(
        lambda data, weight, _: hierarchy(
            data, _penalty(weight), prior=networks.prior(coupling="spline", bins=4)),
        "orangered", "s", "pen., spline prior", weighted=True, weight=WEIGHT),
    "penalized, hierarchy, TarFlow prior": Recipe(
        lambda data, weight, _: hierarchy(
            data, _penalty(weight), prior=networks.tarflow_prior()),
        "firebrick", "D", "pen., TarFlow prior", weighted=True, weight=WEIGHT),
    "penalized Jet, hierarchy": Recipe(
        lambda data, weight, _: hierarchy(data, _penalty(weight), networks.jet()),
        "crimson", "v", "pen. Jet, hierarchy",
        weighted=True, weight=WEIGHT, slower=0.4),
    # w = 1 / variance of the errors.
    "calibrated weight, hierarchy": Recipe(
        lambda data, *_: hierarchy(data, _penalty("variance")),
        "lightcoral", "h", "calibrated, hierarchy"),
    "falling weight, hierarchy": Recipe(
        falling, "tomato", "d", "falling, hierarchy", weighted=True, weight=WEIGHT),
    # The mean squared error is at most 1 / weight. Training finds the weight of the penalty that
    # keeps this bound; it starts at the given one.
    "error bound, hierarchy": Recipe(
        lambda data, weight, _: hierarchy(data, _penalty(ErrorBound(1 / weight))),
        "darkred", "p", "bound, hierarchy", weighted=True, weight=WEIGHT),
}  # fmt: skip


def _components(data: Tensor) -> ManifoldFlow:
    return ManifoldFlow(PrincipalComponents(data, DIM), DIM, objective=NORMAL)


def _gaussian(deviation: float) -> ManifoldObjective:
    return ManifoldObjective("latent", "l2", weight=deviation**-2)


def _penalty(weight: float | Literal["variance"] | ErrorBound) -> ManifoldObjective:
    return ManifoldObjective("data", "l2", weight=weight)


def _prior(flow: Bijection | None = None) -> ManifoldFlow:
    mixture = GaussianMixture(DIM, COMPONENTS)
    return ManifoldFlow(flow or networks.prior(), DIM, prior=mixture)


def _two_stages(
    objective: ManifoldObjective, flow: Bijection | None = None, prior: Bijection | None = None
) -> HierarchicalFlow:
    first = ManifoldFlow(flow or networks.glow(), DIM, objective=objective)
    return HierarchicalFlow([first, _prior(prior)])


def _objective(model: HierarchicalFlow) -> Loss:
    return lambda x, progress: model.terms(x, stage=0).loss


def _prior_of(model: Model) -> ManifoldFlow | None:
    prior = model.prior_flow if isinstance(model, Autoencoder) else model.stages[1]
    assert prior is None or isinstance(prior, ManifoldFlow)
    return prior


def _chart_phase(model: Model, share: float, loss: Loss) -> Phase:
    """Train the first flow, or encoder and decoder, alone."""
    if isinstance(model, Autoencoder):
        return Phase(share, nn.ModuleList([model.encoder, model.decoder]), lambda x: None, loss)
    return Phase(share, model.stages[0], partial(model.initialize, stage=0), loss)


def _prior_phase(
    model: Model, data: Tensor, share: float, code: Callable[[Tensor], Tensor] | None = None
) -> Phase:
    """Train the prior alone, on codes of x (by default, `model.encode(x, stages=1)`).

    Its mixture is fitted to all training data, and not to a batch.
    """
    encode = torch.no_grad()(code or partial(model.encode, stages=1))
    prior = _prior_of(model)
    assert prior is not None
    initialize = torch.no_grad()(lambda x: prior.initialize(encode(data)))
    return Phase(share, prior, initialize, lambda x, _: prior_loss(model, encode(x)))


def _in_turn(
    model: Model,
    data: Tensor,
    loss: Loss,
    density: bool,
    ambient: bool = False,
    code: Callable[[Tensor], Tensor] | None = None,
) -> Method:
    """Train the chart with a loss, then the prior."""
    chart = _chart_phase(model, CHART_SHARE, loss)
    prior = _prior_phase(model, data, 1 - CHART_SHARE, code)
    return Method(model, [chart, prior], density, ambient)


def _joint(model: Model, data: Tensor, loss: Loss, density: bool) -> Method:
    """Train all parts at once, after the start of each part's own phase."""
    chart = _chart_phase(model, 1.0, loss)
    parts = [chart, _prior_phase(model, data, 1.0)] if _prior_of(model) else [chart]

    def initialize(x: Tensor) -> None:
        for part in parts:
            part.initialize(x)

    return Method(model, [Phase(1.0, model, initialize, loss)], density)
