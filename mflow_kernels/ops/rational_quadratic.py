r"""Monotone rational-quadratic splines of each element of a state, or of its second half.

    y = spline(x; params), elementwise               logdet = sum over elements of log dy/dx

`ops/spline.py` has the formula. One pair of kernels computes the elementwise operator and the
coupling (`ops/spline_coupling.py`), for which the first `identity` channels pass through.

Gradients, with g = d loss / dy, l = d loss / d logdet, R = (y - y0) / h and L = log dy/dx:
    forward: d x0 = -(g h R_t + l L_t) / w,  d y0 = g,  dx = -d x0
    inverse: d x0 = g,  d y0 = -(g w + l L_t) / (h R_t),  dy = -d y0,  and l is negated below
    d w = t d x0 - delta / w G,  d h = R d y0 + G / w,  G = h d y0 R_delta + l L_delta
    d d0 = h d y0 R_d0 + l L_d0,  and d d1 likewise
From these, the gradients of the raw numbers follow through the softmax, whose sums need only the
bin of x and the share of the bins below it. The backward pass searches the bin again.

Shapes: x (N, C, *spatial), params (N, (C - identity) * numbers, *spatial); an element's numbers are
consecutive channels: widths, heights, slopes. That is what nflows, normflows and zuko have their
networks return, for (N, C) and for images, so no copy is needed.
dtypes: computed in float32 (float64 for float64 states); y has x's dtype, logdet is float32
(float64). params may be of a lower precision than x, as under autocast.
Bytes at least: forward x and params read, y written; backward also dy read, dx, dparams written.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import strided
from mflow_kernels.ops.checks import check_device, check_shape
from mflow_kernels.ops.elementwise import launch_elementwise
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import uses_triton
from mflow_kernels.ops.layouts import channels_first, dense_pixels, flow_state, in_layout_of
from mflow_kernels.ops.logdet import sum_ledger
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.rational_quadratic_kernels import spline_bwd_kernel, spline_fwd_kernel
from mflow_kernels.ops.registration import gradients_of, register
from mflow_kernels.ops.spline import Spline, SplineOptions, make_spline, spline_of, spline_ref
from mflow_kernels.ops.tiles import ledger_columns

NUMBERS = 1024  # raw numbers of a program's tile, padded to a power of two for each element


def transform_ref(
    x: Tensor, params: Tensor, spline: Spline, identity: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y, and a ledger of one column."""
    y_b, log_slope = spline_ref(x[:, identity:], params, spline, inverse)
    y_b = y_b.to(x.dtype)
    y = torch.cat([x[:, :identity], y_b], dim=1) if identity else y_b
    return y, log_slope.sum(dim=tuple(range(1, log_slope.dim())))[:, None]


