r"""The local dimension of a model's density at each sample, at a scale.

Noise of deviation r fills every direction that is thinner than r. The density rho_r of data plus
such noise therefore falls as r^-(D - d) where the data have d directions that are thicker, so that

    d = D + d log rho_r(x) / d log r.

Kamkari et al. (arXiv 2403.18910) use the local dimension beside the likelihood to find data that a
model has not seen. This module takes x = f^-1(z) to first order, so rho_r is a normal density with
mean x - J z and covariance J J^T + r^2, where J = dx/dz. With the eigenpairs (l_i, v_i) of J^T J,

    d = sum_i l_i / (l_i + r^2) + sum_i r^2 l_i (v_i . z)^2 / (l_i + r^2)^2.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.models.chart import Chart
from mflow_kernels.models.selection import all_on_manifold
from mflow_kernels.models.volume import jacobians
from mflow_kernels.ops.precision import without_autocast


@torch.no_grad()
def local_dimension(
    model: Bijection | Chart,
    x: Tensor,
    scale: float,
    *,
    context: Tensor | None = None,
    max_bytes: int = 2**30,
) -> Tensor:
    """Return the dimension of the model's density near each sample, (N,).

    The first sum of the formula counts the directions in which the density is wider than `scale`,
    each between 0 and 1. The second grows for samples that are unusual in a direction of about that
    width, so the result of a single sample may exceed D.

    Args:
        model: a flow as for `ManifoldFlow`, whose latents are all used, or a `ManifoldFlow` or
            `HierarchicalFlow`. These use u only, at the projection of x.
        x: (N, *input_shape), N >= 1.
        scale: r, the deviation of the noise, in units of x, > 0. Directions thinner than that do
            not count; for 8-bit images 1 / 256 is the width of a level.
        context: one for each sample.
        max_bytes: memory that the Jacobian of one sample may use; it takes 8 D d bytes, and d
            products.

    Raises:
        ValueError: the scale is not a finite number > 0, x has no samples, or a Jacobian needs more
            than max_bytes.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number > 0, got {scale}")
    chart: Any = model if isinstance(model, Chart) else all_on_manifold(model, x)
    if not len(x):
        raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
    if context is not None:  # a Jacobian decodes a sample many times, with its own context
        rows = []
        for sample, own in zip(x.split(1), context.split(1), strict=True):
            u = chart.encode(sample, context=own)

            def decode(u: Tensor, own: Tensor = own) -> Tensor:
                return chart.decode(u, context=own.expand(len(u), *own.shape[1:]))

            rows.append(_of_latents(decode, u, chart, scale, max_bytes))
        return torch.cat(rows)
    return _of_latents(chart.decode, chart.encode(x), chart, scale, max_bytes)


def _of_latents(decode: Any, u: Tensor, chart: Chart, scale: float, max_bytes: int) -> Tensor:
    """Return the local dimension (N,) at the latents u (N, d)."""
    found, start = [], 0
    with without_autocast(u):
        for jacobian in jacobians(decode, u, math.prod(chart.input_shape), max_bytes):
            z = u[start : start + len(jacobian)].double()
            start += len(jacobian)
            _, singular, vectors = torch.linalg.svd(jacobian, full_matrices=False)
            # l / (l + r^2) and r^2 / (l + r^2), without overflow.
            share = 1 / (1 + (scale / singular).square())
            rest = 1 / (1 + (singular / scale).square())
            along = (vectors @ z[:, :, None])[..., 0]
            found.append((share + share * rest * along.square()).sum(1))
    return torch.cat(found).to(u.dtype)
