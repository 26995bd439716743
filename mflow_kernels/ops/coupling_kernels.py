"""Kernels of affine couplings, and functions that they share with other kernels.

Tiles are named as in the formula of `coupling.py`, with the suffix `_t`.
"""

from mflow_kernels.ops.addresses import at, step, store
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.launch import RUN_TIME
from mflow_kernels.ops.scale import log_scale
from mflow_kernels.ops.tiles import columns, read_ledger, write_ledger


@triton.jit
def at_params(params, n, c, p, valid, C: tl.constexpr):
    """Locate raw and shift of channels c (rows) at columns (n, p).

    Returns the addresses of raw, the distance from raw to shift, the mask of x_b, whose channels
    have both, and whether raw and shift share memory sectors of 32 bytes. In channels_last they
    share sectors unless each fills whole ones. With 64 bytes or more each, the shared part is too
    small to matter.
    """
    C_A: tl.constexpr = C // 2
    is_b = (c[:, None] >= C_A) & (c[:, None] < C) & valid[None, :]
    at_raw = at(params, n, c - C_A, p)
    to_shift = step(C - C_A, params[2], params[4])
    BYTES: tl.constexpr = (C - C_A) * params[0].dtype.element_ty.primitive_bitwidth // 8
    SHARED: tl.constexpr = params[2] is None and BYTES < 64 and BYTES != 32
    return at_raw, to_shift, is_b, SHARED


@triton.jit
def at_both(at_raw, to_shift):
    """Addresses of raw and shift along a third axis: one access to both moves each sector once."""
    return at_raw[:, :, None] + (tl.arange(0, 2) * to_shift)[None, None, :]


@triton.jit
def load_params(params, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr):
    """raw and shift of channels c (rows) at columns (n, p), and the mask of x_b, which has them."""
    at_raw, to_shift, is_b, SHARED = at_params(params, n, c, p, valid, C)
    if SHARED:
        both = tl.load(at_both(at_raw, to_shift), mask=is_b[:, :, None], other=0.0)
        raw, shift = tl.split(both.to(DTYPE))
    else:
        raw = tl.load(at_raw, mask=is_b, other=0.0).to(DTYPE)
        shift = tl.load(at_raw + to_shift, mask=is_b, other=0.0).to(DTYPE)
    return raw, shift, is_b


@triton.jit
def store_params(params, raw, shift, n, c, p, valid, C: tl.constexpr):
    """Store raw and shift where `load_params` loads them."""
    at_raw, to_shift, is_b, SHARED = at_params(params, n, c, p, valid, C)
    if SHARED:
        store(at_both(at_raw, to_shift), tl.join(raw, shift), mask=is_b[:, :, None])
    else:
        store(at_raw, raw, mask=is_b)
        store(at_raw + to_shift, shift, mask=is_b)


@triton.jit
def couple(x, raw, shift, is_b, SCALE: tl.constexpr, INVERSE: tl.constexpr):
    """The coupling of one tile in registers: y, and log |dy/dx| (0 outside x_b)."""
    log_s, _ = log_scale(raw, SCALE)
    if INVERSE:
        log_s = -log_s
        shift = -shift
    s = tl.exp(log_s)
    # The inverse of "shift, then scale" scales first, and vice versa.
    if SCALE.shifts_first == INVERSE:
        y = s * x + shift
    else:
        y = s * (x + shift)
    return tl.where(is_b, y, x), tl.where(is_b, log_s, 0.0)


@triton.jit
def couple_backward(x, raw, shift, is_b, dy, dlog_s, SCALE: tl.constexpr, INVERSE: tl.constexpr):
    """Gradients of `couple`: dx, d raw, d shift. x is the input; dlog_s, one value per column."""
    log_s, slope = log_scale(raw, SCALE)
    if INVERSE:
        log_s = -log_s
        slope = -slope
        shift = -shift
    s = tl.exp(log_s)
    dx = s * dy
    if SCALE.shifts_first == INVERSE:
        dshift = dy
        draw = (dx * x + dlog_s[None, :]) * slope
    else:
        dshift = dx
        draw = (dx * (x + shift) + dlog_s[None, :]) * slope
    if INVERSE:
        dshift = -dshift
    return tl.where(is_b, dx, dy), draw, dshift


@triton.jit(do_not_specialize=RUN_TIME)
def _coupling_fwd_kernel(
    x,
    coupling_params,
    y,
    ledger,
    N,
    P,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCK_P: tl.constexpr = COLUMNS.block
    tile = tl.program_id(0)
    n, p, valid = columns(tile, N, P, COLUMNS)
    total = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c[:, None] < C) & valid[None, :]
        x_t = tl.load(at(x, n, c, p), mask=inside, other=0.0).to(DTYPE)
        raw, shift, is_b = load_params(coupling_params, n, c, p, valid, C, DTYPE)
        y_t, log_s = couple(x_t, raw, shift, is_b, SCALE, INVERSE)
        tl.store(at(y, n, c, p), y_t, mask=inside)
        total += log_s
    write_ledger(ledger, total, tile, N, P, COLUMNS)


@triton.jit(do_not_specialize=RUN_TIME)
def _coupling_bwd_kernel(
    x,
    coupling_params,
    dy,
    dledger,
    dledger_strides,
    dx,
    dparams,
    N,
    P,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, p, valid = columns(tl.program_id(0), N, P, COLUMNS)
    dlog_s = read_ledger(dledger, dledger_strides, n, p, valid, COLUMNS)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c[:, None] < C) & valid[None, :]
        raw, shift, is_b = load_params(coupling_params, n, c, p, valid, C, DTYPE)
        x_t = tl.load(at(x, n, c, p), mask=is_b, other=0.0).to(DTYPE)
        dy_t = tl.load(at(dy, n, c, p), mask=inside, other=0.0).to(DTYPE)
        dx_t, draw, dshift = couple_backward(x_t, raw, shift, is_b, dy_t, dlog_s, SCALE, INVERSE)
        tl.store(at(dx, n, c, p), dx_t, mask=inside)
        store_params(dparams, draw, dshift, n, c, p, valid, C)
