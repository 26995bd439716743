"""Tiles of a state in halves, and of weights, as the kernels of `rebuild_conv1x1` read them."""

from mflow_kernels.ops.addresses import at, store
from mflow_kernels.ops.compiler import tl, triton


@triton.jit
def in_slice(c, C: tl.constexpr, SLICES: tl.constexpr, STEP: tl.constexpr, INDEX: tl.constexpr):
    """Whether slice INDEX has a channel at each place c."""
    WIDTH: tl.constexpr = STEP if INDEX < SLICES - 1 else C - INDEX * STEP
    return c < WIDTH


@triton.jit
def load_slice(
    a,
    b,
    n,
    c,
    p,
    valid,
    C: tl.constexpr,
    SLICES: tl.constexpr,
    STEP: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Slice INDEX of the state with halves `a` (channels below C // 2) and `b`.

    The first slice lies in `a`. A slice in one half needs no choice of pointers.
    """
    C_A: tl.constexpr = C // 2
    inside = in_slice(c, C, SLICES, STEP, INDEX)[:, None] & valid[None, :]
    if INDEX == 0:
        return tl.load(at(a, n, c, p), mask=inside, other=0.0).to(tl.float32)
    elif INDEX * STEP >= C_A:
        at_b = at(b, n, INDEX * STEP - C_A + c, p)
        return tl.load(at_b, mask=inside, other=0.0).to(tl.float32)
    else:
        return load_halves(a, b, n, INDEX * STEP + c, p, valid, C, tl.float32)


@triton.jit
def store_products(
    y_a,
    y_b,
    dy_a,
    dy_b,
    dnet,
    weight,
    weight_inverse,
    bias,
    x,
    dx,
    net,
    n,
    o,
    p,
    valid,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute and store channels o of dx and x, in blocks of BLOCK_C input channels."""
    inside = (o[:, None] < C) & valid[None, :]
    dx_t = tl.zeros([o.shape[0], p.shape[0]], DTYPE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        w_t = load_transposed(weight, o, c, o < C, c < C, C)
        dy_t = load_gradient_halves(dy_a, dy_b, dnet, n, c, p, valid, C, DTYPE)
        dx_t = tl.dot(w_t, dy_t, dx_t, input_precision=PRECISION, out_dtype=DTYPE)
    tl.store(at(dx, n, o, p), dx_t, inside)
    # A second loop, because both products in one loop need more registers than sm_80 has.
    x_t = tl.zeros([o.shape[0], p.shape[0]], DTYPE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        # y before the weights: after them, 8 bytes spill at C = 96 on sm_80.
        y_t = load_shifted_halves(y_a, y_b, bias, n, c, p, valid, C, DTYPE)
        w_t = load_block(weight_inverse, o, c, o < C, c < C, C)
        x_t = tl.dot(w_t, y_t, x_t, input_precision=PRECISION, out_dtype=DTYPE)
    tl.store(at(x, n, o, p), x_t, inside)
    if net[0] is not None:
        is_a = (o[:, None] < C // 2) & valid[None, :]
        store(at(net, n, o, p), x_t, mask=is_a)


@triton.jit
def load_block(weight, o, c, o_exists, c_exists, C: tl.constexpr):
    """Rows o and columns c of a (C, C) matrix."""
    at_w = weight + o[:, None] * C + c[None, :]
    return tl.load(at_w, mask=o_exists[:, None] & c_exists[None, :], other=0.0)


@triton.jit
def load_transposed(weight, o, c, o_exists, c_exists, C: tl.constexpr):
    """Rows o and columns c of the transpose of a (C, C) matrix."""
    at_w = weight + c[None, :] * C + o[:, None]
    return tl.load(at_w, mask=o_exists[:, None] & c_exists[None, :], other=0.0)


@triton.jit
def load_gradient_halves(dy_a, dy_b, dnet, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr):
    dy_t = load_halves(dy_a, dy_b, n, c, p, valid, C, DTYPE)
    if dnet[0] is not None:
        is_a = (c[:, None] < C // 2) & valid[None, :]
        dy_t += tl.load(at(dnet, n, c, p), mask=is_a, other=0.0).to(DTYPE)
    return dy_t


@triton.jit
def load_shifted_halves(y_a, y_b, bias, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr):
    y_t = load_halves(y_a, y_b, n, c, p, valid, C, DTYPE)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    return y_t - shift[:, None]  # dy is zero in columns that do not exist, so they add nothing


@triton.jit
def load_halves(a, b, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of the state with halves `a` (channels below C // 2) and `b`."""
    C_A: tl.constexpr = C // 2
    at_a, at_b = at(a, n, c, p), at(b, n, c - C_A, p)
    UNIT: tl.constexpr = a[4] if a[4] < b[4] else b[4]
    SIZE: tl.constexpr = UNIT * a[0].dtype.element_ty.primitive_bitwidth // 8
    # `where` loses part of the divisor that the compiler knows of both, so state it again.
    chosen = tl.multiple_of(tl.where((c < C_A)[:, None], at_a, at_b), [SIZE, SIZE])
    return tl.load(chosen, mask=(c < C)[:, None] & valid[None, :], other=0.0).to(DTYPE)
