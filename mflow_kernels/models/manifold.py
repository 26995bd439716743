"""A flow whose latent space is part manifold, part off it."""

import copy
import math
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.models.chart import Chart
from mflow_kernels.models.objectives import ManifoldObjective, Terms
from mflow_kernels.ops.checks import check_count, check_tensor


class ManifoldFlow(Chart):
    """One flow, trained in one step, that learns a manifold and the density on it.

    (arXiv 2206.03293.) A mask says which latent pixels are u, coordinates on the manifold
    {f^-1(u, 0)}; the rest are v. u is a vector (N, d) in all of these methods.

    Args:
        flow: `Glow`, `VectorFlow`, or any bijection from x to a tuple of latents that has
            `input_shape` and `latent_shapes`.
        manifold_dim: d, from 1 to the number of dimensions of the data: that many latent pixels,
            coarsest latents and, in a latent, last channels first.
        mask: one bool tensor for each latent that broadcasts to its shape without N: True where the
            pixel is u. All True: the manifold is the whole space, and the objective is plain
            likelihood. All False: the manifold is the one point f^-1(0), d = 0, and the objective
            is pure penalty. A warning says so.
        objective: the loss that it is trained with, and p_V with it; the model keeps a copy.

    Raises:
        TypeError: a mask is not of bool tensors; a flow without the two shapes; an objective that
            is none.
        ValueError: neither manifold_dim nor mask is given, or both of different dimensions; the
            dimension is out of range; a mask, or a map of weights, does not broadcast.
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
        if not (hasattr(flow, "input_shape") and hasattr(flow, "latent_shapes")):
            came = type(flow).__name__
            raise TypeError(
                f"flow: expected a bijection with input_shape and latent_shapes, got {came}"
            )
        if not isinstance(objective, ManifoldObjective | None):
            came = type(objective).__name__
            raise TypeError(f"objective: expected a ManifoldObjective, got {came}")
        self.flow = flow
        self.input_shape: tuple[int, ...] = flow.input_shape  # type: ignore[assignment]
        self.latent_shapes: tuple[tuple[int, ...], ...] = flow.latent_shapes  # type: ignore[assignment]
        self.objective = copy.deepcopy(objective) or ManifoldObjective()
        self.objective.check_fits(self)
        flat = _choose(manifold_dim, mask, self.latent_shapes)
        self.manifold_dim = int(flat.sum())
        for i, part in enumerate(self.unflatten((~flat)[None])):
            # Channels last, as the latents of image flows are.
            off = part[0].movedim(0, -1).contiguous().movedim(-1, 0)
            self.register_buffer(f"off_mask_{i}", off)
        self.register_buffer("manifold_index", flat.nonzero()[:, 0])

    @staticmethod
    def from_pretrained(folder: str | Path) -> "ManifoldFlow":
        """The image flow of a folder that `mflow export` wrote: the model, or the first stage of a
        hierarchy. On the CPU and in evaluation mode; ValueError for torn or foreign files."""
        from mflow_kernels.models.pretrained import load_pretrained

        return cast(ManifoldFlow, load_pretrained(folder).stages[0])

    def latents(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """All latents of x and log |det df/dx| (N,)."""
        return self.flow(x)

    def off_masks(self) -> tuple[Tensor, ...]:
        """For each latent, bool of its shape: where its pixels are v."""
        return tuple(getattr(self, f"off_mask_{i}") for i in range(len(self.latent_shapes)))

    def gather(self, latents: tuple[Tensor, ...]) -> Tensor:
        """u (N, d) out of all latents."""
        flat = torch.cat([z.flatten(1) for z in latents], dim=1)
        return flat.index_select(1, self.manifold_index)  # type: ignore[arg-type]

    def scatter(self, u: Tensor) -> tuple[Tensor, ...]:
        """All latents with u (N, d) in its place and v = 0."""
        if check_tensor("u", u).dim() != 2 or u.shape[1] != self.manifold_dim:
            raise ValueError(f"u: expected shape (N, {self.manifold_dim}), got {tuple(u.shape)}")
        total = sum(math.prod(shape) for shape in self.latent_shapes)
        flat = u.new_zeros(u.shape[0], total)
        return self.unflatten(flat.index_copy(1, self.manifold_index, u))  # type: ignore[arg-type]

    def unflatten(self, flat: Tensor) -> tuple[Tensor, ...]:
        """All latents from one vector (N, D) of them."""
        sizes = [math.prod(shape) for shape in self.latent_shapes]
        parts = flat.split(sizes, dim=1)
        return tuple(
            part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=True)
        )

    def terms(self, x: Tensor) -> Terms:
        """The objective and its parts, (N,) each, nats."""
        return self.objective(self, x)

    def encode(self, x: Tensor) -> Tensor:
        """u (N, d) of the data x."""
        return self.gather(self.latents(x)[0])

    def decode(self, u: Tensor) -> Tensor:
        """f^-1(u, 0): the point on the manifold with coordinates u (N, d)."""
        return self.flow.inverse(self.scatter(u))[0]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) (N,) in the ambient space, nats."""
        return self.objective.log_likelihood(self, x)

    def initialize(self, x: Tensor) -> None:
        """Set the flow's actnorms from a first batch; once, see `ActNorm`."""
        self.flow.initialize(x)


def check_manifold_dim(manifold_dim: int, latent_shapes: tuple[tuple[int, ...], ...]) -> None:
    """ValueError where a flow of these latents has no manifold of that dimension, TypeError where
    it is no whole number."""
    total = sum(math.prod(shape) for shape in latent_shapes)
    check_count("manifold_dim", manifold_dim, 1, total)


def _choose(
    manifold_dim: int | None,
    mask: tuple[Tensor, ...] | None,
    shapes: tuple[tuple[int, ...], ...],
) -> Tensor:
    """Bool (D,), over all latents: which pixels are u."""
    total = sum(math.prod(shape) for shape in shapes)
    if mask is not None:
        flat = _flat_mask(mask, shapes)
        chosen = int(flat.sum())
        if manifold_dim is not None and manifold_dim != chosen:
            raise ValueError(
                f"manifold_dim, mask: expected one dimension, got manifold_dim={manifold_dim} and "
                f"a mask of {chosen}"
            )
        if chosen == total:
            warnings.warn(
                "mask: all latent pixels are u, so that the manifold is the whole space and the "
                "objective plain likelihood",
                stacklevel=3,
            )
        elif not chosen:
            warnings.warn(
                "mask: no latent pixel is u, so that the manifold is one point and the objective "
                "pure penalty",
                stacklevel=3,
            )
        return flat
    if manifold_dim is None:
        raise ValueError("manifold_dim, mask: expected one of the two, got neither")
    check_manifold_dim(manifold_dim, shapes)
    return torch.arange(total) >= total - manifold_dim


def _flat_mask(mask: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    if not isinstance(mask, tuple) or not all(isinstance(part, Tensor) for part in mask):
        raise TypeError(f"mask: expected a tuple of tensors, got {type(mask).__name__}")
    if any(part.dtype != torch.bool for part in mask):
        raise TypeError(f"mask: expected dtype bool, got {[part.dtype for part in mask]}")
    try:
        parts = [part.expand(shape) for part, shape in zip(mask, shapes, strict=True)]
    except (RuntimeError, ValueError):
        came = tuple(tuple(part.shape) for part in mask)
        raise ValueError(
            f"mask: expected one mask a latent, that broadcast to {shapes}, got {came}"
        ) from None
    return torch.cat([part.flatten() for part in parts])
