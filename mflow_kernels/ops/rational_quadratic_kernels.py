"""The kernels of rational-quadratic splines; `ops/spline.py` has the formula.

A tile has channels by columns by raw numbers. An element's numbers fill its last axis, padded to a
power of two: first widths, then heights, then slopes. So each number is read once, and neighbours
in memory are read together in every layout.
"""

from mflow_kernels.ops.addresses import at, step, store
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.launch import RUN_TIME
from mflow_kernels.ops.tiles import columns, read_ledger, write_ledger


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
def next_knot(bin, SPLINE: tl.constexpr):
    """The knot after a bin. On a circle, the first one comes after the last bin."""
    if SPLINE.tails == "circular":
        return tl.where(bin == SPLINE.bins - 1, 0, bin + 1)
    else:
        return bin + 1


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
    w_all = tl.where(is_w, LENGTH * (SPLINE.min_width + (1 - SPLINE.min_width * K) * share), 0.0)
    h_all = tl.where(is_h, LENGTH * (SPLINE.min_height + (1 - SPLINE.min_height * K) * share), 0.0)
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

    FIRST: tl.constexpr = 2 * K - 1 if SPLINE.tails == "linear" else 2 * K
    raw0 = _pick(raw, FIRST + bin, j)
    raw1 = _pick(raw, FIRST + next_knot(bin, SPLINE), j)
    d0, d1 = slopes(raw0, raw1, bin, SPLINE)
    t, s, q, below, slant = in_bin(position, x0, y0, w, h, d0, d1, INVERSE)
    return share, bin, raw0, raw1, (inside, x0, y0, w, h, d0, d1, t, s, q, below, slant)


@triton.jit
def slopes(raw0, raw1, bin, SPLINE: tl.constexpr):
    """The slopes at both ends of each element's bin, from their raw numbers."""
    if SPLINE.kind == "exp":
        d0 = tl.exp(raw0 / (1 + tl.abs(raw0) * (1.0 / SPLINE.limit)))
        d1 = tl.exp(raw1 / (1 + tl.abs(raw1) * (1.0 / SPLINE.limit)))
    else:
        d0 = SPLINE.min_slope + _softplus(raw0)
        d1 = SPLINE.min_slope + _softplus(raw1)
    if SPLINE.tails == "linear":
        d0 = tl.where(bin == 0, 1.0, d0)
        d1 = tl.where(bin == SPLINE.bins - 1, 1.0, d1)
    return d0, d1


@triton.jit
def in_bin(position, x0, y0, w, h, d0, d1, INVERSE: tl.constexpr):
    """t, s, q, below and slant of each element, from its position and its bin."""
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
    return t, s, q, below, slant


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
def spline_fwd_kernel(
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
        inside, x0, y0, w, h, d0, _, t, _, q, below, slant = found
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
def spline_bwd_kernel(
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
        inside, _, _, w, h, d0, d1, t, s, q, below, slant = found
        delta = h / w
        ratio = (delta * t * t + d0 * q) / below
        ratio_t = delta * slant / (below * below)
        log_t = 2 * (d1 * t + delta * (s - t) - d0 * s) / slant
        log_t -= 2 * (d0 + d1 - 2 * delta) * (s - t) / below
        if INVERSE:
            dlog_t = -dlog
            dx0 = g
            dy0 = -(g * w + dlog_t * log_t) / (h * ratio_t)
            dx_t = -dy0
        else:
            dlog_t = dlog
            dx0 = -(g * h * ratio_t + dlog_t * log_t) / w
            dy0 = g
            dx_t = -dx0
        scaled = dy0 * h / (below * below)
        ddelta = scaled * q * (d1 * t * t - d0 * s * s)
        ddelta += dlog_t * (2 / delta + 2 * q / slant - 2 * (t * t + s * s) / below)
        dw = t * dx0 - delta / w * ddelta
        dh = ratio * dy0 + ddelta / w
        dd0 = scaled * q * (delta * s * s + d1 * q) + dlog_t * (s * s / slant - 2 * q / below)
        dd1 = dlog_t * (t * t / slant - 2 * q / below) - scaled * q * (delta * t * t + d0 * q)
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
        FIRST: tl.constexpr = 2 * K - 1 if SPLINE.tails == "linear" else 2 * K
        draw0 = (dd0 * _slope_change(raw0, d0, SPLINE))[:, :, None]
        draw1 = (dd1 * _slope_change(raw1, d1, SPLINE))[:, :, None]
        of_slopes = tl.where(
            j == FIRST + i, draw0, tl.where(j == FIRST + next_knot(i, SPLINE), draw1, 0.0)
        )
        draw = tl.where(inside[:, :, None], tl.where(j < 2 * K, draw, of_slopes), 0.0)
        address, _, mask = load_numbers(dparams, n, c, p, is_b, IDENTITY, SPLINE, NUMBERS)
        store(address, draw, mask=mask)
