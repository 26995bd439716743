r"""Choosing a manifold from data, after a warm-up of the flow: which latent pixels, and how many.

Both look at J = dx/dz, the Jacobian of f^-1 at the latents z of the data:

    importance_i   mean over the data of z_i^2 |J_i|^2, J_i the i-th column: how far, squared, the
                   reconstruction moves to first order where z_i alone goes to 0.
    spectrum       the singular values of J. A flow that was trained to likelihood maps the data to
                   unit variance, so that they are the local standard deviations of the data:
                   large along the manifold, of the noise's size off it (Horvat and Pfister, NeurIPS
                   2022, read the dimension from them too).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.models.manifold import ManifoldFlow, check_manifold_dim
from mflow_kernels.models.volume import PASS, jacobians
from mflow_kernels.ops.checks import check_count

LEAST_GAP = 2.0


class IntrinsicDimension(NamedTuple):
    """The spectrum (D,) of a flow's Jacobian, largest first, and what dimension it speaks for.

    spectrum is the geometric mean over the data, float64; gap = spectrum[d - 1] / spectrum[d] is
    the largest ratio of neighbours. Where no ratio is 2 or more, the spectrum has no step to tell a
    manifold by: d = D, and gap is that largest ratio.
    """

    dimension: int
    gap: float
    spectrum: Tensor


@torch.no_grad()
def estimate_intrinsic_dimension(
    flow: Bijection, x: Tensor, *, max_bytes: int = 2**30
) -> IntrinsicDimension:
    """The dimension of the manifold that data x lies near, by the spectrum of a trained flow.

    Costs D Jacobian products for each sample: some tens of samples do. A spectrum that falls
    without a step (as natural images' does) has no one answer: look at its picture
    (`mflow_kernels.evaluation.pictures.draw_spectrum`).

    Args:
        flow: trained to likelihood on data with some noise, e.g. of dequantization, which bounds
            the spectrum from below; as for `ManifoldFlow`.
        x: (N, *input_shape), N >= 1.
        max_bytes: of the Jacobian of one sample, 8 D^2.

    Raises:
        ValueError: no samples, one dimension alone, a Jacobian that needs more than max_bytes or
            is not finite.
    """
    whole = _whole(flow, x)
    if whole.manifold_dim < 2:
        raise ValueError(f"flow: expected two dimensions or more, got {whole.manifold_dim}")
    u = whole.encode(x)
    parts = []
    for jacobian in jacobians(whole.decode, u, u.shape[1], max_bytes):
        _check_finite(jacobian)
        parts.append(torch.linalg.svdvals(jacobian))
    tiny = torch.finfo(torch.float64).tiny
    logs = torch.cat(parts).clamp(min=tiny).log().mean(0)
    drops = logs[:-1] - logs[1:]
    gap = drops.max().exp().item()
    dimension = int(drops.argmax()) + 1 if gap >= LEAST_GAP else len(logs)
    return IntrinsicDimension(dimension, gap, logs.exp())


def latent_importance(
    flow: Bijection, x: Tensor, *, probes: int = 8, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """How much of the reconstruction each latent pixel carries, in squared units of x.

    Estimated for all pixels at once from E[(J^T w)_i^2] = |J_i|^2 with normal w: `probes` backward
    passes a sample; its relative error is near sqrt(6 / (N probes)) where z_i is normal.

    Args:
        flow: as for `ManifoldFlow`, trained for a while.
        x: (N, *input_shape), data.
        probes: normal vectors w for each sample, at least 1.
        generator: of the probes, on the device of x.

    Returns:
        One tensor for each latent, of its shape without N.

    Raises:
        ValueError: no samples, no probes, or an importance that is not finite.
    """
    check_count("probes", probes, 1)
    whole = _whole(flow, x)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, PASS // math.prod(x.shape[1:]))):
        with torch.no_grad():
            u = whole.encode(part)
        u.requires_grad_()
        with torch.enable_grad():
            decoded = whole.decode(u)
        for _ in range(probes):
            w = torch.randn(
                decoded.shape, generator=generator, dtype=decoded.dtype, device=decoded.device
            )
            (pulled,) = torch.autograd.grad(decoded, u, w, retain_graph=True)
            total = total + (u.detach() * pulled).double().square().sum(0)
    mean = total / (len(x) * probes)
    _check_finite(mean)
    return tuple(part[0].to(x.dtype) for part in whole.unflatten(mean[None]))


def manifold_mask_from_data(
    flow: Bijection,
    x: Tensor,
    manifold_dim: int,
    *,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """The mask of the manifold_dim latent pixels that carry most of the reconstruction of x.

    `ManifoldFlow(flow, mask=...)` takes it. Arguments as for `latent_importance`; of equals the
    coarser and later latent is taken, as by `ManifoldFlow(flow, manifold_dim)`.

    Returns:
        One bool tensor for each latent, of its shape without N: True where the pixel is u.
    """
    check_manifold_dim(manifold_dim, flow.latent_shapes)  # type: ignore[arg-type]
    importance = latent_importance(flow, x, probes=probes, generator=generator)
    flat = torch.cat([part.flatten() for part in importance])
    order = flat.flip(0).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[len(flat) - 1 - order[:manifold_dim]] = True
    sizes = [part.numel() for part in importance]
    parts = chosen.split(sizes)
    return tuple(p.view(part.shape) for p, part in zip(parts, importance, strict=True))


def _whole(flow: Bijection, x: Tensor) -> ManifoldFlow:
    """The flow with all of its latents u, for data x of at least one sample."""
    if not len(x):
        raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
    whole = ManifoldFlow(flow, sum(math.prod(shape) for shape in flow.latent_shapes))  # type: ignore[union-attr]
    return whole.to(next(flow.parameters(), x).device)


def _check_finite(found: Tensor) -> None:
    if not found.isfinite().all():
        raise ValueError("x: expected data that the flow maps to finite numbers, got other data")
