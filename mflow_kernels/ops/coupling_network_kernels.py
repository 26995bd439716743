"""Kernels of `coupling_network`.

They see images in channels_last as rows of pixels, (pixels, C), all samples one after the other,
and take weights as (out, taps, in) in the images' dtype, packed into one tensor. Products are
summed in float32. Tensor cores round float32 factors to TF32, Triton's default for `tl.dot`.
"""

from mflow_kernels.ops.compiler import tl, triton

# Arguments that depend on the size and number of the images. Triton must not specialize on them.
RUN_TIME_SIZES = ["PIXELS", "H", "W", "TILES", "NUMBERS"]
# Likewise, numbers and counts of partial sums.
PARTIAL_SUMS = ["NUMBERS1", "NUMBERS2", "SPLITS1", "SPLITS2"]


@triton.jit
def neighbour(p, tap, H, W, SIGN: tl.constexpr, TAPS: tl.constexpr):
    """The neighbour of pixel p by tap `tap` of a 3x3 convolution, and whether it is in the image.

    With SIGN 1 it is the pixel that the tap reads for the result at p. With SIGN -1 it is the pixel
    whose result reads p through this tap.
    """
    if TAPS == 1:
        return p + 0 * tap, p + 0 * tap >= 0
    else:
        down, right = SIGN * (tap // 3 - 1), SIGN * (tap % 3 - 1)
        row, column = (p // W) % H + down, p % W + right
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        return p + down * W + right, inside


@triton.jit
def load_taps(
    x, p, valid, H, W, C: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr, K: tl.constexpr
):
    """Rows [P, K] with the nine neighbours of each valid pixel p: column tap * C + c."""
    k = tl.arange(0, K)
    tap, c = k // C, k % C
    source, inside = neighbour(p[:, None], tap[None, :], H, W, SIGN, TAPS)
    inside = inside & (tap[None, :] < TAPS) & valid[:, None]
    return tl.load(x + source.to(tl.int64) * C + c[None, :], mask=inside, other=0.0)


@triton.jit
def relu(x):
    """Keeps NaN, as torch's ReLU does; tl.maximum would hide that a network has diverged."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def load_w3(w3, d, C_OUT: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, j):
    """W3 (C_out, taps, width) as [J, D]: row j = tap * C_out + o."""
    tap, o = j // C_OUT, j % C_OUT
    at = w3 + (o * TAPS + tap)[:, None] * WIDTH + d[None, :]
    return tl.load(at, mask=(tap < TAPS)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def load_w3_rows(
    w3,
    d,
    j,
    column,
    C_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One column of the taps of W3 (C_out, taps, width), as [D, J] with j = row * C_out + o."""
    row, o = j // C_OUT, j % C_OUT
    tap = row * (TAPS // ROWS) + column
    at = w3 + (o * TAPS + tap)[None, :] * WIDTH + d[:, None]
    return tl.load(at, mask=(row < ROWS)[None, :] & (d < WIDTH)[:, None], other=0.0)


@triton.jit
def load_w2(w2, o, d, WIDTH: tl.constexpr):
    """Rows o and columns d of W2 (width, width)."""
    inside = (o < WIDTH)[:, None] & (d < WIDTH)[None, :]
    return tl.load(w2 + o[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_w1(
    w1,
    d,
    r,
    column,
    C_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One column of the taps of W1 (width, taps, C_in), as [D, R] with r = row * C_in + i."""
    tap = (r // C_IN) * (TAPS // ROWS) + column
    at = w1 + d[:, None] * (TAPS * C_IN) + (tap * C_IN + r % C_IN)[None, :]
    return tl.load(at, mask=(d < WIDTH)[:, None] & (r < ROWS * C_IN)[None, :], other=0.0)


@triton.jit
def from_neighbour(x, p, W, STEP: tl.constexpr, P: tl.constexpr):
    """For each pixel p of a tile x [P, J], the row of the pixel STEP to its right; 0 outside the
    image."""
    if STEP == 0:
        return x
    else:
        source = tl.arange(0, P) + STEP
        column = p % W + STEP
        inside = (column >= 0) & (column < W)
        source = tl.minimum(tl.maximum(source, 0), P - 1)
        moved = tl.gather(x, tl.broadcast_to(source[:, None], x.shape), 0)
        return tl.where(inside[:, None], moved, 0.0)


@triton.jit
def add_rows(
    sums_t,
    h2_t,
    w3,
    d,
    j,
    p,
    W,
    C_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add to sums_t [P, J] what the hidden channels d of h2_t [P, D] give each row of taps."""
    for column in tl.static_range(TAPS // ROWS):
        w3_t = load_w3_rows(w3, d, j, column, C_OUT, WIDTH, TAPS, ROWS)
        taps_t = tl.dot(h2_t, w3_t)
        sums_t += from_neighbour(taps_t, p, W, column - TAPS // ROWS // 2, h2_t.shape[0])
    return sums_t


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def _network_kernel(
    x,
    w1,
    b1,
    w2,
    b2,
    w3,
    row_sums,
    h1,
    h2,
    PIXELS,
    H,
    W,
    C_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store the sums over the three taps in each row of W3, for one tile of pixels and one block of
    columns. Store h1 and h2 too if they are given.

    If BLOCK_R is not 0, the program also computes the columns that BLOCK_J leaves over: 144 columns
    are 128 and 16, and one block of 256 would nearly double the products.

    With HALO, the first and the last pixel of a tile belong to the neighbouring tiles; they are
    computed here only for the taps.
    """
    ROWS: tl.constexpr = 3 if TAPS == 9 else 1
    i = tl.arange(0, BLOCK_P)
    p = tl.program_id(0) * (BLOCK_P - 2 * HALO) - HALO + i
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    valid = (p >= 0) & (p < PIXELS)
    own = (valid & (i >= HALO) & (i < BLOCK_P - HALO))[:, None]
    at_hidden = p.to(tl.int64)[:, None] * WIDTH
    x_t = load_taps(x, p, valid, H, W, C_IN, TAPS, 1, BLOCK_X)
    i = tl.arange(0, BLOCK_X)
    sums_t = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    if BLOCK_R:
        rest = BLOCK_J + tl.arange(0, BLOCK_R)
        rest_t = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h2_t = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for inner in range(0, WIDTH, BLOCK_K):
            k = inner + tl.arange(0, BLOCK_K)
            at_w1 = w1 + k[None, :] * (TAPS * C_IN) + i[:, None]
            w1_t = tl.load(at_w1, mask=(k < WIDTH)[None, :] & (i < TAPS * C_IN)[:, None], other=0.0)
            h1_t = tl.dot(x_t, w1_t)
            h1_t += tl.load(b1 + k, mask=k < WIDTH, other=0.0).to(tl.float32)[None, :]
            h1_t = relu(h1_t).to(x_t.dtype)
            if h1 is not None and (start == 0) & (tl.program_id(1) == 0):
                tl.store(h1 + at_hidden + k[None, :], h1_t, mask=own & (k < WIDTH)[None, :])
            at_w2 = w2 + d[None, :] * WIDTH + k[:, None]
            w2_t = tl.load(at_w2, mask=(d < WIDTH)[None, :] & (k < WIDTH)[:, None], other=0.0)
            h2_t = tl.dot(h1_t, w2_t, h2_t)
        h2_t += tl.load(b2 + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
        h2_r = relu(h2_t).to(x_t.dtype)
        if h2 is not None and tl.program_id(1) == 0:
            tl.store(h2 + at_hidden + d[None, :], h2_r, mask=own & (d < WIDTH)[None, :])
        sums_t = add_rows(sums_t, h2_r, w3, d, j, p, W, C_OUT, WIDTH, TAPS, ROWS)
        if BLOCK_R:
            rest_t = add_rows(rest_t, h2_r, w3, d, rest, p, W, C_OUT, WIDTH, TAPS, ROWS)
    at_sums = row_sums + p.to(tl.int64)[:, None] * (ROWS * C_OUT)
    tl.store(at_sums + j[None, :], sums_t, mask=own & (j < ROWS * C_OUT)[None, :])
    if BLOCK_R:
        tl.store(at_sums + rest[None, :], rest_t, mask=own & (rest < ROWS * C_OUT)[None, :])


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def _sum_taps_kernel(
    taps,
    bias,
    y,
    PIXELS,
    H,
    W,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    SIGN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[p] = bias + the sum over parts and taps of taps[neighbour of p by this tap, part, tap].

    If TAPS is 3, the taps are the middle column of a 3x3 convolution.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < PIXELS)[:, None] & (c < C)[None, :]
    y_t = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tap in tl.static_range(TAPS):
        source, there = neighbour(p, 3 * tap + 1 if TAPS == 3 else tap, H, W, SIGN, TAPS)
        at = taps + source.to(tl.int64)[:, None] * (PARTS * TAPS * C) + tap * C + c[None, :]
        for part in tl.static_range(PARTS):
            at_part = at + part * (TAPS * C)
            y_t += tl.load(at_part, mask=inside & there[:, None], other=0.0).to(tl.float32)
    if bias is not None:
        y_t += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + p.to(tl.int64)[:, None] * C + c[None, :], y_t, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def _dh2_kernel(
    dparams,
    h2,
    w3,
    dh2,
    dw3,
    db3,
    db2,
    NUMBERS,
    PIXELS,
    H,
    W,
    TILES,
    WIDTH: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Compute d h2 of a block of hidden channels, for every `splits`-th tile of pixels.

    If d W3 is given, each program also stores partial sums of d W3 (C_out, taps, width), d b3 and
    d b2, in its own row of NUMBERS numbers.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_J)
    w3_t = load_w3(w3, d, C_OUT, WIDTH, TAPS, j)
    if dw3 is not None:
        dw3_t = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
        db3_t = tl.zeros([BLOCK_J], tl.float32)
        db2_t = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(split, TILES, splits):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < PIXELS)[:, None] & (d < WIDTH)[None, :]
        at = p.to(tl.int64)[:, None] * WIDTH + d[None, :]
        g_t = load_taps(dparams, p, p < PIXELS, H, W, C_OUT, TAPS, -1, BLOCK_J)
        h2_t = tl.load(h2 + at, mask=inside, other=0.0)
        dh2_t = tl.dot(g_t, w3_t)
        dh2_t = tl.where(h2_t.to(tl.float32) <= 0.0, 0.0, dh2_t)
        tl.store(dh2 + at, dh2_t, mask=inside)
        if dw3 is not None:
            dw3_t = tl.dot(tl.trans(g_t), h2_t, dw3_t)
            db3_t += tl.sum(g_t.to(tl.float32), axis=0)
            db2_t += tl.sum(dh2_t, axis=0)
    if dw3 is not None:
        row = split.to(tl.int64) * NUMBERS
        tap, o = j // C_OUT, j % C_OUT
        at_dw3 = dw3 + row + (o * TAPS + tap)[:, None] * WIDTH + d[None, :]
        tl.store(at_dw3, dw3_t, mask=(tap < TAPS)[:, None] & (d < WIDTH)[None, :])
        tl.store(db2 + row + d, db2_t, mask=d < WIDTH)
        if tl.program_id(1) == 0:
            # The middle tap reads every pixel of params once; the others miss pixels at a border.
            tl.store(db3 + row + o, db3_t, mask=tap == TAPS // 2)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def _dh1_kernel(
    dh2,
    h1,
    x,
    w1,
    w2,
    dx_taps,
    dw2,
    dw1,
    db1,
    NUMBERS,
    PIXELS,
    H,
    W,
    TILES,
    C_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HELD: tl.constexpr,
):
    """Compute d h1 of a block of hidden channels, for every `splits`-th tile of pixels.

    Each program stores the products of d h1 with the taps of W1, which are this block's part of
    d x. With ROWS 3, these are sums over the three taps of each row, and tiles consist of whole
    rows of the image; with ROWS equal to TAPS, they are all taps. If d W1 is given, it also stores
    partial sums of d W1 (width, taps, C_in) and d b1. If d W2 is given, one block of BLOCK_K holds
    all hidden channels of d h2, and it stores partial sums of d W2.

    With HELD, a program keeps the weights that it needs for all of its tiles in shared memory. Then
    BLOCK_K divides WIDTH, and BLOCK_X has room for one more column: d b1 is the column of d W1 for
    an input of ones. A sum of its own would take as many registers as a quarter of d W1.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_X)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    if dw1 is not None:
        dw1_t = tl.zeros([BLOCK_D, BLOCK_X], tl.float32)
        if not HELD:
            db1_t = tl.zeros([BLOCK_D], tl.float32)
    if dw2 is not None:
        dw2_t = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if HELD:
        w2_held = ()
        for turn in tl.static_range(WIDTH // BLOCK_K):
            w2_t = load_w2(w2, turn * BLOCK_K + k, d, WIDTH)
            w2_held = w2_held + (w2_t,)  # type: ignore[assignment]  # noqa: RUF005
        w1_held = ()
        for column in tl.static_range(TAPS // ROWS):
            w1_t = load_w1(w1, d, r, column, C_IN, WIDTH, TAPS, ROWS)
            w1_held = w1_held + (w1_t,)  # type: ignore[assignment]  # noqa: RUF005
    for tile in range(split, TILES, splits):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        hidden = p.to(tl.int64)[:, None] * WIDTH
        inside = (p < PIXELS)[:, None] & (d < WIDTH)[None, :]
        if not HELD or dw2 is not None:
            h1_t = tl.load(h1 + hidden + d[None, :], mask=inside, other=0.0)
        dh1_t = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        if HELD:
            for turn in tl.static_range(WIDTH // BLOCK_K):
                at_dh2 = dh2 + hidden + (turn * BLOCK_K + k)[None, :]
                dh2_t = tl.load(at_dh2, mask=(p < PIXELS)[:, None], other=0.0)
                dh1_t = tl.dot(dh2_t, w2_held[turn], dh1_t)
                if dw2 is not None:
                    dw2_t = tl.dot(tl.trans(dh2_t), h1_t, dw2_t)
        else:
            for start in range(0, WIDTH, BLOCK_K):
                o = start + k
                there = (p < PIXELS)[:, None] & (o < WIDTH)[None, :]
                dh2_t = tl.load(dh2 + hidden + o[None, :], mask=there, other=0.0)
                dh1_t = tl.dot(dh2_t, load_w2(w2, o, d, WIDTH), dh1_t)
                if dw2 is not None:
                    dw2_t = tl.dot(tl.trans(dh2_t), h1_t, dw2_t)
        if HELD and dw2 is None:
            # Loaded here, it takes no registers while the products above run.
            h1_t = tl.load(h1 + hidden + d[None, :], mask=inside, other=0.0)
        dh1_t = tl.where(h1_t.to(tl.float32) <= 0.0, 0.0, dh1_t)
        dh1_r = dh1_t.to(h1_t.dtype)
        if dw1 is not None and not HELD:
            db1_t += tl.sum(dh1_t, axis=0)
        if dw1 is not None:
            x_t = load_taps(x, p, p < PIXELS, H, W, C_IN, TAPS, 1, BLOCK_X)
            if HELD:
                x_t = tl.where(i[None, :] == TAPS * C_IN, 1.0, x_t).to(x_t.dtype)
            dw1_t = tl.dot(tl.trans(dh1_r), x_t, dw1_t)
        # The taps of each row of W1 are added here, as in the forward pass, if the pixels that they
        # belong to are in the tile.
        dx_t = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
        for column in tl.static_range(TAPS // ROWS):
            if HELD:
                w1_t = w1_held[column]
            else:
                w1_t = load_w1(w1, d, r, column, C_IN, WIDTH, TAPS, ROWS)
            taps_t = tl.dot(dh1_r, w1_t)
            dx_t += from_neighbour(taps_t, p, W, TAPS // ROWS // 2 - column, BLOCK_P)
        part = p.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        at_dx = dx_taps + part[:, None] * (ROWS * C_IN) + r[None, :]
        tl.store(at_dx, dx_t, mask=(p < PIXELS)[:, None] & (r < ROWS * C_IN)[None, :])
    row = split.to(tl.int64) * NUMBERS
    if dw1 is not None:
        at_dw1 = dw1 + row + d[:, None] * (TAPS * C_IN) + i[None, :]
        tl.store(at_dw1, dw1_t, mask=(d < WIDTH)[:, None] & (i < TAPS * C_IN)[None, :])
        if HELD:
            at_db1 = db1 + row + d[:, None] + 0 * i[None, :]
            tl.store(at_db1, dw1_t, mask=(d < WIDTH)[:, None] & (i == TAPS * C_IN)[None, :])
        else:
            tl.store(db1 + row + d, db1_t, mask=d < WIDTH)
    if dw2 is not None:
        at_dw2 = dw2 + row + k[:, None] * WIDTH + d[None, :]
        tl.store(at_dw2, dw2_t, mask=(k < WIDTH)[:, None] & (d < WIDTH)[None, :])


@triton.jit(do_not_specialize=PARTIAL_SUMS)
def _sum_partials_kernel(partials, sums, NUMBERS1, NUMBERS2, SPLITS1, SPLITS2, BLOCK: tl.constexpr):
    """sums = the sums over rows of two matrices, (SPLITS1, NUMBERS1) and (SPLITS2, NUMBERS2), which
    follow each other in `partials`. Rows are added in their order."""
    blocks1 = tl.cdiv(NUMBERS1, BLOCK)
    block = tl.program_id(0)
    if block < blocks1:
        at, numbers, splits = partials, NUMBERS1, SPLITS1
    else:
        block -= blocks1
        at = partials + SPLITS1.to(tl.int64) * NUMBERS1
        sums += NUMBERS1
        numbers, splits = NUMBERS2, SPLITS2
    column = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(at + column, mask=column < numbers, other=0.0)
        at += numbers
    tl.store(sums + column, total, mask=column < numbers)
