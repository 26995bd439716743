r"""Spline coupling: map one half of the channels by splines that the other half chooses.

    x = (x_a, x_b),  params = net(x_a)
    y_a = x_a,  y_b = spline(x_b; params)            logdet = sum of log dy_b/dx_b

C_a = C // 2 channels pass through. The inverse has the same params, because the network reads the
half that passes through. `ops/rational_quadratic.py` has the kernels, shapes and dtypes.
"""

from torch import Tensor
from typing_extensions import Unpack

from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.ops.rational_quadratic import apply_spline, check_numbers
from mflow_kernels.ops.spline import Spline, SplineOptions, make_spline


def _couple(x: Tensor, params: Tensor, spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    """`spline_coupling` or its inverse."""
    state = "y" if inverse else "x"
    x = flow_state(state, x)
    if x.shape[1] < 2:
        shape = tuple(x.shape)
        raise ValueError(f"{state}: expected at least 2 channels to couple, got shape {shape}")
    c_a = x.shape[1] // 2
    params = check_numbers(x, params, spline, c_a, "params", state)
    return apply_spline(x, params, spline, c_a, inverse)


def spline_coupling(
    x: Tensor,
    params: Tensor,
    bins: int,
    bound: float | tuple[float, float],
    **options: Unpack[SplineOptions],
) -> tuple[Tensor, Tensor]:
    """Map the second half of the channels by splines (Neural Spline Flows, arXiv 1906.04032).

    Args:
        x: state (N, C, *spatial) with C >= 2; see `rational_quadratic`.
        params: (N, (C - C // 2) * numbers, *spatial): as there, for each channel of x_b.
        bins, bound, options: the fields of `Spline`.

    Returns:
        y, shaped and typed as x, and logdet (N,), float32 (float64), natural log.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    return _couple(x, params, make_spline(bins, bound, options), False)


def spline_coupling_inverse(
    y: Tensor,
    params: Tensor,
    bins: int,
    bound: float | tuple[float, float],
    **options: Unpack[SplineOptions],
) -> tuple[Tensor, Tensor]:
    """The inverse of `spline_coupling`: x, and the negative of its logdet. Same arguments."""
    return _couple(y, params, make_spline(bins, bound, options), True)
