r"""Choose a manifold from data: which latent pixels, and how many.

The flow should be trained for a while first. Both choices use J = dx/dz, the Jacobian of f^-1 at
the latents z of the data:

    importance_i   the mean over the data of z_i^2 |J_i|^2, where J_i is column i: to first order,
                   the squared change of the reconstruction if z_i is set to 0.
    spectrum       the singular values of J. A flow that maximizes likelihood maps the data to unit
                   variance, so these are the local standard deviations of the data: large along the
                   manifold and as small as the noise off it. Horvat and Pfister (NeurIPS 2022)
                   also read the dimension from them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.models.chart import check_manifold_dim
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.volume import PASS_ELEMENTS, jacobians
from mflow_kernels.ops.checks import check_count

LEAST_GAP = 2.0  # smallest ratio of neighbouring singular values that counts as a step


class IntrinsicDimension(NamedTuple):
    """The dimension d that the spectrum of a flow's Jacobian indicates.

    Attributes:
        dimension: d, the place of the largest step in the spectrum. It is D if no two neighbours
            differ by a factor of 2 or more.
        gap: the largest ratio of neighbours, spectrum[d - 1] / spectrum[d] if there is a step.
        spectrum: (D,) float64, the geometric mean over the data of the singular values, largest
            first.
    """

    dimension: int
    gap: float
    spectrum: Tensor


@torch.no_grad()
def estimate_intrinsic_dimension(
    flow: Bijection | ManifoldFlow, x: Tensor, *, max_bytes: int = 2**30
) -> IntrinsicDimension:
    """Estimate the dimension of the manifold near the data x, from the spectrum of a trained flow.

    This takes D Jacobian products per sample; some tens of samples are enough. A spectrum that
    falls without a step, as for natural images, has no clear answer: look at its plot
    (`mflow_kernels.evaluation.pictures.draw_spectrum`).

    Args:
        flow: a flow as for `ManifoldFlow`, trained by maximum likelihood on data with some noise,
            such as dequantization. The noise bounds the spectrum from below. If the flow is a
            `ManifoldFlow`, its latents off the manifold have the standard deviation sigma instead
            of 1, so their columns of J are multiplied by sigma.
        x: (N, *input_shape), N >= 1.
        max_bytes: memory that the Jacobian of one sample may use; it takes 8 D^2 bytes.

    Raises:
        ValueError: x has no samples or one dimension only, a Jacobian needs more than max_bytes or
            is not finite, or a ManifoldFlow has its penalty in the latent domain.
    """
    deviation = None
    if isinstance(flow, ManifoldFlow):
        if flow.objective.domain != "data":
            raise ValueError("flow: expected a penalty in the data domain, got the latent domain")
        off = torch.cat([mask.flatten() for mask in flow.off_masks()])
        deviation = 1 + off.double() * (flow.objective.sigma - 1)
        flow = flow.flow
    model = all_on_manifold(flow, x)
    if model.manifold_dim < 2:
        raise ValueError(f"flow: expected two dimensions or more, got {model.manifold_dim}")
    u = model.encode(x)
    parts = []
    for jacobian in jacobians(model.decode, u, u.shape[1], max_bytes):
        _check_finite(jacobian)
        columns = jacobian if deviation is None else jacobian * deviation
        parts.append(torch.linalg.svdvals(columns))
    tiny = torch.finfo(torch.float64).tiny
    logs = torch.cat(parts).clamp(min=tiny).log().mean(0)
    drops = logs[:-1] - logs[1:]
    gap = drops.max().exp().item()
    dimension = int(drops.argmax()) + 1 if gap >= LEAST_GAP else len(logs)
    return IntrinsicDimension(dimension, gap, logs.exp())


def latent_importance(
    flow: Bijection, x: Tensor, *, probes: int = 8, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Estimate how much each latent pixel contributes to the reconstruction, in squared units of x.

    The estimate uses E[(J^T w)_i^2] = |J_i|^2 for normal w, for all pixels at once, and takes
    `probes` backward passes per sample. Its relative error is about sqrt(6 / (N probes)) if z_i is
    normal.

    Args:
        flow: a flow as for `ManifoldFlow`, trained for a while.
        x: data, (N, *input_shape).
        probes: number of normal vectors w per sample, at least 1.
        generator: generator for the probes, on the device of x.

    Returns:
        One tensor per latent, with the latent's shape without N.

    Raises:
        ValueError: x has no samples, probes is too small, or an importance is not finite.
    """
    check_count("probes", probes, 1)
    model = all_on_manifold(flow, x)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, PASS_ELEMENTS // math.prod(x.shape[1:]))):
        with torch.no_grad():
            u = model.encode(part)
        u.requires_grad_()
        with torch.enable_grad():
            decoded = model.decode(u)
        for _ in range(probes):
            w = torch.randn(
                decoded.shape, generator=generator, dtype=decoded.dtype, device=decoded.device
            )
            (pulled,) = torch.autograd.grad(decoded, u, w, retain_graph=True)
            total = total + (u.detach() * pulled).double().square().sum(0)
    mean = total / (len(x) * probes)
    _check_finite(mean)
    return tuple(part[0].to(x.dtype) for part in model.unflatten(mean[None]))


def manifold_mask_from_data(
    flow: Bijection,
    x: Tensor,
    manifold_dim: int,
    *,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """Select the manifold_dim latent pixels that contribute most to the reconstruction of x.

    Pass the result to `ManifoldFlow(flow, mask=...)`. The other arguments are those of
    `latent_importance`. Ties go to the coarser latent and the later pixel.

    Returns:
        One bool tensor per latent, with the latent's shape without N: True if the pixel is u.
    """
    check_manifold_dim(manifold_dim, flow.latent_shapes)  # type: ignore[arg-type]
    importance = latent_importance(flow, x, probes=probes, generator=generator)
    flat = torch.cat([part.flatten() for part in importance])
    order = flat.flip(0).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[len(flat) - 1 - order[:manifold_dim]] = True
    parts = chosen.split([part.numel() for part in importance])
    return tuple(p.view(part.shape) for p, part in zip(parts, importance, strict=True))


def all_on_manifold(flow: Bijection, x: Tensor) -> ManifoldFlow:
    """Return the flow as a ManifoldFlow whose latents are all u; x needs at least one sample."""
    if not len(x):
        raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
    model = ManifoldFlow(flow, sum(math.prod(shape) for shape in flow.latent_shapes))  # type: ignore[union-attr]
    return model.to(next(flow.parameters(), x).device)


def _check_finite(found: Tensor) -> None:
    if not found.isfinite().all():
        raise ValueError(
            "x: expected data that the flow maps to finite numbers, got numbers that are not finite"
        )
