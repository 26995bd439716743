"""The loss of one stage of a hierarchy, earlier stages frozen or trained on with it."""

from typing import Any, cast

import torch
from torch import Tensor

from mflow_kernels.models import HierarchicalFlow, ManifoldFlow
from mflow_kernels.objectives import Terms


class _Once:
    """A flow as an objective sees it, its latents of one batch computed once."""

    def __init__(self, flow: ManifoldFlow, x: Tensor) -> None:
        self._flow, self._latents = flow, flow.latents(x)

    def latents(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        return self._latents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)


def joint_terms(
    model: HierarchicalFlow, x: Tensor, stage: int, release: bool
) -> tuple[Terms, Tensor]:
    """The terms (N,) that are trained, and log p(x) (N,) under all stages up to `stage`.

    With the earlier stages frozen the terms are those of the stage on its own data. Released, they
    are those of all stages together: each earlier one's objective with the density of the next
    stage in the place of N(u; 0, I). The stage's own objective alone would have the earlier ones
    shrink u, which their log-determinants pay for.
    """
    earlier = cast(list[ManifoldFlow], list(model.stages)[:stage])
    trained = cast(ManifoldFlow, model.stages[stage])
    if release:
        parts = []
        for flow in earlier:
            once = _Once(flow, x)
            parts.append(flow.objective(once, x))
            x = flow.gather(once.latents(x)[0])
        last = trained.terms(x)
        loss = last.loss + sum(t.loss + t.on_manifold for t in parts)
        off = last.off_manifold + sum(t.off_manifold for t in parts)
        logdet = last.logdet + sum(t.logdet for t in parts)
        penalty = last.penalty + sum(t.penalty for t in parts)
        total = last.on_manifold + off + logdet
        return Terms(loss, total, last.on_manifold, off, logdet, penalty), total
    outside = x.new_zeros(len(x))
    with torch.no_grad():
        for flow in earlier:
            latents, logdet = flow.latents(x)
            outside = outside + logdet + flow.objective.off_density(flow, latents)
            x = flow.gather(latents)
    terms = trained.terms(x)
    return terms, outside + terms.log_likelihood
