"""A flow whose latent pixels are split into coordinates u on a manifold and v off it."""

import copy
import math
import warnings

import torch
from torch import Tensor

from mflow_kernels.layers import Bijection, ReversibleChain
from mflow_kernels.layers.flow import Context, check_temperature, given
from mflow_kernels.models.chart import Chart, check_manifold_dim
from mflow_kernels.models.images import warn_of_raw_images
from mflow_kernels.models.objectives import ManifoldObjective, Terms
from mflow_kernels.ops.checks import check_tensor


class ManifoldFlow(Chart):
    """A flow that learns a manifold and the density on it, in one step (arXiv 2206.03293).

    A mask divides the latent pixels of the flow f into u and v. u are coordinates on the manifold
    {f^-1(u, 0)}; v is zero on it. All methods take and return u as a vector (N, d). They pass a
    `context` on to the flow, which then has one manifold and density for each context.

    Args:
        flow: `Glow`, `VectorFlow`, `ReversibleChain` with an `input_shape`, or any bijection from
            x to latents (a tensor or a tuple) with the attributes `input_shape` and
            `latent_shapes`. Its `inverse` takes a tuple.
        manifold_dim: d, from 1 to the dimension of the data. The d latent pixels of u come from
            the coarsest latents first, and from the last channels of each latent first. If only
            part of a channel is needed, its pixels are spread evenly. A larger d keeps all pixels
            of a smaller one.
        mask: one bool tensor per latent, True where a pixel belongs to u. Each must broadcast to
            the latent's shape without N. If all are True, the manifold is the whole space and the
            objective is the plain likelihood. If all are False, d is 0, the manifold is the point
            f^-1(0), and the objective is the penalty alone. Both cases raise a warning.
        objective: the training loss; it also defines p_V, the density of v. The model keeps a copy.
            The default for images, `ManifoldObjective()`, suits images with a range of 1. The
            default for vectors, `ManifoldObjective(weight=1.0)`, suits data of unit variance, such
            as u of another flow: a standard normal coordinate e costs e^2 / 2 more off the manifold
            than on it, which is 0.5 nats on average.

    Raises:
        TypeError: the mask is not a tuple of bool tensors, the flow's `input_shape` or
            `latent_shapes` is missing or None, or the objective is not a ManifoldObjective.
        ValueError: manifold_dim and mask are both missing or disagree, the dimension is out of
            range, or a mask or a map of weights does not broadcast.
    """

    def __init__(
        self,
        flow: Bijection,
        manifold_dim: int | None = None,
        *,
        mask: tuple[Tensor, ...] | None = None,
        objective: ManifoldObjective | None = None,
    ) -> None:
        super().__init__()
        if any(getattr(flow, name, None) is None for name in ("input_shape", "latent_shapes")):
            actual = type(flow).__name__
            if isinstance(flow, ReversibleChain):
                actual += " without an input_shape"
            raise TypeError(
                f"flow: expected a bijection with input_shape and latent_shapes, got {actual}"
            )
        if getattr(flow, "masked", False):
            raise ValueError("flow: expected a flow without a mask, got one with masked=True")
        if not isinstance(objective, (ManifoldObjective, type(None))):
            actual = type(objective).__name__
            raise TypeError(f"objective: expected a ManifoldObjective, got {actual}")
        self.flow = flow
        self.input_shape: tuple[int, ...] = flow.input_shape  # type: ignore[assignment]
        self.latent_shapes: tuple[tuple[int, ...], ...] = flow.latent_shapes  # type: ignore[assignment]
        if objective is None:
            is_image = len(self.input_shape) > 1
            objective = ManifoldObjective() if is_image else ManifoldObjective(weight=1.0)
        self.objective = copy.deepcopy(objective)
        self.objective.check_fits(self)
        with torch.device("cpu"):  # the choice is read here, and a flow on "meta" has no values
            flat = _on_mask(manifold_dim, mask, self.latent_shapes)
        self.manifold_dim = int(flat.sum())
        device = next(flow.parameters(), flat).device
        for i, part in enumerate(self.unflatten((~flat)[None])):
            # The penalty reads mask and latent together, and latents of images are channels_last.
            off = part[0].movedim(0, -1).contiguous().movedim(-1, 0)
            self.register_buffer(f"off_mask_{i}", off.to(device))
        self.register_buffer("manifold_index", flat.nonzero()[:, 0].to(device))

    def latents(
        self, x: Tensor, *, context: Context | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return all latents of x, and log |det df/dx| (N,)."""
        z, logdet = self.flow(x, *given(context, x, self.flow))
        return z if isinstance(z, tuple) else (z,), logdet

    def off_masks(self) -> tuple[Tensor, ...]:
        """Return one bool tensor per latent, with its shape without N: True if a pixel is v."""
        return tuple(getattr(self, f"off_mask_{i}") for i in range(len(self.latent_shapes)))

    def gather(self, latents: tuple[Tensor, ...]) -> Tensor:
        """Collect u (N, d) from all latents."""
        flat = torch.cat([z.flatten(1) for z in latents], dim=1)
        return flat.index_select(1, self.manifold_index)  # type: ignore[arg-type]

    def scatter(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return all latents with u (N, d) in place and v = 0."""
        if check_tensor("u", u).dim() != 2 or u.shape[1] != self.manifold_dim:
            raise ValueError(f"u: expected shape (N, {self.manifold_dim}), got {tuple(u.shape)}")
        total = sum(math.prod(shape) for shape in self.latent_shapes)
        flat = u.new_zeros(u.shape[0], total)
        return self.unflatten(flat.index_copy(1, self.manifold_index, u))  # type: ignore[arg-type]

    def unflatten(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Split a vector (N, D) into all latents."""
        sizes = [math.prod(shape) for shape in self.latent_shapes]
        parts = flat.split(sizes, dim=1)
        return tuple(
            part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=True)
        )

    def terms(self, x: Tensor, *, context: Context | None = None) -> Terms:
        """Return the objective and its parts on the data x, (N,) each, in nats."""
        return self.objective(self, x, context)

    def encode(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return the coordinates u (N, d) of the data x."""
        warn_of_raw_images(self, x)
        return self.gather(self.latents(x, context=context)[0])

    def decode(self, u: Tensor, *, context: Context | None = None) -> Tensor:
        """Return f^-1(u, 0), the point on the manifold with coordinates u (N, d)."""
        return self.flow.inverse(self.scatter(u), *given(context, u, self.flow))[0]

    def lift(
        self,
        u: Tensor,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_temperature(temperature)
        latents = self.objective.draw_off_manifold(
            self.scatter(u), self.off_masks(), temperature, generator
        )
        x, logdet = self.flow.inverse(latents, *given(context, u, self.flow))
        return x, self.objective.off_density(self, latents) - logdet

    def log_prob(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return log p(x) (N,) in the ambient space, in nats."""
        warn_of_raw_images(self, x)
        return self.objective.log_likelihood(self, x, context)

    @torch.no_grad()
    def initialize(
        self, x: Tensor, *, context: Context | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Initialize the flow's actnorms from a first batch x, and return `latents(x)`.

        See `ActNorm`.
        """
        z, logdet = self.flow.initialize(x, *given(context, x, self.flow))
        return z if isinstance(z, tuple) else (z,), logdet


def _on_mask(
    manifold_dim: int | None, mask: tuple[Tensor, ...] | None, shapes: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Return a bool vector (D,) over all latents: True if a pixel is u."""
    total = sum(math.prod(shape) for shape in shapes)
    if mask is not None:
        flat = _flat_mask(mask, shapes)
        chosen = int(flat.sum())
        if manifold_dim is not None and manifold_dim != chosen:
            raise ValueError(
                f"manifold_dim, mask: expected the same dimension, got manifold_dim={manifold_dim} "
                f"and a mask with {chosen}"
            )
        if chosen == total:
            warnings.warn(
                "mask: all latent pixels are u, so the manifold is the whole space and the "
                "objective is the plain likelihood",
                stacklevel=3,
            )
        elif not chosen:
            warnings.warn(
                "mask: no latent pixel is u, so the manifold is one point and the objective is "
                "the penalty alone",
                stacklevel=3,
            )
        return flat
    if manifold_dim is None:
        raise ValueError("manifold_dim, mask: expected at least one of them, got neither")
    check_manifold_dim(manifold_dim, shapes)
    flat = torch.zeros(total, dtype=torch.bool)
    flat[_coarsest_first(shapes)[:manifold_dim]] = True
    return flat


def _coarsest_first(shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return all D latent pixels in the order in which `manifold_dim` takes them."""
    parts: list[Tensor] = []
    offset = 0
    for channels, *plane in shapes:
        size = math.prod(plane)
        pixels = _evenly(*plane) if len(plane) == 2 else torch.arange(size)
        first = size * torch.arange(channels - 1, -1, -1)
        parts.insert(0, offset + (first[:, None] + pixels).flatten())
        offset += channels * size
    return torch.cat(parts)


def _evenly(height: int, width: int) -> Tensor:
    """Return the pixels of a plane, in an order whose first k pixels cover it evenly, for any k.

    The order goes along the diagonals of a lattice, whose step is near the golden section of the
    width. In a square plane, the numbers of the first k pixels in two rows, or in two columns,
    differ by at most one.
    """
    rows = torch.arange(height) * _golden_step(height) % height
    diagonals = torch.arange(width) * _golden_step(width) % width
    columns = (rows * _golden_step(width) + diagonals[:, None]) % width
    return (rows * width + columns).flatten()


def _golden_step(n: int) -> int:
    """Return the number coprime to n that is nearest to the golden section of n."""
    section = n * (3 - math.sqrt(5)) / 2
    steps = (step for step in range(1, n + 1) if math.gcd(step, n) == 1)
    return min(steps, key=lambda step: abs(step - section))


def _flat_mask(mask: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    if not isinstance(mask, tuple) or not all(isinstance(part, Tensor) for part in mask):
        raise TypeError(f"mask: expected a tuple of tensors, got {type(mask).__name__}")
    if any(part.dtype != torch.bool for part in mask):
        raise TypeError(f"mask: expected dtype bool, got {[part.dtype for part in mask]}")
    try:
        parts = [part.expand(shape) for part, shape in zip(mask, shapes, strict=True)]
    except (RuntimeError, ValueError):
        actual = tuple(tuple(part.shape) for part in mask)
        raise ValueError(
            f"mask: expected one mask per latent that can broadcast to {shapes}, got {actual}"
        ) from None
    return torch.cat([part.flatten() for part in parts])
