"""The density and the samples of a bijection whose latents are standard normal."""

import math

import torch
from torch import Tensor, nn

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.model import Model
from mflow_kernels.ops.checks import check_count
from mflow_kernels.ops.penalty_functions import HALF_LOG_2PI


class Flow(Bijection, Model):
    """A bijection from x to latents that are standard normal under the model.

    Attributes:
        input_shape: shape of x without N; None if the flow takes any.
        latent_shapes: shape of each latent without N, finest first; None if input_shape is None.
    """

    input_shape: tuple[int, ...] | None
    latent_shapes: tuple[tuple[int, ...], ...] | None

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log p(x) (N,), or log p(x | context), in nats.

        Args:
            x: (N, *input_shape).
            context: passed to the coupling networks, as in `forward`.

        Returns:
            sum of log N(z; 0, 1) over all latents, plus log |det dz/dx|: float64 for float64 x,
            otherwise float32.
        """
        z, log_prob = self(x, *given(context))
        for latent in z if isinstance(z, tuple) else (z,):
            squares = latent.to(log_prob.dtype).square()
            log_prob = log_prob - (squares / 2 + HALF_LOG_2PI).flatten(1).sum(1)
        return log_prob

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Draw samples x (n, *input_shape): the inverse of latents from N(0, temperature^2).

        Args:
            n: number of samples.
            temperature: standard deviation of the latents, >= 0. Below 1, samples are more likely
                and vary less (arXiv 1807.03039, section 6).
            generator: on the model's device.
            context: a context for each of the n samples, passed to the coupling networks.

        Raises:
            ValueError: n or temperature is out of range, or the flow has no `input_shape`.
        """
        if self.latent_shapes is None:
            raise ValueError(
                "input_shape: sampling derives the shapes of the latents from it; give it to the "
                "constructor"
            )
        z = tuple(
            sample_normal(self, (n, *shape), temperature, generator) for shape in self.latent_shapes
        )
        return self.inverse(z, *given(context))[0]


def given(context: Tensor | None) -> tuple[Tensor, ...]:
    """The context as positional arguments: none or one."""
    return () if context is None else (context,)


def sample_normal(
    model: nn.Module, shape: tuple[int, ...], temperature: float, generator: torch.Generator | None
) -> Tensor:
    """Draw `shape`, (n, ...), from N(0, temperature^2) with the parameters' device and dtype."""
    check_count("n", shape[0], 1)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    like = next(model.parameters(), torch.empty(0))
    normal = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return temperature * normal
