"""The kernels of `rebuild_conv1x1`, by number of channels.

All three compute x = W^-1 (y - bias), dx = W^T dy and outer_sum = sum of dy (y - bias)^T for the
halves (y_a, y_b) and (dy_a + dnet, dy_b). Tiles are named as in the formula, with the suffix `_t`.
"""

from mflow_kernels.ops.addresses import at, at_halves
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.launch import RUN_TIME
from mflow_kernels.ops.rebuild_conv1x1_tiles import (
    in_slice,
    load_block,
    load_gradient_halves,
    load_shifted_halves,
    load_slice,
    load_transposed,
    store_products,
)
from mflow_kernels.ops.tiles import columns


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_kernel(
    y_a,
    y_b,
    dy_a,
    dy_b,
    dnet,
    weight,
    weight_inverse,
    bias,
    x_a,
    x_b,
    dx_a,
    dx_b,
    net,
    outer_sum,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
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
    # At C = 24, dx before outer_sum spills for sm_100, and after it for sm_80.
    DX_LAST: tl.constexpr = HALF == 16 and tl.target_info.cuda_capability_geq(10, 0)
    place = tl.arange(0, 2 * HALF)
    is_a = place // HALF == 0
    c = place % HALF
    exists = c < tl.where(is_a, C_A, C - C_A)
    channel = tl.where(is_a, c, c + C_A)
    at_square = channel[:, None] * C + channel[None, :]
    square = exists[:, None] & exists[None, :]
    w_t = tl.load(weight + at_square, mask=square, other=0.0)
    at_inverse = weight_inverse + channel[None, :] * C + channel[:, None]
    inverse_t = tl.load(at_inverse, mask=square, other=0.0)
    bias_t = tl.load(bias + channel, mask=exists, other=0.0)
    bias_t = tl.where(place == LAST, -1.0, bias_t)
    outer_t = tl.zeros([WARPS, 2 * HALF, 2 * HALF], tl.float32)
    for tile in range(program, TILES, programs):
        n, p, valid = columns(tile, N, P, COLUMNS)
        inside = valid[:, None] & exists[None, :]
        at_y = at_halves(y_a, y_b, n, c, p, is_a)
        y_t = tl.load(at_y, mask=inside, other=0.0).to(tl.float32) - bias_t[None, :]
        x_t = tl.dot(y_t, inverse_t, input_precision=PRECISION)
        tl.store(at_halves(x_a, x_b, n, c, p, is_a), x_t, inside)
        if net[0] is not None:
            at_net = at(net, n, c, p, PIXELS_FIRST=True)
            tl.store(at_net, x_t, inside & is_a[None, :])
        # Load dy after the store of x: both tiles together need too many registers at C = 24.
        at_dy = at_halves(dy_a, dy_b, n, c, p, is_a)
        if dnet[0] is None:
            dy_t = tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
        else:
            # In the other order, C = 12 spills on sm_100 and C = 24 on sm_80.
            at_dnet = at(dnet, n, c, p, PIXELS_FIRST=True)
            if HALF == 8:
                dy_t = tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
                dy_t += tl.load(at_dnet, mask=inside & is_a[None, :], other=0.0).to(tl.float32)
            else:
                dy_t = tl.load(at_dnet, mask=inside & is_a[None, :], other=0.0).to(tl.float32)
                dy_t += tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
        if not DX_LAST:
            dx_t = tl.dot(dy_t, w_t, input_precision=PRECISION)
            tl.store(at_halves(dx_a, dx_b, n, c, p, is_a), dx_t, inside)
        # dy is zero in columns that do not exist, so they add nothing.
        dy_of_warp = tl.reshape(dy_t, [WARPS, BLOCK_P // WARPS, 2 * HALF])
        y_of_warp = tl.reshape(y_t, [WARPS, BLOCK_P // WARPS, 2 * HALF])
        dy_of_warp = tl.permute(dy_of_warp, (0, 2, 1))
        outer_t = tl.dot(dy_of_warp, y_of_warp, outer_t, input_precision=PRECISION)
        if DX_LAST:
            dx_t = tl.dot(dy_t, w_t, input_precision=PRECISION)
            tl.store(at_halves(dx_a, dx_b, n, c, p, is_a), dx_t, inside)
    total = tl.sum(outer_t, axis=0)
    tl.store(outer_sum + program.to(tl.int64) * (C * C) + at_square, total, square)
    dbias_t = tl.sum(tl.where(place[None, :] == LAST, total, 0.0), axis=1)
    tl.store(dbias + program * C + channel, dbias_t, exists)


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_sliced_kernel(
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
    outer_sum,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    SLICE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All three products of every `programs`-th tile, for channels whose weights do not fit the
    registers. Each tile loads the weights again, in slices of at most SLICE input channels.

    Two slices are the halves of the channels; three slices are consecutive. From sm_90 on, tensor
    cores take operands from shared memory. Before, operands take registers too, and three slices of
    y and dy do not fit beside them. The program then reads both tiles again for outer_sum.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    # Slice i starts at channel i * STEP.
    SLICES: tl.constexpr = 2 if C <= 2 * SLICE else 3
    STEP: tl.constexpr = C // 2 if SLICES == 2 else SLICE
    ROWS: tl.constexpr = 2 * SLICE if SLICES == 2 else 4 * SLICE
    READS_ONCE: tl.constexpr = SLICES == 2 or tl.target_info.cuda_capability_geq(9, 0)
    program, programs = tl.program_id(0), tl.num_programs(0)
    o, c = tl.arange(0, ROWS), tl.arange(0, SLICE)
    outer_t = ()
    for _ in tl.static_range(SLICES):
        zeros = tl.zeros([ROWS, SLICE], tl.float32)
        outer_t = outer_t + (zeros,)  # type: ignore[assignment]  # noqa: RUF005
    dbias_t = tl.zeros([ROWS], tl.float32)
    for tile in range(program, TILES, programs):
        n, p, valid = columns(tile, N, P, COLUMNS)
        inside = (o[:, None] < C) & valid[None, :]
        y_t = ()
        if READS_ONCE:
            x_t = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for i in tl.static_range(SLICES):
                y_slice = load_slice(y_a, y_b, n, c, p, valid, C, SLICES, STEP, i)
                exists = in_slice(c, C, SLICES, STEP, i)
                y_slice -= tl.load(bias + i * STEP + c, mask=exists, other=0.0)[:, None]
                y_t = y_t + (y_slice,)  # type: ignore[assignment]  # noqa: RUF005
                w_t = load_block(weight_inverse + i * STEP, o, c, o < C, exists, C)
                x_t = tl.dot(w_t, y_slice, x_t, input_precision=PRECISION)
            tl.store(at(x, n, o, p), x_t, inside)
            if net[0] is not None:
                is_a = (o[:, None] < C // 2) & valid[None, :]
                tl.store(at(net, n, o, p), x_t, is_a)
            dy_t = ()
            dx_t = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for i in tl.static_range(SLICES):
                dy_slice = load_slice(dy_a, dy_b, n, c, p, valid, C, SLICES, STEP, i)
                if dnet[0] is not None and i * STEP < C // 2:
                    is_a = (c[:, None] < C // 2 - i * STEP) & valid[None, :]
                    at_dnet = at(dnet, n, i * STEP + c, p)
                    dy_slice += tl.load(at_dnet, mask=is_a, other=0.0).to(tl.float32)
                dy_t = dy_t + (dy_slice,)  # type: ignore[assignment]  # noqa: RUF005
                exists = in_slice(c, C, SLICES, STEP, i)
                w_t = load_transposed(weight + i * STEP * C, o, c, o < C, exists, C)
                dx_t = tl.dot(w_t, dy_slice, dx_t, input_precision=PRECISION)
            tl.store(at(dx, n, o, p), dx_t, inside)
            dy_rows = tl.join(dy_t[0], dy_t[1])  # type: ignore[misc]
            if SLICES == 2:
                dy_rows = tl.permute(dy_rows, (2, 0, 1))
            else:
                last = dy_t[2]  # type: ignore[misc]
                dy_rows = tl.join(dy_rows, tl.join(last, tl.zeros_like(last)))
                dy_rows = tl.permute(dy_rows, (3, 2, 0, 1))
            dy_rows = dy_rows.reshape(ROWS, BLOCK_P)
        else:
            store_products(
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
                C,
                PRECISION,
                tl.float32,
                SLICE,
            )
            dy_rows = load_gradient_halves(dy_a, dy_b, dnet, n, o, p, valid, C, tl.float32)
        dbias_t += tl.sum(dy_rows, axis=1)  # before the products, which leave few registers
        # dy is zero in columns that do not exist, so y - bias adds nothing to the sums there.
        sums = ()
        for i in tl.static_range(SLICES):
            if READS_ONCE:
                y_slice = y_t[i]
            else:
                y_slice = load_shifted_halves(
                    y_a, y_b, bias, n, i * STEP + c, p, valid, C, tl.float32
                )
            product = tl.dot(dy_rows, tl.trans(y_slice), outer_t[i], input_precision=PRECISION)
            sums = sums + (product,)  # type: ignore[assignment]  # noqa: RUF005
        outer_t = sums
    if SLICES == 2:
        is_a = o < SLICE
        row = tl.where(is_a, o, o - SLICE + STEP)
        row_exists = row < tl.where(is_a, STEP, C)
    else:
        row = o
        row_exists = o < C
    at_sum = outer_sum + program.to(tl.int64) * (C * C) + row[:, None] * C + c[None, :]
    for i in tl.static_range(SLICES):
        exists = in_slice(c, C, SLICES, STEP, i)
        tl.store(at_sum + i * STEP, outer_t[i], mask=row_exists[:, None] & exists[None, :])
    tl.store(dbias + program * C + row, dbias_t, mask=row_exists)


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_conv1x1_wide_kernel(
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
    BLOCKS: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    program, state_programs = tl.program_id(0), TILES * BLOCKS
    if program < state_programs:
        o = program % BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
        n, p, valid = columns(program // BLOCKS, N, P, COLUMNS)
        store_products(
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
            C,
            PRECISION,
            DTYPE,
            BLOCK_C,
        )
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
            dy_t = load_gradient_halves(dy_a, dy_b, dnet, n, o, p, valid, C, DTYPE)
            sums = ()
            for part in tl.static_range(PARTS):
                c_part = c + part * BLOCK_C
                y_t = load_shifted_halves(y_a, y_b, bias, n, c_part, p, valid, C, DTYPE)
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
