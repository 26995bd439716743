"""What a manifold with coordinates u answers, whatever flows those coordinates come from."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.models.volume import Estimate, Method, log_volume
from mflow_kernels.ops.checks import check_choice, check_count

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
        check_choice("method", method, ("exact", "hutchinson"))
        check_count("probes", probes, 2)
        check_count("iterations", iterations, 1)
        dimensions = math.prod(self.input_shape)
        if self.manifold_dim == dimensions:  # the log-determinant knows it
            value = self.log_prob(x)
            return Estimate(value, torch.zeros_like(value))
        u = self.encode(x)
        volume = log_volume(
            self.decode,
            u,
            dimensions,
            method,
            probes=probes,
            iterations=iterations,
            generator=generator,
            max_bytes=max_bytes,
        )
        density = -(u.square() / 2 + HALF_LOG_2PI).sum(1)
        return Estimate(density - volume.value, volume.error)

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Points on the manifold from the projection of x0 to that of x1.

        Straight in u, as between latents in Glow (arXiv 1807.03039, section 6), so that no point
        leaves the manifold.

        Args:
            x0, x1: (N, *input_shape), ends.
            steps: how many points, ends included, at least 2.

        Returns:
            (steps, N, *input_shape).
        """
        check_count("steps", steps, 2)
        if x0.shape != x1.shape:
            raise ValueError(
                f"x1: expected the shape of x0 {tuple(x0.shape)}, got {tuple(x1.shape)}"
            )
        u0, u1 = self.encode(x0), self.encode(x1)
        t = torch.linspace(0, 1, steps, dtype=u0.dtype, device=u0.device).view(-1, 1, 1)
        path = torch.lerp(u0, u1, t)
        return self.decode(path.flatten(0, 1)).unflatten(0, (steps, len(u0)))

    @torch.no_grad()
    def deviation(self, x: Tensor) -> float:
        """Standard deviation of data x from the manifold in each of the D - d directions off it.

        The root of the mean squared distance over D - d, of a set of training data; 0 where d = D.
        What `ood_score` compares distances with.
        """
        if not len(x):
            raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
        off = math.prod(self.input_shape) - self.manifold_dim
        return math.sqrt(self.distance(x).double().square().mean().item() / off) if off else 0.0

    def ood_score(self, x: Tensor, deviation: float, **density: Any) -> Tensor:
        """How far x (N,) is out of the distribution, nats: its density and its distance in one.

        The negative log-density of a point on the manifold, moved off it in the D - d directions
        there by N(0, deviation^2):

            -log p(projection) + distance^2 / (2 deviation^2) + (D - d) / 2 log(2 pi deviation^2)

        with the density on the manifold, `manifold_log_prob`. After arXiv 2308.13792, by the
        abstract of whose first version density on the manifold and distance to it are each
        insufficient alone. The sum, and so their relative weight, is our choice.

        Args:
            x: (N, *input_shape).
            deviation: what distances are measured in, > 0: `deviation(training data)`.
            density: how to compute the density, as for `manifold_log_prob`.
        """
        if not 0 < deviation < math.inf:
            raise ValueError(f"deviation: expected a finite number > 0, got {deviation}")
        off = math.prod(self.input_shape) - self.manifold_dim
        squared = (self.distance(x) / deviation).square() / 2 if off else 0.0
        constant = off * (HALF_LOG_2PI + math.log(deviation))
        return squared + constant - self.manifold_log_prob(x, **density).value

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
    check_count("n", n, 1)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    like = next(model.parameters())
    normal = torch.randn(n, dim, generator=generator, device=like.device, dtype=like.dtype)
    return temperature * normal
