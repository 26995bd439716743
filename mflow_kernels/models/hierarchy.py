"""Hierarchical training: further flows on the manifold's coordinates."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mflow_kernels.models.chart import Chart, sample_normal
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.objectives import Terms
from mflow_kernels.ops.checks import check_count


class HierarchicalFlow(Chart):
    """Manifold flows in stages: stage i is a flow on the u of stage i - 1 (arXiv 2206.03293).

    u is not truly Gaussian after stage 0; each further stage learns its density, with a mask of its
    own, so that sub-manifolds nest. Encoding, decoding, density and sampling compose.

    Args:
        stages: at least one; the input of each is a vector (N, d) of the d of the one before.

    Raises:
        TypeError: a stage that is no ManifoldFlow.
        ValueError: no stages, or one whose input does not match the u of the one before.
    """

    def __init__(self, stages: Sequence[ManifoldFlow]) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages: expected at least one ManifoldFlow, got none")
        for i, stage in enumerate(stages):
            if not isinstance(stage, ManifoldFlow):
                raise TypeError(f"stages[{i}]: expected a ManifoldFlow, got {type(stage).__name__}")
        for i in range(1, len(stages)):
            expected, came = (stages[i - 1].manifold_dim,), tuple(stages[i].input_shape)
            if came != expected:
                raise ValueError(
                    f"stages[{i}]: expected a flow on {expected}, the u of the stage before, "
                    f"got one on {came}"
                )
        self.stages = nn.ModuleList(stages)
        self.input_shape = stages[0].input_shape
        self.manifold_dim = stages[-1].manifold_dim

    def terms(self, x: Tensor, stage: int, *, release: bool = False) -> Terms:
        """The objective of one stage on the data x.

        Args:
            x: (N, *input_shape).
            stage: which one, from 0.
            release: train the earlier stages along. By default they are frozen, and the terms are
                the stage's own, of the u that it works on. Released, they are those of all stages
                up to it: loss is the penalized likelihood of x, in which each stage's -log N(u)
                gives way to the terms of the next. The stage's own would not do: without the
                earlier log-determinants, shrinking u to a point would be rewarded.
        """
        return self.terms_and_log_prob(x, stage, release=release)[0]

    def terms_and_log_prob(
        self, x: Tensor, stage: int, *, release: bool = False
    ) -> tuple[Terms, Tensor]:
        """`terms`, and log p(x) (N,) under all stages up to that one, in one pass."""
        earlier, trained = self._split_at(stage)
        if not release:
            with torch.no_grad():
                x, outside = _pass_through(earlier, x)
            terms = trained.terms(x)
            return terms, outside + terms.log_likelihood
        before = []
        for flow in earlier:
            latents, logdet = flow.latents(x)
            before.append(flow.objective.of_latents(flow, x, latents, logdet))
            x = flow.gather(latents)
        terms = trained.terms(x)
        for each in before:
            inner = each._replace(
                loss=each.loss + each.on_manifold,
                log_likelihood=each.log_likelihood - each.on_manifold,
                on_manifold=torch.zeros_like(each.on_manifold),
            )
            terms = Terms(*(a + b for a, b in zip(terms, inner, strict=True)))
        return terms, terms.log_likelihood

    def initialize(self, x: Tensor, stage: int) -> None:
        """Set one stage's actnorms from a first batch of data; once, see `ActNorm`."""
        earlier, trained = self._split_at(stage)
        with torch.no_grad():
            for flow in earlier:
                x = flow.encode(x)
            trained.initialize(x)

    def encode(self, x: Tensor, stages: int | None = None) -> Tensor:
        """The u of the last stage, or of the first `stages` of them."""
        for stage in self._until(stages):
            x = stage.encode(x)
        return x

    def decode(self, u: Tensor, stages: int | None = None) -> Tensor:
        """The point on the manifold with the coordinates u of that stage."""
        for stage in reversed(self._until(stages)):
            u = stage.decode(u)
        return u

    def project(self, x: Tensor, stages: int | None = None) -> Tensor:
        """x to its nearest by coordinates: encode, then decode with every v = 0."""
        return self.decode(self.encode(x, stages), stages)

    def log_prob(self, x: Tensor, stages: int | None = None) -> Tensor:
        """log p(x) (N,) in the ambient space, nats: each stage's density of the u before it."""
        *earlier, last = self._until(stages, least=1)
        u, outside = _pass_through(earlier, x)
        return outside + last.log_prob(u)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        stages: int | None = None,
    ) -> Tensor:
        """n points on the manifold: the last u ~ N(0, temperature^2), every v = 0."""
        dim = self._until(stages, least=1)[-1].manifold_dim
        return self.decode(sample_normal(self, n, dim, temperature, generator), stages)

    @staticmethod
    def from_pretrained(folder: str | Path) -> "HierarchicalFlow":
        """The model of a folder that `mflow export` wrote, all its stages, on the CPU and in
        evaluation mode; ValueError for torn or foreign files."""
        from mflow_kernels.models.pretrained import load_pretrained

        return load_pretrained(folder)

    def _until(self, stages: int | None, least: int = 0) -> list[ManifoldFlow]:
        if stages is not None:
            check_count("stages", stages, least, len(self.stages))
        return cast(list[ManifoldFlow], list(self.stages))[:stages]

    def _split_at(self, stage: int) -> tuple[list[ManifoldFlow], ManifoldFlow]:
        """The stages before one, and that one."""
        check_count("stage", stage, 0, len(self.stages) - 1)
        *earlier, one = self._until(stage + 1)
        return earlier, one


def _pass_through(flows: Sequence[ManifoldFlow], x: Tensor) -> tuple[Tensor, Tensor]:
    """The u of the last of these flows, and log p(x) - log p(u) (N,): their log-determinants and
    densities of v."""
    outside = torch.zeros((), device=x.device)
    for flow in flows:
        latents, logdet = flow.latents(x)
        outside = outside + logdet + flow.objective.off_density(flow, latents)
        x = flow.gather(latents)
    return x, outside
