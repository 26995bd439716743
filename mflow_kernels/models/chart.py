"""Density, distance, interpolation and sampling on a manifold with coordinates u."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.layers.distribution import FlowDistribution
from mflow_kernels.layers.flow import Context, for_each, numbered, sample_normal
from mflow_kernels.layers.model import Model
from mflow_kernels.models.mixture import GaussianMixture
from mflow_kernels.models.volume import Estimate, Method, log_volume
from mflow_kernels.ops.checks import check_broadcast, check_choice, check_count, check_tensor
from mflow_kernels.ops.penalty_functions import HALF_LOG_2PI


class Chart(nn.Module, Model):
    """The manifold {decode(u)} in the space of x, with a density p(u) of u (N, d).

    `ManifoldFlow` and `HierarchicalFlow` implement `encode`, `decode`, `lift` and `log_prob`; the
    other methods are built on these. A `context` is passed to the flows; it has one entry for each
    sample, or one for all, as for `Flow`. Each context has its own manifold and its own density.
    """

    input_shape: tuple[int, ...]
    manifold_dim: int
    prior: GaussianMixture | None  # p(u); without this attribute, or with None, N(0, I)

    def coordinates_log_prob(self, u: Tensor) -> Tensor:
        """Return log p(u) (N,) of coordinates u (N, d), in nats."""
        prior = getattr(self, "prior", None)
        return -normal_score(u) if prior is None else prior.log_prob(u)

    def sample_coordinates(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw u (n, d) from p(u). The temperature scales its deviation from the mean, of N(0, I)
        or of each component of a mixture."""
        if (prior := getattr(self, "prior", None)) is None:
            return sample_normal(self, (n, self.manifold_dim), temperature, generator)
        return prior.sample(n, temperature=temperature, generator=generator)

    def encode(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return the coordinates u (N, d) of the data x."""
        raise NotImplementedError

    def decode(self, u: Tensor, *, context: Context | None = None) -> Tensor:
        """Return the point on the manifold with coordinates u (N, d)."""
        raise NotImplementedError

    def lift(
        self,
        u: Tensor,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw v, and return x with coordinates u (N, d) and v, and log p(x) - log p(u) (N,).

        v, the coordinates off the manifold, come from p_V and are scaled by the temperature.
        """
        raise NotImplementedError

    def log_prob(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return log p(x) (N,) in the ambient space, in nats."""
        raise NotImplementedError

    def project(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Project x onto the manifold: decode(encode(x))."""
        return self.decode(self.encode(x, context=context), context=context)

    def distance(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return the Euclidean distance (N,) from x to its projection."""
        return (x - self.project(x, context=context)).flatten(1).norm(dim=1)

    def manifold_log_prob(
        self,
        x: Tensor,
        *,
        context: Context | None = None,
        method: Method = "exact",
        probes: int = 16,
        iterations: int = 64,
        generator: torch.Generator | None = None,
        max_bytes: int = 2**30,
    ) -> Estimate:
        """Return the log-density on the manifold (N,) at the projections of x.

        The unit is nats per d-dimensional volume of the manifold. The density is
        log p(u) - 1/2 log det J^T J with u = encode(x) and J = d decode(u) / du, D x d, as for
        M-flows (arXiv 2003.13913, section 2).

        The result is differentiable in x and the parameters. Even in a reversible flow, both
        methods store activations as plain torch does: d or `probes` times those of `decode`. If you
        need no gradient, call this method under `torch.no_grad()`.

        Args:
            x: (N, *input_shape).
            context: one for each sample, or one for all.
            method: "exact" takes d Jacobian products per sample. "hutchinson" estimates the
                log-determinant for large d; each sample takes about 2 * probes products per
                Lanczos step.
            probes: number of random vectors of an estimate, at least 2. The error falls as
                1 / sqrt(probes).
            iterations: largest number of Lanczos (conjugate gradient) steps.
            generator: generator for the probes, on the model's device.
            max_bytes: memory that "exact" may use for Jacobians; one sample takes 8 D d bytes.

        Returns:
            `value` and `error`, (N,) each. The error is the standard error over the probes plus an
            extrapolation of what further steps would change (infinite after fewer than three
            steps). It is zero for "exact".

        Raises:
            ValueError: "exact" needs more than max_bytes, probes or iterations is out of range, or
                the method is unknown.
        """
        check_choice("method", method, ("exact", "hutchinson"))
        check_count("probes", probes, 2)
        check_count("iterations", iterations, 1)
        dimensions = math.prod(self.input_shape)
        if self.manifold_dim == dimensions:  # the manifold is the whole space
            value = self.log_prob(x, context=context)
            return Estimate(value, torch.zeros_like(value))
        u = self.encode(x, context=context)
        volume = log_volume(
            self.decode,
            u,
            dimensions,
            method,
            context=for_each(context, u, self),
            probes=probes,
            iterations=iterations,
            generator=generator,
            max_bytes=max_bytes,
        )
        return Estimate(self.coordinates_log_prob(u) - volume.value, volume.error)

    def interpolate(
        self, x0: Tensor, x1: Tensor, steps: int, *, context: Context | None = None
    ) -> Tensor:
        """Return points on the manifold from the projection of x0 to the projection of x1.

        The path is a straight line in u, so every point lies on the manifold. Glow interpolates
        latents in the same way (arXiv 1807.03039, section 6).

        Args:
            x0, x1: the two ends, (N, *input_shape) each.
            steps: number of points including both ends, at least 2.
            context: one for each of the N paths, or one for all.

        Returns:
            (steps, N, *input_shape).
        """
        check_count("steps", steps, 2)
        if x0.shape != x1.shape:
            raise ValueError(
                f"x1: expected the shape of x0 {tuple(x0.shape)}, got {tuple(x1.shape)}"
            )
        u0, u1 = self.encode(x0, context=context), self.encode(x1, context=context)
        t = torch.linspace(0, 1, steps, dtype=u0.dtype, device=u0.device).view(-1, 1, 1)
        path = torch.lerp(u0, u1, t)
        each = for_each(context, x0, self)
        repeated = None if each is None else torch.cat([each] * steps)
        return self.decode(path.flatten(0, 1), context=repeated).unflatten(0, (steps, len(u0)))

    def most_probable(
        self,
        x: Tensor,
        deviation: float,
        known: Tensor | None = None,
        *,
        steps: int = 200,
        context: Context | None = None,
    ) -> Tensor:
        """Return the most probable u of x with noise, and with missing pixels.

        u minimizes -log p(u) + sum over known pixels of (x - decode(u))^2 / (2 deviation^2). It is
        the most probable u, if x is a point on the manifold with noise of this deviation. Adam
        starts from encode(x), after decode(0) has filled in the missing pixels of x, or from 0
        where that is more probable. Each sample is fitted alone. `decode(most_probable(x,
        deviation))` removes noise that is far from the manifold, where `project` can be wrong: a
        flow is trained to project points near its manifold.

        Args:
            x: (N, *input_shape). The values of missing pixels do not matter, NaN included.
            deviation: standard deviation of the known pixels off the manifold, > 0; for example
                `deviation(training_data)`, or that of the noise.
            known: bool mask that broadcasts to x: True for known pixels, None for all. Each sample
                may have its own.
            steps: number of steps of Adam; each takes one forward and one backward pass.
            context: one for each sample, or one for all.

        Returns:
            u (N, d), without gradients.

        Raises:
            TypeError, ValueError: known is not bool or does not broadcast, deviation is not a
                finite number > 0, or steps is not an integer >= 1.
        """
        check_count("steps", steps, 1)
        if not 0 < deviation < math.inf:
            raise ValueError(f"deviation: expected a finite number > 0, got {deviation}")
        known = _expanded(x, torch.ones_like(x, dtype=torch.bool) if known is None else known)

        def score(u: Tensor, decoded: Tensor) -> Tensor:
            error = torch.where(known, x - decoded, 0.0).flatten(1).square().sum(1)
            return error / (2 * deviation**2) - self.coordinates_log_prob(u)

        with torch.no_grad():
            zero = x.new_zeros(len(x), self.manifold_dim)
            mode = self.decode(zero, context=context)
            start = self.encode(torch.where(known, x, mode), context=context)
            worse = score(start, self.decode(start, context=context)) > score(zero, mode)
        u = torch.where(worse[:, None], zero, start).requires_grad_()
        adam = torch.optim.Adam([u], lr=0.1)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            with torch.enable_grad():
                loss = score(u, self.decode(u, context=context)).sum()
            (u.grad,) = torch.autograd.grad(loss, u)
            adam.step()
            falling.step()
        return u.detach()

    @torch.no_grad()
    def inpaint(
        self,
        x: Tensor,
        known: Tensor,
        deviation: float,
        *,
        steps: int = 200,
        context: Context | None = None,
    ) -> Tensor:
        """Return x with its missing pixels filled in from decode(u), where u is `most_probable`.

        The arguments and errors are those of `most_probable`; the result has no gradients.
        """
        u = self.most_probable(x, deviation, known, steps=steps, context=context)
        return torch.where(_expanded(x, known), x, self.decode(u, context=context))

    @torch.no_grad()
    def deviation(self, x: Tensor, *, context: Context | None = None) -> float:
        """Return the standard deviation of the data x off the manifold, per direction.

        The deviation is sqrt(mean(distance^2) / (D - d)), or 0 if d = D. `ood_score` compares
        distances with the deviation of the training data.
        """
        if not len(x):
            raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
        off = math.prod(self.input_shape) - self.manifold_dim
        if not off:
            return 0.0
        return math.sqrt(self.distance(x, context=context).double().square().mean().item() / off)

    def ood_score(
        self,
        x: Tensor,
        deviation: float | None = None,
        *,
        context: Context | None = None,
        volume: bool = True,
        **density: Any,
    ) -> Tensor:
        """Score how far each sample of x is out of distribution, (N,) in nats; larger is farther.

        The score is the negative log-density of a model that draws a point on the manifold and adds
        N(0, deviation^2) in each of the D - d directions off it:

            -log p(projection) + distance^2 / (2 deviation^2) + (D - d) / 2 log(2 pi deviation^2)

        p is the density on the manifold, `manifold_log_prob`. The abstract of arXiv 2308.13792 (v1)
        says that neither this density nor the distance is sufficient alone. Their sum, and with it
        their relative weight, is this package's choice.

        Args:
            x: (N, *input_shape).
            deviation: unit of the distances, > 0; `deviation(training_data)` computes it. It is
                required.
            context: one for each sample, or one for all.
            volume: whether p is the density on the manifold. If False, p is the density of u,
                p(u), without the volume term 1/2 log det J^T J. The score then takes two
                passes through the flow, for any number of dimensions.
            density: keyword arguments of `manifold_log_prob`.
        """
        if deviation is None:
            name = type(self).__name__
            raise TypeError(
                "deviation: expected a number > 0, got none; "
                f"{name}.deviation(training_data) computes it"
            )
        if not 0 < deviation < math.inf:
            raise ValueError(f"deviation: expected a finite number > 0, got {deviation}")
        u = self.encode(x, context=context)
        distance = (x - self.decode(u, context=context)).flatten(1).norm(dim=1)
        off = off_manifold_score(distance, deviation, math.prod(self.input_shape) - u.shape[1])
        if not volume:
            return off - self.coordinates_log_prob(u)
        return off - self.manifold_log_prob(x, context=context, **density).value

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        off_manifold: bool = False,
    ) -> Tensor:
        """Draw n points on the manifold: u from `sample_coordinates`, v = 0.

        With `off_manifold`, v is drawn from p_V and scaled by the temperature; at a temperature of
        1 the points then have the density `log_prob`. `generator` must be on the model's device;
        `context` has one entry for each point, or one for all.
        """
        u = self.sample_coordinates(n, temperature=temperature, generator=generator)
        if off_manifold:
            return self.lift(u, context=context, temperature=temperature, generator=generator)[0]
        return self.decode(u, context=context)

    def sample_and_log_prob(
        self,
        n: int,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw n points as `sample(n, off_manifold=True)` does; return them with their `log_prob`.

        One inverse pass computes both. Both have gradients with respect to the parameters and the
        context, u and v being constant.
        """
        u = self.sample_coordinates(n, temperature=temperature, generator=generator)
        x, outside = self.lift(u, context=context, temperature=temperature, generator=generator)
        return x, outside + self.coordinates_log_prob(u.to(outside.dtype))

    def distribution(
        self, context: Context | None = None, *, generator: torch.Generator | None = None
    ) -> FlowDistribution:
        """Return p(x), the density `log_prob`, as a `torch.distributions.Distribution`.

        Its samples have random v, as those of `sample_and_log_prob`. The rest is as for
        `Flow.distribution`.
        """
        return FlowDistribution(self, self.input_shape, numbered(context, self), generator)


def check_manifold_dim(manifold_dim: int, latent_shapes: tuple[tuple[int, ...], ...]) -> None:
    """Check that manifold_dim is an integer from 1 to the number of latent pixels."""
    total = sum(math.prod(shape) for shape in latent_shapes)
    check_count("manifold_dim", manifold_dim, 1, total)


def off_manifold_score(distance: Tensor, deviation: float, dims: int) -> Tensor:
    """Return -log N(distance; 0, deviation^2) in `dims` directions off the manifold, (N,)."""
    squared = (distance / deviation).square() / 2 if dims else torch.zeros_like(distance)
    return squared + dims * (HALF_LOG_2PI + math.log(deviation))


def normal_score(u: Tensor) -> Tensor:
    """Return -log N(u; 0, I), (N,)."""
    return (u.square() / 2 + HALF_LOG_2PI).sum(1)


def _expanded(x: Tensor, known: Tensor) -> Tensor:
    """Return the mask of known pixels in the shape of x."""
    check_broadcast("known", check_tensor("known", known, (torch.bool,)), tuple(x.shape))
    return known.expand(x.shape)
