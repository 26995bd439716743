"""Methods to train a manifold flow: this package's, those of other papers, and baselines.

A method is a model and its training phases. Each phase takes a share of the CPU time that all
methods have. All methods of a comparison use the same flow, the same prior flow on its coordinates
and batches of the same size; the names of those over another flow say which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.manifold.peers import (
    Autoencoder,
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


@dataclass(frozen=True)
class Networks:
    """The networks of a comparison, the same for all methods.

    A comparison leaves out the methods that need a field which is None.

    Attributes:
        input_shape, dim: shape of x without N; dimension of the manifolds.
        flow, wide_flow: build an invertible flow on x, and one with as many parameters as `flow`
            and `prior` together.
        prior: builds a flow on the coordinates.
        components: number of Gaussians in the mixture at the end of the prior flow.
        jet, tarflow: build transformer flows on x.
        autoencoder: builds an encoder and a decoder with about as many parameters as `flow` or, if
            given True, as `flow` and `prior` together.
        variational: builds an encoder and a decoder as `VariationalAutoencoder` takes them.
        training_data: draws data (M, *input_shape) to fit principal components and mixtures.
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
    components: int = 1
    jet: Callable[[], Bijection] | None = None
    tarflow: Callable[[], Bijection] | None = None
    variational: Callable[[], tuple[nn.Module, nn.Module]] | None = None
    less_noise: float | None = None
    wide_flow: Callable[[], Bijection] | None = None
    training_data: Callable[[], Tensor] | None = None
    volume: Mapping[str, Any] = field(default_factory=dict)


NORMAL = ManifoldObjective("latent", weight=1.0)  # v is standard normal, like u
WEIGHT = 400.0  # of the penalty
CHART_SHARE = 0.85  # CPU time of a chart that is trained before its prior, which has the rest
FALL, FALL_SHARE = 10.0, 0.6  # a falling weight starts at FALL times its last value


def one_stage(flow: Bijection, dim: int, objective: ManifoldObjective) -> Method:
    """Train one manifold flow with an objective."""
    model = HierarchicalFlow([ManifoldFlow(flow, dim, objective=objective)])
    phases = [_first_phase(model, 1.0, _objective(model))]
    return Method(model, phases, density=True, ambient=objective is NORMAL)


def hierarchy(
    networks: Networks, objective: ManifoldObjective, flow: Bijection | None = None
) -> Method:
    """Train a manifold flow with an objective, then a prior flow on its u."""
    model = _two_stages(networks, objective, flow)
    first = _first_phase(model, CHART_SHARE, _objective(model))
    phases = [first, _prior_phase(model, networks)]
    return Method(model, phases, density=True, ambient=objective is NORMAL)