def _tile(x: Tensor, spline: Spline, identity: int) -> tuple[int, int]:
    """Channels and columns of a program's tile, which holds NUMBERS raw numbers (half in float64).

    It is longest along the axis that is contiguous in memory.
    """
    padded = 1 << (spline.numbers - 1).bit_length()
    elements = max(4, NUMBERS // padded // (2 if x.dtype == torch.float64 else 1))
    if channels_first(x):
        return 2, elements // 2
    # Two columns at least: Triton cannot place the divisors of `at` in tiles of one column.
    block_c = min(elements // 2, max(2, 1 << (x.shape[1] - identity - 1).bit_length()))
    return block_c, elements // block_c


def _empty(
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: str,
    kind: str,
    numbers: list[float],
    identity: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """Uninitialized y and ledger."""
    spline = spline_of(bins, tails, kind, numbers)
    entries = ledger_columns(x, _tile(x, spline, identity)[1])
    return torch.empty_like(x), x.new_empty((x.shape[0], entries), dtype=accumulator(x.dtype))


def _launch(
    kernel: Any, x: Tensor, *tensors: Any, spline: Spline, identity: int, inverse: bool
) -> None:
    launch_elementwise(
        kernel,
        x,
        *tensors,
        tile=_tile(x, spline, identity),
        C=x.shape[1],
        IDENTITY=identity,
        SPLINE=spline,
        INVERSE=inverse,
        NUMBERS=1 << (spline.numbers - 1).bit_length(),
    )


@falls_back("rational_quadratic")
def spline_forward(
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: str,
    kind: str,
    numbers: list[float],
    identity: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """y and the ledger, without autograd. `bins` to `numbers` are `Spline.args`."""
    spline = spline_of(bins, tails, kind, numbers)
    if uses_triton(x):
        # The eager form may get tensors that torch negates lazily.
        x, params = dense_pixels(x.resolve_neg()), dense_pixels(params.resolve_neg())
        y, ledger = _empty(x, params, *spline.args, identity)
        tensors = strided(x), strided(params), strided(y), ledger
        _launch(spline_fwd_kernel, x, *tensors, spline=spline, identity=identity, inverse=inverse)
        return y, ledger
    if cpu.serves(x):
        return cpu.change_half("spline", x, params, spline.args, identity, inverse)
    y, ledger = transform_ref(x, params, spline, identity, inverse)
    return in_layout_of(x, y), ledger


@falls_back("rational_quadratic_backward")
def spline_backward(
    dy: Tensor,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: str,
    kind: str,
    numbers: list[float],
    identity: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dparams."""
    spline = spline_of(bins, tails, kind, numbers)
    if uses_triton(x):
        dy, x, params = (dense_pixels(t.resolve_neg()) for t in (dy, x, params))
        dledger = dledger.resolve_neg()
        dx, dparams = torch.empty_like(x), torch.empty_like(params)
        tensors = strided(x), strided(params), strided(dy), dledger, dledger.stride()
        results = strided(dx), strided(dparams)
        _launch(
            spline_bwd_kernel,
            x,
            *(*tensors, *results),
            spline=spline,
            identity=identity,
            inverse=inverse,
        )
        return dx, dparams
    if cpu.serves(x):
        how = spline.args, identity, inverse
        dx, dparams = cpu.change_half_backward("spline", dy, dledger[:, :1], x, params, *how)
    else:
        reference = partial(transform_ref, spline=spline, identity=identity, inverse=inverse)
        dx, dparams = gradients_of(reference, (x, params), (dy, dledger[:, :1]))
    return in_layout_of(x, dx), in_layout_of(params, dparams)


rational_quadratic_op = register("rational_quadratic", spline_forward, spline_backward, fake=_empty)


def check_numbers(
    x: Tensor, params: object, spline: Spline, identity: int, name: str = "params", state: str = "x"
) -> Tensor:
    """Check that params hold the raw numbers of the channels of x after the first `identity`.

    Errors call them `state` and `name`. Returns params, copied if kernels cannot read them.
    """
    params = flow_state(name, params)
    channels = (x.shape[1] - identity) * spline.numbers
    check_shape(name, params, (x.shape[0], channels, *x.shape[2:]))
    check_device(name, params, x)
    if params.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"{name}: expected a dtype no wider than {state}'s {x.dtype}, got float64")
    return params


def apply_spline(
    x: Tensor, params: Tensor, spline: Spline, identity: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y and logdet (N,), from checked arguments."""
    y, ledger = rational_quadratic_op(x, params, *spline.args, identity, inverse)
    return y, sum_ledger(ledger)


def rational_quadratic(
    x: Tensor,
    params: Tensor,
    bins: int,
    bound: float | tuple[float, float],
    **options: Unpack[SplineOptions],
) -> tuple[Tensor, Tensor]:
    """Map each element by a monotone rational-quadratic spline (arXiv 1906.04032).

    The log-determinants are sums over a sample's elements, as everywhere in this package: that is
    what flows add, and one number for each element would be as many bytes as the state.

    Args:
        x: state (N, C, *spatial); float32, float64, float16 or bfloat16; contiguous, channels_last
            and views of halves are read in place.
        params: (N, C * numbers, *spatial), with numbers = 3 * bins - 1 for linear tails, 3 * bins
            for circular ones, and 3 * bins + 1 for a bounded interval: for each channel its raw
            widths, heights and slopes. Any of these dtypes; float64 only if x is float64.
        bins, bound, options: the fields of `Spline`.

    Returns:
        y, shaped and typed as x, and logdet (N,), float32 (float64), natural log.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    spline = make_spline(bins, bound, options)
    x = flow_state("x", x)
    return apply_spline(x, check_numbers(x, params, spline, 0), spline, 0, False)


def rational_quadratic_inverse(
    y: Tensor,
    params: Tensor,
    bins: int,
    bound: float | tuple[float, float],
    **options: Unpack[SplineOptions],
) -> tuple[Tensor, Tensor]:
    """The inverse of `rational_quadratic`: x, and the negative of its logdet. Same arguments."""
    spline = make_spline(bins, bound, options)
    y = flow_state("y", y)
    return apply_spline(y, check_numbers(y, params, spline, 0, state="y"), spline, 0, True)
