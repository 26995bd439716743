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

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import at, multiple, step, store, strided
from mflow_kernels.ops.checks import check_device, check_shape
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.elementwise import launch_elementwise
from mflow_kernels.ops.launch import RUN_TIME, uses_triton
from mflow_kernels.ops.layouts import channels_first, dense_pixels, flow_state, in_layout_of
from mflow_kernels.ops.logdet import sum_ledger
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.registration import operator, register
from mflow_kernels.ops.spline import Spline, SplineOptions, make_spline, spline_of, spline_ref
from mflow_kernels.ops.tiles import columns, ledger_columns, read_ledger, write_ledger

NUMBERS = 2048  # raw numbers of a program's tile, padded to a power of two for each element


def transform_ref(
    x: Tensor, params: Tensor, spline: Spline, identity: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y, and a ledger of one column."""
    y_b, log_slope = spline_ref(x[:, identity:], params, spline, inverse)
    y_b = y_b.to(x.dtype)
    y = torch.cat([x[:, :identity], y_b], dim=1) if identity else y_b
    return y, log_slope.sum(dim=tuple(range(1, log_slope.dim())))[:, None]


def transform_backward_ref(
    dy: Tensor,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    spline: Spline,
    identity: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dparams, by autograd of the reference."""
    with torch.enable_grad():
        leaves = x.detach().requires_grad_(), params.detach().requires_grad_()
        outputs = transform_ref(*leaves, spline, identity, inverse)
    dx, dparams = torch.autograd.grad(outputs, leaves, (dy, dledger[:, :1]))
    return dx, dparams


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _pick(values, index, j):
    """The value of each row of the last axis whose number is `index`, or 0."""
    return tl.sum(tl.where(j == index[:, :, None], values, 0.0), axis=2)


@triton.jit
def load_numbers(params, n, c, p, is_b, first, SPLINE: tl.constexpr, NUMBERS: tl.constexpr):
    """Addresses of the raw numbers of channels c (rows) at columns (n, p), their index and mask."""
    j = tl.arange(0, NUMBERS)
    start = at(params, n, (c - first) * SPLINE.numbers, p)
    address = start[:, :, None] + step(j, params[2], params[4])[None, None, :]
    return address, j[None, None, :], is_b[:, :, None] & (j < SPLINE.numbers)[None, None, :]


@triton.jit
def place(x, raw, j, SPLINE: tl.constexpr, INVERSE: tl.constexpr):
    """The bins of a tile's elements and the places in them.

    Returns the softmax values and the lengths of all bins, each element's bin, its raw slopes, and
    (inside, x0, y0, w, h, d0, d1, t, s, q, below, slant).
    """
    K: tl.constexpr = SPLINE.bins
    LENGTH: tl.constexpr = SPLINE.high - SPLINE.low
    is_w = j < K
    is_h = (j >= K) & (j < 2 * K)
    z = raw * (1.0 / SPLINE.temperature)
    if SPLINE.kind == "exp":
        z = z / (1 + tl.abs(z) * (2.0 / SPLINE.limit))
    low: tl.constexpr = float("-inf")
    top = tl.where(
        is_w,
        tl.max(tl.where(is_w, z, low), axis=2)[:, :, None],
        tl.max(tl.where(is_h, z, low), axis=2)[:, :, None],
    )
    exps = tl.where(j < 2 * K, tl.exp(tl.where(j < 2 * K, z - top, 0.0)), 0.0)
    sum_w = tl.sum(tl.where(is_w, exps, 0.0), axis=2)[:, :, None]
    sum_h = tl.sum(tl.where(is_h, exps, 0.0), axis=2)[:, :, None]
    share = exps / tl.where(is_w, sum_w, sum_h)
    w_all = tl.where(
        is_w, LENGTH * (SPLINE.min_width + (1 - SPLINE.min_width * K) * share), 0.0
    )
    h_all = tl.where(
        is_h, LENGTH * (SPLINE.min_height + (1 - SPLINE.min_height * K) * share), 0.0
    )
    knots_x = tl.cumsum(w_all, axis=2)
    knots_y = tl.cumsum(h_all, axis=2)

    inside = (x >= SPLINE.low) & (x <= SPLINE.high)
    position = tl.where(inside, x - SPLINE.low, 0.0)
    if INVERSE:
        passed = is_h & (j < 2 * K - 1) & (position[:, :, None] >= knots_y)
    else:
        passed = (j < K - 1) & (position[:, :, None] >= knots_x)
    bin = tl.sum(passed.to(tl.int32), axis=2)
    x0 = _pick(knots_x, bin - 1, j)
    y0 = _pick(knots_y, K + bin - 1, j)
    w = _pick(w_all, bin, j)
    h = _pick(h_all, K + bin, j)

    FIRST: tl.constexpr = 2 * K - 1 if SPLINE.tails is not None else 2 * K
    raw0 = _pick(raw, FIRST + bin, j)
    raw1 = _pick(raw, FIRST + bin + 1, j)
    if SPLINE.kind == "exp":
        d0 = tl.exp(raw0 / (1 + tl.abs(raw0) * (1.0 / SPLINE.limit)))
        d1 = tl.exp(raw1 / (1 + tl.abs(raw1) * (1.0 / SPLINE.limit)))
    else:
        d0 = SPLINE.min_slope + _softplus(raw0)
        d1 = SPLINE.min_slope + _softplus(raw1)
    if SPLINE.tails is not None:
        d0 = tl.where(bin == 0, 1.0, d0)
        d1 = tl.where(bin == K - 1, 1.0, d1)

    delta = h / w
    if INVERSE:
        u = tl.minimum(tl.maximum((position - y0) / h, 0.0), 1.0)
        v = 1 - u
        tilt = d0 * v - d1 * u
        root = tl.sqrt(tilt * tilt + 4 * delta * delta * u * v)
        total = root + tl.abs(tilt)
        falling = total / (total + 2 * delta * v)
        t = tl.where(tilt < 0, falling, 2 * delta * u / (2 * delta * u + total))
    else:
        t = tl.minimum(tl.maximum((position - x0) / w, 0.0), 1.0)
    s = 1 - t
    q = t * s
    below = delta * (t * t + s * s) + (d0 + d1) * q
    slant = d1 * t * t + 2 * delta * q + d0 * s * s
    return share, bin, raw0, raw1, (inside, x0, y0, w, h, d0, d1, t, s, q, below, slant)


@triton.jit
def _slope_change(raw, slope, SPLINE: tl.constexpr):
    """d slope / d raw."""
    if SPLINE.kind == "exp":
        limited = 1 + tl.abs(raw) * (1.0 / SPLINE.limit)
        return slope / (limited * limited)
    else:
        e = tl.exp(-tl.abs(raw))
        return tl.where(raw < 0, e, 1.0) / (1 + e)


@triton.jit
def copy_channels(x, y, n, p, valid, COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Copy the first COUNT channels of columns (n, p) of x to y."""
    for start in range(0, COUNT, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c[:, None] < COUNT) & valid[None, :]
        tl.store(at(y, n, c, p), tl.load(at(x, n, c, p), mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _spline_fwd_kernel(
    x,
    raw_numbers,
    y,
    ledger,
    N,
    P,
    C: tl.constexpr,
    IDENTITY: tl.constexpr,
    SPLINE: tl.constexpr,
    INVERSE: tl.constexpr,
    NUMBERS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCK_P: tl.constexpr = COLUMNS.block
    tile = tl.program_id(0)
    n, p, valid = columns(tile, N, P, COLUMNS)
    copy_channels(x, y, n, p, valid, IDENTITY, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    for start in range(IDENTITY, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        is_b = (c[:, None] < C) & valid[None, :]
        address, j, mask = load_numbers(raw_numbers, n, c, p, is_b, IDENTITY, SPLINE, NUMBERS)
        raw = tl.load(address, mask=mask, other=0.0).to(DTYPE)
        x_t = tl.load(at(x, n, c, p), mask=is_b, other=0.0).to(DTYPE)
        _, _, _, _, found = place(x_t, raw, j, SPLINE, INVERSE)
        inside, x0, y0, w, h, d0, d1, t, s, q, below, slant = found
        delta = h / w
        if INVERSE:
            y_t = x0 + w * t
            log_slope = -(tl.log(slant) + 2 * tl.log(delta / below))
        else:
            y_t = y0 + h * ((delta * t * t + d0 * q) / below)
            log_slope = tl.log(slant) + 2 * tl.log(delta / below)
        OUTSIDE: tl.constexpr = 0.0 if SPLINE.tails is not None else float("nan")
        store(at(y, n, c, p), tl.where(inside, SPLINE.low + y_t, x_t + OUTSIDE), mask=is_b)
        total += tl.where(is_b, tl.where(inside, log_slope, OUTSIDE), 0.0)
    write_ledger(ledger, total, tile, N, P, COLUMNS)


@triton.jit(do_not_specialize=RUN_TIME)
def _spline_bwd_kernel(
    x,
    raw_numbers,
    dy,
    dledger,
    dledger_strides,
    dx,
    dparams,
    N,
    P,
    C: tl.constexpr,
    IDENTITY: tl.constexpr,
    SPLINE: tl.constexpr,
    INVERSE: tl.constexpr,
    NUMBERS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    K: tl.constexpr = SPLINE.bins
    LENGTH: tl.constexpr = SPLINE.high - SPLINE.low
    n, p, valid = columns(tl.program_id(0), N, P, COLUMNS)
    dlog = read_ledger(dledger, dledger_strides, n, p, valid, COLUMNS)[None, :]
    copy_channels(dy, dx, n, p, valid, IDENTITY, BLOCK_C)
    for start in range(IDENTITY, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        is_b = (c[:, None] < C) & valid[None, :]
        address, j, mask = load_numbers(raw_numbers, n, c, p, is_b, IDENTITY, SPLINE, NUMBERS)
        raw = tl.load(address, mask=mask, other=0.0).to(DTYPE)
        x_t = tl.load(at(x, n, c, p), mask=is_b, other=0.0).to(DTYPE)
        g = tl.load(at(dy, n, c, p), mask=is_b, other=0.0).to(DTYPE)
        share, bin, raw0, raw1, found = place(x_t, raw, j, SPLINE, INVERSE)
        inside, x0, y0, w, h, d0, d1, t, s, q, below, slant = found
        delta = h / w
        ratio = (delta * t * t + d0 * q) / below
        ratio_t = delta * slant / (below * below)
        log_t = 2 * (d1 * t + delta * (s - t) - d0 * s) / slant
        log_t -= 2 * (d0 + d1 - 2 * delta) * (s - t) / below
        if INVERSE:
            l = -dlog
            dx0 = g
            dy0 = -(g * w + l * log_t) / (h * ratio_t)
            dx_t = -dy0
        else:
            l = dlog
            dx0 = -(g * h * ratio_t + l * log_t) / w
            dy0 = g
            dx_t = -dx0
        scaled = dy0 * h / (below * below)
        ddelta = scaled * q * (d1 * t * t - d0 * s * s)
        ddelta += l * (2 / delta + 2 * q / slant - 2 * (t * t + s * s) / below)
        dw = t * dx0 - delta / w * ddelta
        dh = ratio * dy0 + ddelta / w
        dd0 = scaled * q * (delta * s * s + d1 * q) + l * (s * s / slant - 2 * q / below)
        dd1 = l * (t * t / slant - 2 * q / below) - scaled * q * (delta * t * t + d0 * q)
        store(at(dx, n, c, p), tl.where(inside, dx_t, g), mask=is_b)

        # Through the softmax: the bins below the element's move its start, its own its length.
        i = bin[:, :, None]
        own = tl.where(j < i, dx0[:, :, None], tl.where(j == i, dw[:, :, None], 0.0))
        own = tl.where(j < K, own, tl.where(j < K + i, dy0[:, :, None], 0.0))
        own = tl.where(j == K + i, dh[:, :, None], own)
        weighted = share * own
        mean_w = tl.sum(tl.where(j < K, weighted, 0.0), axis=2)[:, :, None]
        mean_h = tl.sum(tl.where(j >= K, weighted, 0.0), axis=2)[:, :, None]
        draw = tl.where(
            j < K,
            LENGTH / SPLINE.temperature * (1 - SPLINE.min_width * K) * share * (own - mean_w),
            LENGTH / SPLINE.temperature * (1 - SPLINE.min_height * K) * share * (own - mean_h),
        )
        if SPLINE.kind == "exp":
            limited = 1 + tl.abs(raw * (1.0 / SPLINE.temperature)) * (2.0 / SPLINE.limit)
            draw = draw / (limited * limited)
        FIRST: tl.constexpr = 2 * K - 1 if SPLINE.tails is not None else 2 * K
        draw0 = (dd0 * _slope_change(raw0, d0, SPLINE))[:, :, None]
        draw1 = (dd1 * _slope_change(raw1, d1, SPLINE))[:, :, None]
        of_slopes = tl.where(j == FIRST + i, draw0, tl.where(j == FIRST + 1 + i, draw1, 0.0))
        draw = tl.where(inside[:, :, None], tl.where(j < 2 * K, draw, of_slopes), 0.0)
        address, _, mask = load_numbers(dparams, n, c, p, is_b, IDENTITY, SPLINE, NUMBERS)
        store(address, draw, mask=mask)


def _tile(x: Tensor, spline: Spline, identity: int) -> tuple[int, int]:
    """Channels and columns of a program's tile, which holds NUMBERS raw numbers (half in float64).

    It is longest along the axis that is contiguous in memory.
    """
    padded = 1 << (spline.numbers - 1).bit_length()
    elements = max(1, NUMBERS // padded // (2 if x.dtype == torch.float64 else 1))
    if channels_first(x):
        return 1, elements
    block_c = min(elements, 1 << (x.shape[1] - identity - 1).bit_length())
    return block_c, elements // block_c


def _empty(
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: bool,
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


def spline_forward(
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: bool,
    kind: str,
    numbers: list[float],
    identity: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """y and the ledger, without autograd. `bins` to `numbers` are `Spline.args`."""
    spline = spline_of(bins, tails, kind, numbers)
    if uses_triton(x):
        x, params = dense_pixels(x), dense_pixels(params)
        y, ledger = _empty(x, params, *spline.args, identity)
        tensors = strided(x), strided(params), strided(y), ledger
        _launch(
            _spline_fwd_kernel, x, *tensors, spline=spline, identity=identity, inverse=inverse
        )
        return y, ledger
    if cpu.serves(x):
        return cpu.spline(x, params, spline.args, identity, inverse)
    y, ledger = transform_ref(x, params, spline, identity, inverse)
    return in_layout_of(x, y), ledger


def spline_backward(
    dy: Tensor,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: bool,
    kind: str,
    numbers: list[float],
    identity: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dparams."""
    spline = spline_of(bins, tails, kind, numbers)
    if uses_triton(x):
        dy, x, params = dense_pixels(dy), dense_pixels(x), dense_pixels(params)
        dx, dparams = torch.empty_like(x), torch.empty_like(params)
        tensors = strided(x), strided(params), strided(dy), dledger, dledger.stride()
        results = strided(dx), strided(dparams)
        _launch(
            _spline_bwd_kernel,
            x,
            *(*tensors, *results),
            spline=spline,
            identity=identity,
            inverse=inverse,
        )
        return dx, dparams
    if cpu.serves(x):
        grads = cpu.spline_backward(
            dy, dledger[:, 0], x, params, spline.args, identity, inverse
        )
    else:
        grads = transform_backward_ref(dy, dledger, x, params, spline, identity, inverse)
    return in_layout_of(x, grads[0]), in_layout_of(params, grads[1])


def _fake_backward(
    dy: Tensor, dledger: Tensor, x: Tensor, params: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(params)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, params, *ctx.options = inputs
    ctx.save_for_backward(x, params)


def _gradient(ctx: Any, dy: Tensor, dledger: Tensor, run: Any) -> tuple[Tensor | None, ...]:
    grads = run(dy, dledger, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None for _ in ctx.options))


rational_quadratic_op, spline_eager = register(
    "rational_quadratic",
    spline_forward,
    spline_backward,
    fake=_empty,
    fake_backward=_fake_backward,
    setup=_setup,
    gradient=_gradient,
)


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
    run = operator(rational_quadratic_op, spline_forward)
    y, ledger = run(x, params, *spline.args, identity, inverse)
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
        params: (N, C * numbers, *spatial), with numbers = 3 * bins - 1 for linear tails and
            3 * bins + 1 for a bounded interval: for each channel its raw widths, heights and
            slopes. Any of these dtypes; float64 only if x is float64.
        bins, bound, options: the fields of `Spline`.

    Returns:
        y, shaped and typed as x, and logdet (N,), float32 (float64), natural log.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel runs.
    """
    spline = make_spline(bins, bound, tuple(options.items()))
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
    spline = make_spline(bins, bound, tuple(options.items()))
    y = flow_state("y", y)
    return apply_spline(y, check_numbers(y, params, spline, 0, state="y"), spline, 0, True)
