"""Densities on curves and surfaces in R^3, known in closed form."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Target(ABC):
    """A density on a manifold of dimension `dim` in R^3; all tensors are float64."""

    name: str
    dim: int

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points (n, 3)."""

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """Return the log-density (N,) per length or area at points x (N, 3) of the manifold."""

    @abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """Return the points of the manifold nearest to x (N, 3)."""

    def distance(self, x: Tensor) -> Tensor:
        """Return the Euclidean distance (N,) from x to the manifold."""
        return (x - self.nearest(x)).norm(dim=1)


class Circle(Target):
    """The unit circle in a tilted plane, with a mixture of two von Mises densities.

    The density has a minimum above zero, where a chart with one coordinate must tear.
    """

    name, dim = "circle", 1
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    means = torch.tensor([0.4, 2.6], dtype=torch.float64)
    concentrations = torch.tensor([4.0, 6.0], dtype=torch.float64)
    # Rows: the two axes of the plane, and its normal.
    axes = torch.linalg.qr(
        torch.tensor([[1.0, 0.3, 0.5], [0.2, 1.0, -0.4], [0.6, 0.1, 1.0]], dtype=torch.float64)
    )[0]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        angle = self.means[which] + _von_mises(self.concentrations[which], generator)
        return torch.stack([angle.cos(), angle.sin()], dim=1) @ self.axes[:2]

    def log_density(self, x: Tensor) -> Tensor:
        a, b = (x @ self.axes[:2].T).unbind(1)
        angle, k = torch.atan2(b, a)[:, None], self.concentrations
        norm = math.log(2 * math.pi) + torch.special.i0e(k).log()
        log_p = k * ((angle - self.means).cos() - 1) - norm
        return (log_p + self.weights.log()).logsumexp(1)

    def nearest(self, x: Tensor) -> Tensor:
        flat = x @ self.axes[:2].T
        return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12) @ self.axes[:2]


class Sphere(Target):
    """The unit sphere, with a mixture of three von Mises-Fisher densities."""

    name, dim = "sphere", 2
    weights = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    means = torch.nn.functional.normalize(
        torch.tensor([[0.2, 0.1, 1.0], [1.0, 0.6, 0.1], [-0.8, 0.9, 0.2]], dtype=torch.float64)
    )
    concentrations = torch.tensor([6.0, 5.0, 8.0], dtype=torch.float64)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        mean, k = self.means[which], self.concentrations[which]
        # Draw the cosine to the mean by its inverse distribution function, and a random direction.
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        cosine = 1 + (uniform + (1 - uniform) * (-2 * k).exp()).log() / k
        side = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        side = torch.nn.functional.normalize(side - (side * mean).sum(1, keepdim=True) * mean)
        return cosine[:, None] * mean + (1 - cosine**2).clamp_min(0).sqrt()[:, None] * side

    def log_density(self, x: Tensor) -> Tensor:
        k = self.concentrations
        norm = (2 * math.pi / k * (1 - (-2 * k).exp())).log()
        log_p = k * (x @ self.means.T - 1) - norm
        return (log_p + self.weights.log()).logsumexp(1)

    def nearest(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


class Paraboloid(Target):
    """z = (x^2 + y^2) / 2, with a mixture of three Gaussians over (x, y)."""

    name, dim = "paraboloid", 2
    curvature = 0.5  # a of z = a r^2
    weights = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    means = torch.tensor([[0.9, 0.2], [-0.7, 0.8], [-0.3, -0.9]], dtype=torch.float64)
    deviations = torch.tensor([0.35, 0.3, 0.4], dtype=torch.float64)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return self._lift(self.means[which] + self.deviations[which][:, None] * noise)

    def log_density(self, x: Tensor) -> Tensor:
        flat, s = x[:, :2], self.deviations
        squares = (flat[:, None] - self.means).square().sum(2) / s**2
        log_p = -squares / 2 - math.log(2 * math.pi) - 2 * s.log()
        slope_squared = (2 * self.curvature) ** 2 * flat.square().sum(1)
        area = torch.log1p(slope_squared) / 2
        return (log_p + self.weights.log()).logsumexp(1) - area

    def nearest(self, x: Tensor) -> Tensor:
        """Find the nearest points by bisection.

        Their distance r from the axis is the only positive root of
        2 a^2 r^3 + (1 - 2 a z0) r = r0.
        """
        a, r0, z0 = self.curvature, x[:, :2].norm(dim=1), x[:, 2]
        low = torch.zeros_like(r0)
        high = r0 + z0.abs().sqrt() / math.sqrt(a) + 1
        for _ in range(60):
            middle = (low + high) / 2
            beyond = 2 * a**2 * middle**3 + (1 - 2 * a * z0) * middle > r0
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return self._lift(x[:, :2] * (low / r0.clamp_min(1e-12))[:, None])

    def _lift(self, flat: Tensor) -> Tensor:
        return torch.cat([flat, self.curvature * flat.square().sum(1, keepdim=True)], dim=1)


TARGETS: dict[str, Target] = {target.name: target for target in (Circle(), Sphere(), Paraboloid())}


def _von_mises(k: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one angle for each concentration (Best and Fisher 1979), by rejection."""
    tau = 1 + (1 + 4 * k**2).sqrt()
    rho = (tau - (2 * tau).sqrt()) / (2 * k)
    r = (1 + rho**2) / (2 * rho)
    angle, todo = torch.zeros_like(k), torch.arange(len(k))
    while len(todo):
        u = torch.rand(3, len(todo), generator=generator, dtype=k.dtype)
        z = (math.pi * u[0]).cos()
        f = (1 + r[todo] * z) / (r[todo] + z)
        c = k[todo] * (r[todo] - f)
        accepted = ((c / u[1]).log() + 1 - c >= 0) | (c * (2 - c) > u[1])
        sign = torch.where(u[2] > 0.5, 1.0, -1.0)
        angle[todo[accepted]] = (sign * f.clamp(-1, 1).arccos())[accepted]
        todo = todo[~accepted]
    return angle
