"""nflows' functions for rational-quadratic splines, computed by our operator.

They have the names and the signatures of `nflows.transforms.splines.rational_quadratic`, so that
code which calls those, or a copy of them as VITS does, only changes the import. nflows need not be
installed. What differs: 2 to 64 bins, `min_derivative` between 0 and 1, and gradients that cannot
be differentiated again.
"""

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops.checks import check_shape, check_tensor
from mflow_kernels.ops.rational_quadratic import apply_spline
from mflow_kernels.ops.spline import SplineOptions, make_spline

DEFAULT_MIN_BIN_WIDTH = 1e-3
DEFAULT_MIN_BIN_HEIGHT = 1e-3
DEFAULT_MIN_DERIVATIVE = 1e-3


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: Any = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = DEFAULT_MIN_BIN_WIDTH,
    min_bin_height: float = DEFAULT_MIN_BIN_HEIGHT,
    min_derivative: float = DEFAULT_MIN_DERIVATIVE,
) -> tuple[Tensor, Tensor]:
    """Map each element by a spline of [-tail_bound, tail_bound], and keep those outside.

    Args:
        inputs: (*).
        unnormalized_widths, unnormalized_heights: (*, K).
        unnormalized_derivatives: (*, K - 1) for linear tails, (*, K) for circular ones.
        tails: "linear", or "circular" as in normflows.

    Returns:
        The outputs and log |d output / d input|, both (*), natural log.

    Raises:
        RuntimeError: other tails, as in nflows.
        TypeError, ValueError: naming the argument, or the field of `ops.Spline`.
    """
    if tails not in ("linear", "circular"):
        raise RuntimeError(f"{tails} tails are not implemented.")
    raw = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    sizes = min_bin_width, min_bin_height, min_derivative
    return _apply(inputs, raw, inverse, (-tail_bound, tail_bound), tails, sizes)


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = DEFAULT_MIN_BIN_WIDTH,
    min_bin_height: float = DEFAULT_MIN_BIN_HEIGHT,
    min_derivative: float = DEFAULT_MIN_DERIVATIVE,
) -> tuple[Tensor, Tensor]:
    """Map each element of [left, right] to [bottom, top] by a spline, or back.

    Args:
        inputs: (*).
        unnormalized_widths, unnormalized_heights: (*, K).
        unnormalized_derivatives: (*, K + 1).

    Returns:
        The outputs and log |d output / d input|, both (*), natural log.

    Raises:
        nflows.transforms.base.InputOutsideDomain: an element is outside [left, right], as in
            nflows. ValueError if nflows is not imported.
        TypeError, ValueError: naming the argument, or the field of `ops.Spline`.
    """
    if inputs.numel() and bool((inputs.min() < left) | (inputs.max() > right)):
        base = sys.modules.get("nflows.transforms.base")
        kind = getattr(base, "InputOutsideDomain", ValueError)
        raise kind(f"inputs: expected elements in [{left}, {right}]")
    sizes = min_bin_width, min_bin_height, min_derivative
    if (left, right) == (bottom, top):
        raw = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
        return _apply(inputs, raw, inverse, (left, right), None, sizes)
    # Our splines map an interval to itself: [0, 1], where slopes are smaller by `stretch`.
    stretch = (top - bottom) / (right - left)
    slopes = (F.softplus(unnormalized_derivatives) / stretch).clamp(min=1e-30)
    raw = unnormalized_widths, unnormalized_heights, slopes + (-torch.expm1(-slopes)).log()
    sizes = min_bin_width, min_bin_height, min_derivative / stretch
    given, made = ((left, right), (bottom, top))[:: -1 if inverse else 1]
    shares = (inputs - given[0]) / (given[1] - given[0])
    outputs, log_slope = _apply(shares, raw, inverse, (0.0, 1.0), None, sizes)
    log_stretch = math.log(stretch)
    return (
        made[0] + (made[1] - made[0]) * outputs,
        log_slope + (-log_stretch if inverse else log_stretch),
    )


def _apply(
    inputs: Tensor,
    raw: tuple[Tensor, Tensor, Tensor],
    inverse: bool,
    bound: tuple[float, float],
    tails: Any,
    sizes: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """Each element is a sample of one channel, so that its log-slope is a log-determinant."""
    check_tensor("inputs", inputs)
    bins = raw[0].shape[-1]
    width, height, slope = map(float, sizes)
    options: SplineOptions = {"min_width": width, "min_height": height, "min_slope": slope}
    spline = make_spline(bins, bound, {"tails": tails, **options})
    slopes = spline.numbers - 2 * bins
    for name, part, size in zip(
        ("widths", "heights", "derivatives"), raw, (bins, bins, slopes), strict=True
    ):
        check_shape(f"unnormalized_{name}", part, (*inputs.shape, size))
    params = torch.cat(raw, -1).reshape(-1, spline.numbers)
    outputs, log_slope = apply_spline(inputs.reshape(-1, 1), params, spline, 0, bool(inverse))
    return outputs.view(inputs.shape), log_slope.to(inputs.dtype).view(inputs.shape)
