r"""The local dimension of a model's density at each sample, at a scale.

Noise of deviation r fills every direction that is thinner than r. The density rho_r of data plus
such noise therefore falls as r^-(D - d) where the data have d directions that are thicker, so that

    d = D + d log rho_r(x) / d log r.

Kamkari et al. (arXiv 2403.18910) use the local dimension beside the likelihood to find data that a
model has not seen. This module takes x = f^-1(z) to first order, so rho_r is a normal density with
mean x - J z and covariance J J^T + r^2, where J = dx/dz. With the eigenpairs (l_i, v_i) of J^T J,

    d = sum_i l_i / (l_i + r^2) + sum_i r^2 l_i (v_i . z)^2 / (l_i + r^2)^2.

The first sum is a trace and the second a quadratic form in z. For a large d, products of J^T J with
random vectors and with z estimate both, by Lanczos quadrature (`models/volume.py`).
"""

import math
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.flow import Context, for_each
from mflow_kernels.models.chart import Chart
from mflow_kernels.models.selection import all_on_manifold
from mflow_kernels.models.volume import (
    PASS_ELEMENTS,
    Decode,
    Estimate,
    Method,
    for_each_context,
    jacobians,
    lanczos,
    mean_over_probes,
    metric,
    random_signs,
)
from mflow_kernels.ops.checks import check_choice, check_count

LARGEST_EXACT = 1024  # coordinates up to which the default method is exact


@torch.no_grad()
def local_dimension(
    model: Bijection | Chart,
    x: Tensor,
    scale: float,
    *,
    context: Context | None = None,
    method: Method | None = None,
    probes: int = 16,
    iterations: int = 64,
    generator: torch.Generator | None = None,
    max_bytes: int = 2**30,
) -> Estimate:
    """Return the dimension of the model's density near each sample, (N,), and its error.

    The first sum of the formula counts the directions in which the density is wider than `scale`,
    each between 0 and 1. The second grows for samples that are unusual in a direction of about that
    width, so the result of a single sample may exceed D.

    Args:
        model: a flow as for `ManifoldFlow`, whose latents are all used, or a `ManifoldFlow` or
            `HierarchicalFlow`. These use u only, at the projection of x.
        x: (N, *input_shape), N >= 1.
        scale: r, the deviation of the noise, in units of x, > 0. Directions thinner than that do
            not count; for 8-bit images 1 / 256 is the width of a level.
        context: one for each sample, or one for all.
        method: "exact" takes d products with the Jacobian of a sample. "hutchinson" estimates the
            result by random projections. By default d decides: "exact" up to 1024.
        probes, iterations, generator: of an estimate, as for `Chart.manifold_log_prob`.
        max_bytes: memory that the Jacobian of one sample may use; it takes 8 D d bytes.

    Returns:
        `value` and `error`, (N,) each. The error is the standard error over the probes, plus an
        extrapolation of what further steps would change; it is 0 for "exact".

    Raises:
        ValueError: the scale is not a finite number > 0, x has no samples, a Jacobian needs more
            than max_bytes, probes or iterations is out of range, or the method is unknown.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number > 0, got {scale}")
    if method is not None:
        check_choice("method", method, ("exact", "hutchinson"))
    check_count("probes", probes, 2)
    check_count("iterations", iterations, 1)
    chart: Any = model if isinstance(model, Chart) else all_on_manifold(model, x)
    if not len(x):
        raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
    each: Tensor | None = for_each(context, x, model)
    u, dimensions = chart.encode(x, context=each), math.prod(chart.input_shape)

    def exact(decode: Decode, u: Tensor) -> tuple[Tensor, Tensor]:
        found, start = [], 0
        for jacobian in jacobians(decode, u, dimensions, max_bytes):
            z = u[start : start + len(jacobian)].double()
            start += len(jacobian)
            _, singular, vectors = torch.linalg.svd(jacobian, full_matrices=False)
            share, between = _shares(singular, scale)
            along = (vectors @ z[:, :, None])[..., 0]
            found.append((share + between * along.square()).sum(1))
        value = torch.cat(found)
        return value, torch.zeros_like(value)

    def quadrature(decode: Decode, u: Tensor) -> tuple[Tensor, Tensor]:
        n, d = u.shape
        signs = random_signs(n * probes, u, generator).view(n, probes, d)
        first = torch.cat([signs, u[:, None]], dim=1).flatten(0, 1)  # probes of a sample, then z

        def of(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            share, between = _shares(nodes.clamp(min=0).sqrt(), scale)
            trace, form = ((weights * f).sum(1).view(n, probes + 1) for f in (share, between))
            value, error = mean_over_probes(trace[:, :-1])
            return value + form[:, -1], error

        rows = u.repeat_interleave(probes + 1, 0)
        return lanczos(metric(decode, rows), first, of, iterations)[:2]

    if (method or ("exact" if u.shape[1] <= LARGEST_EXACT else "hutchinson")) == "exact":
        return for_each_context(exact, len(u), chart.decode, u, each)
    most = max(1, PASS_ELEMENTS // (dimensions * (probes + 1)))
    return for_each_context(quadrature, most, chart.decode, u, each)


def _shares(singular: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return l / (l + r^2) and r^2 l / (l + r^2)^2 for l = singular^2, without overflow."""
    share = 1 / (1 + (scale / singular).square())
    return share, share / (1 + (singular / scale).square())
