"""Ways to train a manifold flow: ours, and baselines as objectives over the same networks.

A method is a list of phases, each with a loss on one model and its share of the optimizer steps,
so that all methods spend the same number of steps on batches of the same size.
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
FINAL_RATE = 0.02  # of the highest learning rate, at the end of a phase


@dataclass(frozen=True)
class Phase:
    """`share` of the steps: minimize loss(x) (N,) over the parameters of `trained`, whose actnorms
    are set by `initialize(x)` from the first batch."""

    share: float
    trained: nn.Module
    initialize: Callable[[Tensor], None]
    loss: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """What is trained, and how.

    off_deviation: standard deviation of v in samples; 0 draws on the manifold.
    """

    model: HierarchicalFlow
    phases: list[Phase]
    off_deviation: float = 0.0

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        if not self.off_deviation:
            return self.model.sample(n, generator=generator)
        (flow,) = self.model.stages  # only single flows sample the ambient space
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
    """Adam, gradients clipped to norm 1, each phase with warm-up and a cosine of its own.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    for phase in method.phases:
        phase.initialize(next(batches))
        # Of other stages' parameters there is no gradient, or none is wanted.
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
    """Maximum likelihood with all latents standard normal (Glow, arXiv 1807.03039). Which latents
    are called u matters to its projections only."""
    return penalized(flow, dim, ManifoldObjective("latent", "l2", weight=1.0), off_deviation=1.0)


def pie(flow: Bijection, dim: int, deviation: float) -> Method:
    """Pseudo-invertible encoder (arXiv 2111.00619): v is a Gaussian of small standard deviation.
    Sampled with v = 0, as it is there."""
    return penalized(flow, dim, ManifoldObjective("latent", "l2", weight=deviation**-2))


def penalized(
    flow: Bijection, dim: int, objective: ManifoldObjective, off_deviation: float = 0.0
) -> Method:
    """The penalized likelihood (arXiv 2206.03293), one step."""
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
    """The penalized likelihood, then a second flow on all of its u, the first one frozen."""
    first = ManifoldFlow(flow, dim, objective=objective)
    second = ManifoldFlow(further, dim)
    model = HierarchicalFlow([first, second])
    phases = [
        Phase(first_share, first, first.initialize, lambda x: first.terms(x).loss),
        _density_phase(model, 1 - first_share),
    ]
    return Method(model, phases)


def two_phases(flow: Bijection, dim: int, further: Bijection) -> Method:
    """M-flow (Brehmer and Cranmer, arXiv 2003.13913), trained as they advise: the manifold by
    reconstruction alone, then, it being fixed, a flow on u by likelihood."""
    first = ManifoldFlow(flow, dim)
    second = ManifoldFlow(further, dim)
    model = HierarchicalFlow([first, second])
    manifold = Phase(0.5, first, first.initialize, lambda x: _squared_error(first, x))
    return Method(model, [manifold, _density_phase(model, 0.5)])


def denoising(
    flow: Bijection, dim: int, deviation: float, weight: float, generator: torch.Generator
) -> Method:
    """Denoising normalizing flow (Horvat and Pfister, NeurIPS 2021): the likelihood of the data
    plus noise, v having the noise's variance, and the reconstruction of the data from it."""
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
    """Rectangular flow (Caterini et al., arXiv 2106.01413): the exact likelihood on the manifold,
    log N(u) - 1/2 log det J^T J, and the reconstruction, in one step."""
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
