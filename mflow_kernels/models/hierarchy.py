"""Hierarchical training: further flows on the coordinates of a manifold."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mflow_kernels.layers.flow import Context
from mflow_kernels.models.chart import Chart
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.mixture import GaussianMixture
from mflow_kernels.models.objectives import Terms
from mflow_kernels.ops.checks import check_count


class HierarchicalFlow(Chart):
    """Manifold flows in stages: stage i is a flow on the u of stage i - 1 (arXiv 2206.03293).

    Stage 0 does not make its u exactly Gaussian. Each further stage learns the density of the
    previous stage's u. It has its own mask, so its manifold lies inside the previous stage's
    manifold. Encoding, decoding, density and sampling compose all stages. A `context` is passed to
    every stage.

    Args:
        stages: at least one ManifoldFlow. The input of each stage after the first is a vector
            (N, d), where d is the manifold dimension of the stage before.

    Raises:
        TypeError: a stage is not a ManifoldFlow.
        ValueError: there are no stages, or a stage's input does not match the u before it.
    """

    def __init__(self, stages: Sequence[ManifoldFlow]) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages: expected at least one ManifoldFlow, got none")
        for i, stage in enumerate(stages):
            if not isinstance(stage, ManifoldFlow):
                raise TypeError(f"stages[{i}]: expected a ManifoldFlow, got {type(stage).__name__}")
        for i in range(1, len(stages)):
            expected, actual = (stages[i - 1].manifold_dim,), tuple(stages[i].input_shape)
            if actual != expected:
                raise ValueError(
                    f"stages[{i}]: expected a flow on {expected}, the u of the stage before, "
                    f"got one on {actual}"
                )
        self.stages = nn.ModuleList(stages)
        self.input_shape = stages[0].input_shape
        self.manifold_dim = stages[-1].manifold_dim

    @property
    def prior(self) -> GaussianMixture | None:  # type: ignore[override]
        """The prior of the last stage."""
        return cast(ManifoldFlow, self.stages[-1]).prior

    def terms(
        self, x: Tensor, *, stage: int, release: bool = False, context: Context | None = None
    ) -> Terms:
        """Return the objective of one stage on the data x.

        Args:
            x: (N, *input_shape).
            stage: index of the stage, from 0.
            release: whether to train the earlier stages too. If False, they are frozen, and the
                terms are those of this stage on its input u. If True, the terms cover all stages
                up to this one: the loss is the penalized likelihood of x, in which the terms of the
                next stage replace -log N(u) of each earlier stage. (The terms of this stage alone
                lack the earlier log-determinants, so training on them would shrink u to a point.)
        """
        return self.terms_and_log_prob(x, stage=stage, release=release, context=context)[0]

    def terms_and_log_prob(
        self, x: Tensor, *, stage: int, release: bool = False, context: Context | None = None
    ) -> tuple[Terms, Tensor]:
        """Return `terms` and log p(x) (N,) under all stages up to `stage`, in one pass."""
        earlier, trained = self._split_at(stage)
        if not release:
            with torch.no_grad():
                x, outside = _pass_through(earlier, x, context)
            terms = trained.terms(x, context=context)
            return terms, outside + terms.log_likelihood
        before = []
        for flow in earlier:
            latents, logdet = flow.latents(x, context=context)
            before.append(flow.objective.of_latents(flow, x, latents, logdet, context))
            x = flow.gather(latents)
        terms = trained.terms(x, context=context)
        for each in before:
            without_u = each._replace(
                loss=each.loss + each.on_manifold,
                log_likelihood=each.log_likelihood - each.on_manifold,
                on_manifold=torch.zeros_like(each.on_manifold),
            )
            terms = Terms(*(a + b for a, b in zip(terms, without_u, strict=True)))
        return terms, terms.log_likelihood

    @torch.no_grad()
    def initialize(
        self, x: Tensor, *, stage: int, context: Context | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Initialize the actnorms of one stage from a first batch x, and return its `latents`.

        See `ActNorm`.
        """
        earlier, trained = self._split_at(stage)
        for flow in earlier:
            x = flow.encode(x, context=context)
        return trained.initialize(x, context=context)

    def encode(
        self, x: Tensor, *, stages: int | None = None, context: Context | None = None
    ) -> Tensor:
        """Return u of the last stage, or of the last of the first `stages` stages."""
        for stage in self._until(stages):
            x = stage.encode(x, context=context)
        return x

    def decode(
        self, u: Tensor, *, stages: int | None = None, context: Context | None = None
    ) -> Tensor:
        """Return the point on the manifold with coordinates u; `encode` maps it back to u."""
        for stage in reversed(self._until(stages)):
            u = stage.decode(u, context=context)
        return u

    def lift(
        self,
        u: Tensor,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        stages: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        outside = torch.zeros((), device=u.device)
        for stage in reversed(self._until(stages)):
            u, each = stage.lift(u, context=context, temperature=temperature, generator=generator)
            outside = outside + each
        return u, outside

    def project(
        self, x: Tensor, *, stages: int | None = None, context: Context | None = None
    ) -> Tensor:
        """Project x onto the manifold: encode it, then decode with v = 0 in every stage."""
        u = self.encode(x, stages=stages, context=context)
        return self.decode(u, stages=stages, context=context)

    def log_prob(
        self, x: Tensor, *, stages: int | None = None, context: Context | None = None
    ) -> Tensor:
        """Return log p(x) (N,) in the ambient space, in nats.

        The density of each stage replaces the standard normal density of the u before it.
        """
        *earlier, last = self._until(stages, least=1)
        u, outside = _pass_through(earlier, x, context)
        return outside + last.log_prob(u, context=context)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        stages: int | None = None,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        off_manifold: bool = False,
    ) -> Tensor:
        """Draw n points on the manifold: u of the last stage from its prior, every v = 0.

        `stages` is as for `encode`. The rest is as for `Chart.sample`.
        """
        last = self._until(stages, least=1)[-1]
        u = last.sample_coordinates(n, temperature=temperature, generator=generator)
        if off_manifold:
            how: dict[str, Any] = {"temperature": temperature, "generator": generator}
            return self.lift(u, stages=stages, context=context, **how)[0]
        return self.decode(u, stages=stages, context=context)

    def describe_images(
        self, n_bits: int | None, crop: int | None, class_names: tuple[str, ...]
    ) -> None:
        """Set `n_bits`, `crop` and `class_names` of the model and of its first stage."""
        super().describe_images(n_bits, crop, class_names)
        cast(ManifoldFlow, self.stages[0]).describe_images(n_bits, crop, class_names)

    def _until(self, stages: int | None, least: int = 0) -> list[ManifoldFlow]:
        if stages is not None:
            check_count("stages", stages, least, len(self.stages))
        return cast(list[ManifoldFlow], list(self.stages))[:stages]

    def _split_at(self, stage: int) -> tuple[list[ManifoldFlow], ManifoldFlow]:
        """Return the stages before `stage`, and that stage."""
        check_count("stage", stage, 0, len(self.stages) - 1)
        *earlier, trained = self._until(stage + 1)
        return earlier, trained


def _pass_through(
    flows: Sequence[ManifoldFlow], x: Tensor, context: Context | None
) -> tuple[Tensor, Tensor]:
    """Return u of the last of these flows, and log p(x) - log p(u) (N,).

    The difference is the sum of their log-determinants and their densities of v.
    """
    outside = torch.zeros((), device=x.device)
    for flow in flows:
        latents, logdet = flow.latents(x, context=context)
        outside = outside + logdet + flow.objective.off_density(flow, latents)
        x = flow.gather(latents)
    return x, outside
