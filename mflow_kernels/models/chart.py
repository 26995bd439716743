"""What a manifold with coordinates u answers, whatever flows those coordinates come from."""

import math

import torch
from torch import Tensor, nn

from mflow_kernels.models.volume import Estimate, Method, log_volume

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Chart(nn.Module):
    """A manifold {decode(u)} in the space of x, u (N, d) standard normal: what `ManifoldFlow` and
    `HierarchicalFlow` share."""

    input_shape: tuple[int, ...]
    manifold_dim: int

    def encode(self, x: Tensor) -> Tensor:
        """u (N, d) of the data x."""
        raise NotImplementedError

    def decode(self, u: Tensor) -> Tensor:
        """The point on the manifold with coordinates u (N, d)."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) (N,) in the ambient space, nats."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """x -> decode(encode(x)), its projection on the manifold."""
        return self.decode(self.encode(x))

    def distance(self, x: Tensor) -> Tensor:
        """Euclidean distance (N,) of x to its projection."""
        return (x - self.project(x)).flatten(1).norm(dim=1)

    def manifold_log_prob(
        self,
        x: Tensor,
        *,
        method: Method = "exact",
        probes: int = 16,
        iterations: int = 64,
        generator: torch.Generator | None = None,
        max_bytes: int = 2**30,
    ) -> Estimate:
        """Log-density on the manifold (N,) at the projections of x, nats per d-dimensional volume.

        log p(u) - 1/2 log det J^T J with u = encode(x) and J = d decode(u) / du, D x d: the density
        with respect to the manifold's own area, as that of M-flows (arXiv 2003.13913, section 2).

        Differentiable in x and the parameters; call it under `torch.no_grad()` where no gradient is
        wanted, since in either method it needs the activations of plain torch: d or `probes` times
        those of `decode`, reversible or not.

        Args:
            x: (N, *input_shape).
            method: "exact", by d Jacobian products a sample; "hutchinson", by some `probes` times
                twice as many as the Lanczos steps it takes, for large d.
            probes: random vectors of an estimate, at least 2; its error falls as 1 / sqrt(probes).
            iterations: at most so many Lanczos (conjugate gradient) steps.
            generator: of the probes, on the device of the model.
            max_bytes: of Jacobians that "exact" may hold, 8 D d a sample.

        Returns:
            value, and error: the standard error over the probes, and what more steps would change
            by extrapolation (infinite after fewer than three); zeros from "exact".

        Raises:
            ValueError: "exact" would hold more than max_bytes; a number of probes or iterations
                out of range, an unknown method.
        """
        u = self.encode(x)
        volume = log_volume(
            self.decode,
            u,
            math.prod(self.input_shape),
            method,
            probes=probes,
            iterations=iterations,
            generator=generator,
            max_bytes=max_bytes,
        )
        density = -(u.square() / 2 + HALF_LOG_2PI).sum(1)
        return Estimate(density - volume.value, volume.error)

    @torch.no_grad()
    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """n points on the manifold: u ~ N(0, temperature^2), v = 0.

        `generator` is one of the device that the model is on.
        """
        return self.decode(sample_normal(self, n, self.manifold_dim, temperature, generator))


def sample_normal(
    model: nn.Module, n: int, dim: int, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """(n, dim) of N(0, temperature^2) on the device and in the dtype of the model's parameters."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    like = next(model.parameters())
    normal = torch.randn(n, dim, generator=generator, device=like.device, dtype=like.dtype)
    return temperature * normal