def pie(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(networks, _gaussian(networks.deviation))
    return _joint(model, networks, lambda x, _: pie_loss(model, x), density=True)


def two_phases(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(networks, ManifoldObjective())
    chart = _first_phase(model, CHART_SHARE, lambda x, _: reconstruction_loss(model, x))
    return Method(model, [chart, _prior_phase(model, networks)], density=False)


def denoising(
    networks: Networks, weight: float, generator: torch.Generator, deviation: float
) -> Method:
    model = _two_stages(networks, _gaussian(deviation))

    def loss(x: Tensor, progress: float) -> Tensor:
        return denoising_loss(model, x, weight, generator)

    return _joint(model, networks, loss, density=True)


def rectangular(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = _two_stages(networks, ManifoldObjective())

    def loss(x: Tensor, progress: float) -> Tensor:
        likelihood = warm_up(progress, 0.25, 0.5)
        return rectangular_loss(
            model, x, weight, likelihood=likelihood, generator=generator, **networks.volume
        )

    return _joint(model, networks, loss, density=False)


def free_form(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = Autoencoder(*networks.autoencoder(True), networks.input_shape, networks.dim)

    def loss(x: Tensor, progress: float) -> Tensor:
        return free_form_loss(model, x, weight, generator=generator)

    return _joint(model, networks, loss, density=False)


def autoencoder(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    built = networks.autoencoder(False)
    model = Autoencoder(*built, networks.input_shape, networks.dim, _prior(networks))
    chart = _chart_phase(model, lambda x, _: reconstruction_loss(model, x))
    return Method(model, [chart, _prior_phase(model, networks)], density=False)


def variational(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    assert networks.variational is not None
    built = networks.variational()
    model = VariationalAutoencoder(*built, networks.input_shape, networks.dim, _prior(networks))

    def loss(x: Tensor, progress: float) -> Tensor:
        return model.loss(x, generator, likelihood=warm_up(progress, 0.0, 0.5))

    chart = _chart_phase(model, loss)
    prior = _prior_phase(model, networks, code=lambda x: model.draw(x, generator)[0])
    return Method(model, [chart, prior], density=True)


def components(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    return Method(HierarchicalFlow([_components(networks)]), [], density=True)


def components_with_prior(networks: Networks, weight: float, generator: torch.Generator) -> Method:
    model = HierarchicalFlow([_components(networks), _prior(networks)])
    return Method(model, [_prior_phase(model, networks, 1.0)], density=True)


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

    phases = [_first_phase(model, CHART_SHARE, loss), _prior_phase(model, networks)]
    return Method(model, phases, density=True)


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
        weight: a weight that is not swept. The penalty's is a choice between likelihood and error,
            and all its methods have that of `mflow train`; other weights are runs of the frontier.
        slower: factor of the sweep's first learning rates. Transformers and networks that need a
            smaller rate start lower, so that the sweep finds theirs in as few trainings.
    """

    build: Callable[[Networks, float, torch.Generator], Method]
    colour: str
    marker: str
    short: str = ""
    weighted: bool = False
    by_likelihood: bool = False
    needs: str = ""
    weight: float | None = None
    slower: float = 1.0


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
    # arXiv 2412.15129, couplings with vision transformers, alone and followed by a prior flow on u.
    "plain Jet": Recipe(
        lambda networks, *_: one_stage(networks.jet(), networks.dim, NORMAL),
        "tab:blue", "v", by_likelihood=True, needs="jet", slower=0.4),
    "plain Jet, prior flow": Recipe(
        lambda networks, *_: hierarchy(networks, NORMAL, networks.jet()),
        "tab:cyan", "v", by_likelihood=True, needs="jet", slower=0.4),
    # arXiv 2412.06329, an autoregressive flow of causal transformers.
    "plain TarFlow": Recipe(
        lambda networks, *_: one_stage(networks.tarflow(), networks.dim, NORMAL),
        "navy", "s", by_likelihood=True, needs="tarflow", slower=0.4),
    # arXiv 1312.6114, with a learned deviation of each pixel, then a prior flow on the code. Its
    # bits are a bound by importance weighting (arXiv 1509.00519).
    "VAE, prior flow": Recipe(
        variational, "0.2", "v", "VAE, prior", needs="variational"),
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
        "salmon", "X", weighted=True, weight=WEIGHT),
    "penalized, hierarchy": Recipe(
        lambda networks, weight, _: hierarchy(networks, _penalty(weight)),
        "tab:red", "*", "pen., hierarchy", weighted=True, weight=WEIGHT),
    "penalized Jet, hierarchy": Recipe(
        lambda networks, weight, _: hierarchy(networks, _penalty(weight), networks.jet()),
        "crimson", "v", "pen. Jet, hierarchy",
        weighted=True, needs="jet", weight=WEIGHT, slower=0.4),
    # w = 1 / variance of the errors.
    "calibrated weight, hierarchy": Recipe(
        lambda networks, *_: hierarchy(networks, _penalty("variance")),
        "lightcoral", "h", "calibrated, hierarchy"),
    "falling weight, hierarchy": Recipe(
        falling, "tomato", "d", "falling, hierarchy", weighted=True, weight=WEIGHT),
    # The mean squared error is at most 1 / weight. Training finds the weight of the penalty that
    # keeps this bound; it starts at the given one.
    "error bound, hierarchy": Recipe(
        lambda networks, weight, _: hierarchy(networks, _penalty(ErrorBound(1 / weight))),
        "darkred", "p", "bound, hierarchy", weighted=True, weight=WEIGHT),
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


def _prior(networks: Networks) -> ManifoldFlow:
    mixture = None
    if networks.components > 1:
        mixture = GaussianMixture(networks.dim, networks.components)
    return ManifoldFlow(networks.prior(), networks.dim, prior=mixture)


def _two_stages(
    networks: Networks, objective: ManifoldObjective, flow: Bijection | None = None
) -> HierarchicalFlow:
    first = ManifoldFlow(flow or networks.flow(), networks.dim, objective=objective)
    return HierarchicalFlow([first, _prior(networks)])


def _objective(model: HierarchicalFlow) -> Loss:
    return lambda x, progress: model.terms(x, stage=0).loss


def _first_phase(model: HierarchicalFlow, share: float, loss: Loss) -> Phase:
    return Phase(share, model.stages[0], lambda x: model.initialize(x, stage=0), loss)


def _prior_phase(
    model: HierarchicalFlow | Autoencoder,
    networks: Networks,
    share: float = 1 - CHART_SHARE,
    code: Callable[[Tensor], Tensor] | None = None,
) -> Phase:
    """Train the prior alone, on codes of x (by default, `model.encode(x, stages=1)`)."""
    encode = torch.no_grad()(code or partial(model.encode, stages=1))
    prior = model.prior_flow if isinstance(model, Autoencoder) else model.stages[1]
    assert isinstance(prior, ManifoldFlow)
    initialize = _initialize_prior(prior, networks, encode)
    return Phase(share, prior, initialize, lambda x, progress: prior_loss(model, encode(x)))


def _initialize_prior(
    prior: ManifoldFlow, networks: Networks, encode: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], None]:
    """Return a function of a first batch. A mixture is fitted to all training data instead."""

    @torch.no_grad()
    def initialize(x: Tensor) -> None:
        prior.initialize(encode(networks.training_data() if networks.training_data else x))

    return initialize


def _chart_phase(model: Autoencoder, loss: Loss) -> Phase:
    """Train encoder and decoder alone."""
    return Phase(CHART_SHARE, nn.ModuleList([model.encoder, model.decoder]), lambda x: None, loss)


def _joint(
    model: HierarchicalFlow | Autoencoder, networks: Networks, loss: Loss, density: bool
) -> Method:
    """Train all parts at once."""

    def initialize(x: Tensor) -> None:
        if isinstance(model, HierarchicalFlow):
            prior = model.stages[1]
            assert isinstance(prior, ManifoldFlow)
            model.initialize(x, stage=0)
            _initialize_prior(prior, networks, partial(model.encode, stages=1))(x)

    return Method(model, [Phase(1.0, model, initialize, loss)], density)
