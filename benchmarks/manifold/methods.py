"""Methods to train a manifold flow: this package's, and baselines with the same networks.

A method is a list of phases. Each phase has a loss and a share of the optimizer steps, so all
methods take the same number of steps on batches of the same size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mflow_kernels import HierarchicalFlow, ManifoldFlow, ManifoldObjective
from mflow_kernels.layers import Bijection

Batches = Iterator[Tensor]
WARM_UP = 50
FINAL_RATE = 0.02  # learning rate at the end of a phase, as a share of the highest one


@dataclass(frozen=True)
class Phase:
    """Minimize `loss(x)` (N,) over the parameters of `trained`, for a share of the steps.

    `initialize(x)` sets the actnorms from the first batch.
    """

    share: float
    trained: nn.Module
    initialize: Callable[[Tensor], None]
    loss: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A model and its training phases.

    Attributes:
        off_deviation: standard deviation of v in samples; with 0 they lie on the manifold.
    """

    model: HierarchicalFlow
    phases: list[Phase]
    off_deviation: float = 0.0

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        if not self.off_deviation:
            return self.model.sample(n, generator=generator)
        (flow,) = self.model.stages  # only a single flow can sample the ambient space
        assert isinstance(flow, ManifoldFlow)
        u = torch.randn(n, flow.manifold_dim, generator=generator)
        latents = flow.scatter(u)
        noise = [
            self.off_deviation * torch.randn(z.shape, generator=generator) * mask
            for z, mask in zip(latents, flow.off_masks(), strict=True)
        ]
        moved = tuple(z + e for z, e in zip(latents, noise, strict=True))
        with torch.no_grad():
            return flow.flow.inverse(moved)[0]


def train(method: Method, batches: Batches, steps: int, rate: float) -> None:
    """Train with Adam, with gradients clipped to norm 1. Each phase has its own warm-up and cosine.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
    """
    for phase in method.phases:
        phase.initialize(next(batches))
        # Gradients of other stages' parameters, if there are any, are ignored.
        parameters = list(phase.trained.parameters())
        optimizer = torch.optim.Adam(parameters, rate, fused=True)
        count = round(phase.share * steps)
        for step in range(count):
            cosine = 0.5 * (1 + math.cos(math.pi * step / count))
            falling = FINAL_RATE + (1 - FINAL_RATE) * cosine
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / WARM_UP, falling)
            loss = phase.loss(next(batches)).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if step % 50 == 0 and not math.isfinite(loss.item() + norm.item()):
                raise FloatingPointError(f"loss {loss.item()} at step {step} of {count}")
            optimizer.step()
    method.model.eval()


def plain(flow: Bijection, dim: int) -> Method:
    """Maximum likelihood with standard normal latents (Glow, arXiv 1807.03039).

    The choice of u only affects projections.
    """
    return penalized(flow, dim, ManifoldObjective("latent", "l2", weight=1.0), off_deviation=1.0)


def pie(flow: Bijection, dim: int, deviation: float) -> Method:
    """Pseudo-invertible encoder (arXiv 2111.00619): v is Gaussian with a small deviation.

    Samples have v = 0, as in the paper.
    """
    return penalized(flow, dim, ManifoldObjective("latent", "l2", weight=deviation**-2))


def penalized(
    flow: Bijection, dim: int, objective: ManifoldObjective, off_deviation: float = 0.0
) -> Method:
    """The penalized likelihood (arXiv 2206.03293), in one step."""
    model = ManifoldFlow(flow, dim, objective=objective)
    phase = Phase(1.0, model, model.initialize, lambda x: model.terms(x).loss)
    return Method(HierarchicalFlow([model]), [phase], off_deviation)


def hierarchical(
    flow: Bijection,
    dim: int,
    objective: ManifoldObjective,
    further: Bijection,
    first_share: float = 0.7,
) -> Method:
    """The penalized likelihood, then a second flow on its u while the first one is frozen."""
    first = ManifoldFlow(flow, dim, objective=objective)
    second = ManifoldFlow(further, dim)
    model = HierarchicalFlow([first, second])
    phases = [
        Phase(first_share, first, first.initialize, lambda x: first.terms(x).loss),
        _density_phase(model, 1 - first_share),
    ]
    return Method(model, phases)


def two_phases(flow: Bijection, dim: int, further: Bijection) -> Method:
    """M-flow (Brehmer and Cranmer, arXiv 2003.13913), trained as its authors recommend.

    The first phase learns the manifold by reconstruction. The second freezes it and trains a flow
    on u by likelihood.
    """
    first = ManifoldFlow(flow, dim)
    second = ManifoldFlow(further, dim)
    model = HierarchicalFlow([first, second])
    manifold = Phase(0.5, first, first.initialize, lambda x: _squared_error(first, x))
    return Method(model, [manifold, _density_phase(model, 0.5)])


def denoising(
    flow: Bijection, dim: int, deviation: float, weight: float, generator: torch.Generator
) -> Method:
    """Denoising normalizing flow (Horvat and Pfister, NeurIPS 2021).

    The loss is the negative log-likelihood of the data plus noise, where v has the variance of the
    noise, plus the error of reconstructing the data from the noisy data.
    """
    model = ManifoldFlow(
        flow, dim, objective=ManifoldObjective("latent", "l2", weight=deviation**-2)
    )

    def loss(x: Tensor) -> Tensor:
        noisy = x + deviation * torch.randn(x.shape, generator=generator)
        latents, logdet = model.latents(noisy)
        u = model.gather(latents)
        v = torch.cat([z.flatten(1) for z in latents], 1).square().sum(1) - u.square().sum(1)
        likelihood = logdet - u.square().sum(1) / 2 - v / (2 * deviation**2)
        return weight * (x - model.decode(u)).square().sum(1) / 2 - likelihood

    return Method(HierarchicalFlow([model]), [Phase(1.0, model, model.initialize, loss)])


def rectangular(flow: Bijection, dim: int, weight: float) -> Method:
    """Rectangular flow (Caterini et al., arXiv 2106.01413), in one step.

    The loss is the exact negative log-likelihood on the manifold, with
    log p = log N(u) - 1/2 log det J^T J, plus the reconstruction error.
    """
    model = ManifoldFlow(flow, dim)

    def loss(x: Tensor) -> Tensor:
        return weight * _squared_error(model, x) / 2 - model.manifold_log_prob(x).value

    return Method(HierarchicalFlow([model]), [Phase(1.0, model, model.initialize, loss)])


def _density_phase(model: HierarchicalFlow, share: float) -> Phase:
    return Phase(
        share,
        model.stages[1],
        lambda x: model.initialize(x, 1),
        lambda x: model.terms(x, stage=1).loss,
    )


def _squared_error(model: ManifoldFlow, x: Tensor) -> Tensor:
    return (x - model.project(x)).flatten(1).square().sum(1)
