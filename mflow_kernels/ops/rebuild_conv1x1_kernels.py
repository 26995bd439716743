"""The kernels of `rebuild_conv1x1`, by number of channels.

All three compute x = W^-1 (y - bias), dx = W^T dy and outer_sum = sum of dy (y - bias)^T for the
halves (y_a, y_b) and (dy_a + dnet, dy_b). Tiles are named as in the formula, with the suffix `_t`.
"""

from mflow_kernels.ops.addresses import at, at_halves, store
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.launch import RUN_TIME
from mflow_kernels.ops.tiles import columns


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_kernel(
    y_a,
    y_a_strides,
    y_b,
    y_b_strides,
    dy_a,
    dy_a_strides,
    dy_b,
    dy_b_strides,
    dnet,
    dnet_strides,
    weight,
    weight_inverse,
    bias,
    x_a,
    x_a_strides,
    x_b,
    x_b_strides,
    dx_a,
    dx_a_strides,
    dx_b,
    dx_b_strides,
    net,
    net_strides,
    outer_sum,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    HALF: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All three products of every `programs`-th tile. The weights are loaded once.

    A tile has HALF places for each half of the channels. The last place holds no channel. y - bias
    is set to 1 there, so that d bias is the last column of outer_sum. Each warp has its own columns
    in every product, and the warps' sums for outer_sum are added at the end.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    program, programs = tl.program_id(0), tl.num_programs(0)
    C_A: tl.constexpr = C // 2
    LAST: tl.constexpr = 2 * HALF - 1
    place = tl.arange(0, 2 * HALF)
    is_a = place // HALF == 0
    c = place % HALF
    exists = c < tl.where(is_a, C_A, C - C_A)
    channel = tl.where(is_a, c, c + C_A)
    at_square = channel[:, None] * C + channel[None, :]
    square = exists[:, None] & exists[None, :]
    w_t = tl.load(weight + at_square, mask=square, other=0.0)
    if x_a is not None:
        at_inverse = weight_inverse + channel[None, :] * C + channel[:, None]
        inverse_t = tl.load(at_inverse, mask=square, other=0.0)
    bias_t = tl.load(bias + channel, mask=exists, other=0.0)
    bias_t = tl.where(place == LAST, -1.0, bias_t)
    outer_t = tl.zeros([WARPS, 2 * HALF, 2 * HALF], tl.float32)
    for tile in range(program, TILES, programs):
        n, p, valid = columns(tile, N, P, COLUMNS)
        inside = valid[:, None] & exists[None, :]
        at_dy = at_halves(dy_a, dy_a_strides, dy_b, dy_b_strides, n, c, p, is_a)
        if dnet is None:
            dy_t = tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
        else:
            # Load dnet first; in the other order ptxas spills for sm_100.
            at_dnet = at(dnet, dnet_strides, n, c, p, PIXELS_FIRST=True)
            dy_t = tl.load(at_dnet, mask=inside & is_a[None, :], other=0.0).to(tl.float32)
            dy_t += tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
        dx_t = tl.dot(dy_t, w_t, input_precision="tf32x3")
        tl.store(at_halves(dx_a, dx_a_strides, dx_b, dx_b_strides, n, c, p, is_a), dx_t, inside)
        # Load y after the store of dx: both tiles together need too many registers at C = 24.
        at_y = at_halves(y_a, y_a_strides, y_b, y_b_strides, n, c, p, is_a)
        y_t = tl.load(at_y, mask=inside, other=0.0).to(tl.float32) - bias_t[None, :]
        if x_a is not None:
            x_t = tl.dot(y_t, inverse_t, input_precision="tf32x3")
            tl.store(at_halves(x_a, x_a_strides, x_b, x_b_strides, n, c, p, is_a), x_t, inside)
            if net is not None:
                at_net = at(net, net_strides, n, c, p, PIXELS_FIRST=True)
                tl.store(at_net, x_t, inside & is_a[None, :])
        # dy is zero in columns that do not exist, so they add nothing.
        dy_of_warp = tl.reshape(dy_t, [WARPS, BLOCK_P // WARPS, 2 * HALF])
        y_of_warp = tl.reshape(y_t, [WARPS, BLOCK_P // WARPS, 2 * HALF])
        dy_of_warp = tl.permute(dy_of_warp, (0, 2, 1))
        outer_t = tl.dot(dy_of_warp, y_of_warp, outer_t, input_precision="tf32x3")
    total = tl.sum(outer_t, axis=0)
    tl.store(outer_sum + program.to(tl.int64) * (C * C) + at_square, total, square)
    dbias_t = tl.sum(tl.where(place[None, :] == LAST, total, 0.0), axis=1)
    tl.store(dbias + program * C + channel, dbias_t, exists)


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_medium_kernel(
    y_a,
    y_a_strides,
    y_b,
    y_b_strides,
    dy_a,
    dy_a_strides,
    dy_b,
    dy_b_strides,
    dnet,
    dnet_strides,
    weight,
    weight_inverse,
    bias,
    x,
    x_strides,
    dx,
    dx_strides,
    net,
    net_strides,
    outer_sum,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All three products of every `programs`-th tile, for channels whose weights do not fit the
    registers. Each tile loads the weights again, half by half.

    Rows are places for channels, HALF for each half of the channels.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    program, programs = tl.program_id(0), tl.num_programs(0)
    C_A: tl.constexpr = C // 2
    C_B: tl.constexpr = C - C_A
    place, c = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    is_a = place // HALF == 0
    channel = tl.where(is_a, place, place - HALF + C_A)
    exists = place % HALF < tl.where(is_a, C_A, C_B)
    outer_a = tl.zeros([2 * HALF, HALF], tl.float32)
    outer_b = tl.zeros([2 * HALF, HALF], tl.float32)
    dbias_t = tl.zeros([2 * HALF, BLOCK_P], tl.float32)
    for tile in range(program, TILES, programs):
        n, p, valid = columns(tile, N, P, COLUMNS)
        dy_a_t = _load_half(dy_a, dy_a_strides, n, c, p, valid, C_A)
        if dnet is not None:
            dy_a_t += _load_half(dnet, dnet_strides, n, c, p, valid, C_A)
        dy_b_t = _load_half(dy_b, dy_b_strides, n, c, p, valid, C_B)
        w_t = _load_transposed(weight, channel, c, exists, c < C_A, C)
        dx_t = tl.dot(w_t, dy_a_t, input_precision="tf32x3")
        w_t = _load_transposed(weight, channel, C_A + c, exists, c < C_B, C)
        dx_t = tl.dot(w_t, dy_b_t, dx_t, input_precision="tf32x3")
        inside = exists[:, None] & valid[None, :]
        tl.store(at(dx, dx_strides, n, channel, p), dx_t, inside)
        # dy is zero in columns that do not exist, so y - bias adds nothing to the sums there.
        y_a_t = _load_half(y_a, y_a_strides, n, c, p, valid, C_A)
        y_a_t -= tl.load(bias + c, mask=c < C_A, other=0.0)[:, None]
        y_b_t = _load_half(y_b, y_b_strides, n, c, p, valid, C_B)
        y_b_t -= tl.load(bias + C_A + c, mask=c < C_B, other=0.0)[:, None]
        if x is not None:
            w_t = _load_block(weight_inverse, channel, c, exists, c < C_A, C)
            x_t = tl.dot(w_t, y_a_t, input_precision="tf32x3")
            w_t = _load_block(weight_inverse, channel, C_A + c, exists, c < C_B, C)
            x_t = tl.dot(w_t, y_b_t, x_t, input_precision="tf32x3")
            tl.store(at(x, x_strides, n, channel, p), x_t, inside)
            if net is not None:
                tl.store(at(net, net_strides, n, channel, p), x_t, inside & is_a[:, None])
        dy_t = tl.permute(tl.join(dy_a_t, dy_b_t), (2, 0, 1)).reshape(2 * HALF, BLOCK_P)
        outer_a = tl.dot(dy_t, tl.trans(y_a_t), outer_a, input_precision="tf32x3")
        outer_b = tl.dot(dy_t, tl.trans(y_b_t), outer_b, input_precision="tf32x3")
        dbias_t += dy_t
    at_sum = outer_sum + program.to(tl.int64) * (C * C) + channel[:, None] * C + c[None, :]
    tl.store(at_sum, outer_a, mask=exists[:, None] & (c < C_A)[None, :])
    tl.store(at_sum + C_A, outer_b, mask=exists[:, None] & (c < C_B)[None, :])
    tl.store(dbias + program * C + channel, tl.sum(dbias_t, axis=1), mask=exists)


@triton.jit
def _load_half(y, strides, n, c, p, valid, CHANNELS: tl.constexpr):
    inside = (c[:, None] < CHANNELS) & valid[None, :]
    return tl.load(at(y, strides, n, c, p), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_block(weight, o, c, o_exists, c_exists, C: tl.constexpr):
    """Rows o and columns c of a (C, C) matrix."""
    at_w = weight + o[:, None] * C + c[None, :]
    return tl.load(at_w, mask=o_exists[:, None] & c_exists[None, :], other=0.0)


@triton.jit
def _load_transposed(weight, o, c, o_exists, c_exists, C: tl.constexpr):
    """Rows o and columns c of the transpose of a (C, C) matrix."""
    at_w = weight + c[None, :] * C + o[:, None]
    return tl.load(at_w, mask=o_exists[:, None] & c_exists[None, :], other=0.0)


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_wide_kernel(
    y_a,
    y_a_strides,
    y_b,
    y_b_strides,
    dy_a,
    dy_a_strides,
    dy_b,
    dy_b_strides,
    dnet,
    dnet_strides,
    weight,
    weight_inverse,
    bias,
    x,
    x_strides,
    dx,
    dx_strides,
    net,
    net_strides,
    outer_sum,
    dbias,
    N,
    P,
    TILES,
    SPLITS,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All three products, for channels that do not fit one program.

    Each of the first programs computes BLOCK_O channels of x and dx of one tile, and the programs
    after them compute the blocks of SPLITS partial outer sums. The programs of one tile are
    neighbours, so that all but the first find its states in the L2 cache.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    BLOCKS: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    program, state_programs = tl.program_id(0), TILES * BLOCKS
    if program < state_programs:
        o = program % BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
        n, p, valid = columns(program // BLOCKS, N, P, COLUMNS)
        inside = (o[:, None] < C) & valid[None, :]
        dx_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            w_t = _load_transposed(weight, o, c, o < C, c < C, C)
            dy_t = _load_gradient_halves(
                dy_a, dy_a_strides, dy_b, dy_b_strides, dnet, dnet_strides, n, c, p, valid, C, DTYPE
            )
            dx_t = tl.dot(w_t, dy_t, dx_t, input_precision=PRECISION, out_dtype=DTYPE)
        tl.store(at(dx, dx_strides, n, o, p), dx_t, inside)
        # A second loop, because both products in one loop need more registers than sm_80 has.
        if x is not None:
            x_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                w_t = _load_block(weight_inverse, o, c, o < C, c < C, C)
                y_t = _load_shifted_halves(
                    y_a, y_a_strides, y_b, y_b_strides, bias, n, c, p, valid, C, DTYPE
                )
                x_t = tl.dot(w_t, y_t, x_t, input_precision=PRECISION, out_dtype=DTYPE)
            tl.store(at(x, x_strides, n, o, p), x_t, inside)
            if net is not None:
                is_a = (o[:, None] < C // 2) & valid[None, :]
                store(at(net, net_strides, n, o, p), x_t, mask=is_a)
    else:
        block = (program - state_programs) % (BLOCKS * BLOCKS)
        split = (program - state_programs) // (BLOCKS * BLOCKS)
        o = (block // BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        c = (block % BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_C)
        # One product of BLOCK_O x BLOCK_O would need more registers than sm_80 has. Kernels have no
        # starred tuples, so the parts are added one by one.
        PARTS: tl.constexpr = BLOCK_O // BLOCK_C
        outer_t = ()
        for _ in tl.static_range(PARTS):
            zeros = tl.zeros([BLOCK_O, BLOCK_C], DTYPE)
            outer_t = outer_t + (zeros,)  # type: ignore[assignment]  # noqa: RUF005
        dbias_t = tl.zeros([BLOCK_O], DTYPE)
        for tile in range(split, TILES, SPLITS):
            n, p, valid = columns(tile, N, P, COLUMNS)
            dy_t = _load_gradient_halves(
                dy_a, dy_a_strides, dy_b, dy_b_strides, dnet, dnet_strides, n, o, p, valid, C, DTYPE
            )
            sums = ()
            for part in tl.static_range(PARTS):
                c_part = c + part * BLOCK_C
                y_t = _load_shifted_halves(
                    y_a, y_a_strides, y_b, y_b_strides, bias, n, c_part, p, valid, C, DTYPE
                )
                product = tl.dot(
                    dy_t, tl.trans(y_t), outer_t[part], input_precision=PRECISION, out_dtype=DTYPE
                )
                sums = sums + (product,)  # type: ignore[assignment]  # noqa: RUF005
            outer_t = sums
            dbias_t += tl.sum(dy_t, axis=1)
        at_sum = outer_sum + split.to(tl.int64) * (C * C) + o[:, None] * C + c[None, :]
        for part in tl.static_range(PARTS):
            square = (o[:, None] < C) & (c[None, :] + part * BLOCK_C < C)
            tl.store(at_sum + part * BLOCK_C, outer_t[part], mask=square)
        # Programs of one block of rows sum the same dy, so they store the same d bias.
        tl.store(dbias + split * C + o, dbias_t, mask=o < C)


@triton.jit
def _load_gradient_halves(
    dy_a,
    dy_a_strides,
    dy_b,
    dy_b_strides,
    dnet,
    dnet_strides,
    n,
    c,
    p,
    valid,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    dy_t = _load_halves(dy_a, dy_a_strides, dy_b, dy_b_strides, n, c, p, valid, C, DTYPE)
    if dnet is not None:
        is_a = (c[:, None] < C // 2) & valid[None, :]
        dy_t += tl.load(at(dnet, dnet_strides, n, c, p), mask=is_a, other=0.0).to(DTYPE)
    return dy_t


@triton.jit
def _load_shifted_halves(
    y_a, y_a_strides, y_b, y_b_strides, bias, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr
):
    y_t = _load_halves(y_a, y_a_strides, y_b, y_b_strides, n, c, p, valid, C, DTYPE)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    return y_t - shift[:, None]  # dy is zero in columns that do not exist, so they add nothing


@triton.jit
def _load_halves(a, a_strides, b, b_strides, n, c, p, valid, C: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of the state with halves `a` (channels below C // 2) and `b`."""
    C_A: tl.constexpr = C // 2
    at_a, at_b = at(a, a_strides, n, c, p), at(b, b_strides, n, c - C_A, p)
    UNIT: tl.constexpr = a_strides[3] if a_strides[3] < b_strides[3] else b_strides[3]
    SIZE: tl.constexpr = UNIT * a.dtype.element_ty.primitive_bitwidth // 8
    # `where` loses part of the divisor that the compiler knows of both, so state it again.
    chosen = tl.multiple_of(tl.where((c < C_A)[:, None], at_a, at_b), [SIZE, SIZE])
    return tl.load(chosen, mask=(c < C)[:, None] & valid[None, :], other=0.0).to(DTYPE)
