"""The kernels of wide `coupling_network`s on Hopper, in Gluon: the backward pass.

A program holds the weights that it needs in shared memory, for all of its tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

from mflow_kernels.ops.coupling_network_hopper import (
    copy_layout,
    copy_w3,
    from_neighbour,
    load_async,
    load_taps,
    product_layout,
    store_rows,
)
from mflow_kernels.ops.coupling_network_kernels import RUN_TIME_SIZES


@gluon.jit
def _hold_w1(
    w1, d, first, J: gl.constexpr, C_IN: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr
):
    """J columns of W1's sums over rows, for each of the three tap columns: [3, D, J] with
    j = row * C_IN + i."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])
    T: gl.constexpr = w1.dtype.element_ty
    HELD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, J], T)
    held = gl.allocate_shared_memory(T, [3, D, J], HELD)
    d = gl.convert_layout(d, gl.SliceLayout(1, LOAD))
    j = first + gl.arange(0, J, gl.SliceLayout(0, LOAD))
    for column in gl.static_range(3):
        k = (j // C_IN * 3 + column) * C_IN + j % C_IN
        at = w1 + d[:, None] * (9 * C_IN) + k[None, :]
        held.index(column).store(gl.load(at, mask=(j < 3 * C_IN)[None, :], other=0.0))
    return held


@gluon.jit
def _rows_of_dx(dh1_held, held, p, W, P: gl.constexpr, J: gl.constexpr, OF_J: gl.constexpr):
    """The sums over the three taps of each row of W1 that d h1 gives these pixels, [P, J]."""
    sums = gl.zeros([P, J], gl.float32, OF_J)
    for column in gl.static_range(3):
        taps = gl.zeros([P, J], gl.float32, OF_J)
        taps = warpgroup_mma(dh1_held, held.index(column), taps)
        sums += from_neighbour(taps, p, W, 1 - column, P, J)
    return sums


@gluon.jit
def _copy_dh2(
    ring, turn, dh2, first, splits, PIXELS, WIDTH: gl.constexpr, P: gl.constexpr, K: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Begin to copy K columns of a tile of d h2: turns of the program's tiles follow each other."""
    COPY: gl.constexpr = copy_layout(K, WARPS)
    TURNS: gl.constexpr = WIDTH // K
    p = (first + turn // TURNS * splits) * P + gl.arange(0, P, gl.SliceLayout(1, COPY))
    k = turn % TURNS * K + gl.arange(0, K, gl.SliceLayout(0, COPY))
    at = dh2 + p.to(gl.int64)[:, None] * WIDTH + k[None, :]
    load_async(ring.index(turn % STAGES), at, mask=(p < PIXELS)[:, None])


@gluon.jit(do_not_specialize=RUN_TIME_SIZES)
def _hopper_dh1_kernel(
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
    C_IN: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_X: gl.constexpr,
    BLOCK_J: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As `_dh1_kernel` with sums over rows of taps. For d W2, WIDTH must be 2 * BLOCK_K.

    BLOCK_D and BLOCK_K divide WIDTH, and BLOCK_J + BLOCK_R columns hold all sums of a pixel. Tiles
    consist of whole rows of the image. BLOCK_X has room for one more column: d b1 is the column of
    d W1 for an input of ones.
    """
    P: gl.constexpr = BLOCK_P
    D: gl.constexpr = BLOCK_D
    K: gl.constexpr = BLOCK_K
    X: gl.constexpr = BLOCK_X
    J: gl.constexpr = BLOCK_J
    R: gl.constexpr = BLOCK_R
    T: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    TURNS: gl.constexpr = WIDTH // K
    gl.static_assert(TURNS >= STAGES)  # h1 arrives with the first turns of a tile
    ACC: gl.constexpr = product_layout(P, D, WARPS)
    OF_X: gl.constexpr = product_layout(X, D, WARPS)
    OF_K: gl.constexpr = product_layout(K, D, WARPS)
    OF_J: gl.constexpr = product_layout(P, J, WARPS)
    OF_R: gl.constexpr = product_layout(P, R, WARPS)
    WIDE: gl.constexpr = copy_layout(D, WARPS)
    LOAD: gl.constexpr = copy_layout(X, WARPS)
    split, splits = gl.program_id(0), gl.num_programs(0)

    d = gl.program_id(1) * D + gl.arange(0, D, gl.SliceLayout(0, WIDE))
    w1_j = _hold_w1(w1, d, 0, J, C_IN, D, WARPS)
    w1_r = _hold_w1(w1, d, J, R, C_IN, D, WARPS)
    W2_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([K, D], T)
    w2_held = gl.allocate_shared_memory(T, [TURNS, K, D], W2_LAYOUT)
    for turn in gl.static_range(TURNS):
        o = turn * K + gl.arange(0, K, gl.SliceLayout(1, WIDE))
        load_async(w2_held.index(turn), w2 + o[:, None] * WIDTH + d[None, :])
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, K], T)
    ring = gl.allocate_shared_memory(T, [STAGES, P, K], RING)
    for early in gl.static_range(STAGES - 1):
        _copy_dh2(ring, early, dh2, split, splits, PIXELS, WIDTH, P, K, STAGES, WARPS)
        async_copy.commit_group()
    HIDDEN: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, D], T)
    h1_held = gl.allocate_shared_memory(T, [P, D], HIDDEN)  # and then d h1
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, X], T)
    x_held = gl.allocate_shared_memory(T, [P, X], X_LAYOUT)
    if dw1 is not None:
        dw1_t = gl.zeros([X, D], gl.float32, OF_X)
    if dw2 is not None:
        gl.static_assert(TURNS == 2)
        dw2_t = (gl.zeros([K, D], gl.float32, OF_K),) * 2
    turns = 0
    for tile in range(split, TILES, splits):
        p = tile * P + gl.arange(0, P, gl.SliceLayout(1, WIDE))
        at_h1 = h1 + p.to(gl.int64)[:, None] * WIDTH + d[None, :]
        load_async(h1_held, at_h1, mask=(p < PIXELS)[:, None])
        if dw2 is not None:
            async_copy.commit_group()
        if dw1 is not None:
            p = tile * P + gl.arange(0, P, gl.SliceLayout(1, LOAD))
            i = gl.arange(0, X, gl.SliceLayout(0, LOAD))
            x_t = load_taps(x, p, PIXELS, H, W, i, C_IN, 1)
            x_t = gl.where((i == 9 * C_IN)[None, :], 1.0, x_t).to(T)
        acc = gl.zeros([P, D], gl.float32, ACC)
        for turn in gl.static_range(TURNS):
            async_copy.wait_group(0 if dw2 is not None and turn == 0 else STAGES - 2)
            fence_async_shared()
            acc = warpgroup_mma(ring.index((turns + turn) % STAGES), w2_held.index(turn), acc)
            if dw2 is not None:
                dh2_t = ring.index((turns + turn) % STAGES).permute((1, 0))
                now = warpgroup_mma(dh2_t, h1_held, dw2_t[turn])
                dw2_t = (now, dw2_t[1]) if turn == 0 else (dw2_t[0], now)
            ahead = turns + turn + STAGES - 1
            _copy_dh2(ring, ahead, dh2, split, splits, PIXELS, WIDTH, P, K, STAGES, WARPS)
            async_copy.commit_group()
        turns += TURNS
        h1_t = h1_held.load(ACC)
        acc = gl.where(h1_t.to(gl.float32) <= 0.0, 0.0, acc)
        h1_held.store(acc.to(T))
        if dw1 is not None:
            x_held.store(x_t)
        fence_async_shared()
        if dw1 is not None:
            dw1_t = warpgroup_mma(x_held.permute((1, 0)), h1_held, dw1_t)
        p = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_J))
        row = p.to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
        sums = _rows_of_dx(h1_held, w1_j, p, W, P, J, OF_J)
        store_rows(dx_taps, sums, row, 0, 3 * C_IN, P, J, PIXELS, p, WARPS)
        p = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_R))
        row = p.to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
        sums = _rows_of_dx(h1_held, w1_r, p, W, P, R, OF_R)
        store_rows(dx_taps, sums, row, J, 3 * C_IN, P, R, PIXELS, p, WARPS)
    async_copy.wait_group(0)
    row = split.to(gl.int64) * NUMBERS
    if dw1 is not None:
        OUT: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [1, WARPS], [0, 1])
        dw1_t = gl.convert_layout(dw1_t, OUT)
        d = gl.program_id(1) * D + gl.arange(0, D, gl.SliceLayout(0, OUT))
        i = gl.arange(0, X, gl.SliceLayout(1, OUT))
        at_dw1 = dw1 + row + d[None, :] * (9 * C_IN) + i[:, None]
        gl.store(at_dw1, dw1_t, mask=(i < 9 * C_IN)[:, None])
        at_db1 = db1 + row + d[None, :] + 0 * i[:, None]
        gl.store(at_db1, dw1_t, mask=(i == 9 * C_IN)[:, None])
    if dw2 is not None:
        for turn in gl.static_range(TURNS):
            k = turn * K + gl.arange(0, K, gl.SliceLayout(1, OF_K))
            d = gl.program_id(1) * D + gl.arange(0, D, gl.SliceLayout(0, OF_K))
            gl.store(dw2 + row + k[:, None] * WIDTH + d[None, :], dw2_t[turn])


@gluon.jit
def _load_rows(g, p, PIXELS, H, W, j, C: gl.constexpr):
    """The pixels above, at and below p, whose results read p: column row * C + o."""
    down = 1 - j // C
    row = ((p // W) % H)[:, None] + down[None, :]
    inside = (row >= 0) & (row < H) & (j < 3 * C)[None, :] & (p < PIXELS)[:, None]
    source = (p[:, None] + down[None, :] * W).to(gl.int64)
    return gl.load(g + source * C + (j % C)[None, :], mask=inside, other=0.0)


@gluon.jit
def _store_dw3(
    dw3, value, d, column, first, C_OUT: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr,
    J: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Store value [D, J] as columns first + 0 .. J - 1 of a column of taps: j = row * C_OUT + o."""
    OUT: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [1, WARPS], [0, 1])
    d = gl.convert_layout(d, gl.SliceLayout(1, OUT))
    j = first + gl.arange(0, J, gl.SliceLayout(0, OUT))
    at = (j % C_OUT * 9 + j // C_OUT * 3 + column) * WIDTH
    value = gl.convert_layout(value, OUT)
    gl.store(dw3 + at[None, :] + d[:, None], value, mask=(j < 3 * C_OUT)[None, :])


@gluon.jit(do_not_specialize=RUN_TIME_SIZES)
def _hopper_dh2_kernel(
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
    WIDTH: gl.constexpr,
    C_OUT: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_J: gl.constexpr,
    BLOCK_R: gl.constexpr,
):
    """As `_dh2_kernel`.

    A program holds its part of W3, and loads only three taps of each pixel: tiles consist of whole
    rows of the image, so that the others are taps of its neighbours in the tile. BLOCK_D divides
    WIDTH, BLOCK_J + BLOCK_R columns hold the three taps, and BLOCK_J holds the first two.
    """
    P: gl.constexpr = BLOCK_P
    D: gl.constexpr = BLOCK_D
    J: gl.constexpr = BLOCK_J
    R: gl.constexpr = BLOCK_R
    T: gl.constexpr = h2.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = product_layout(P, D, WARPS)
    OF_J: gl.constexpr = product_layout(D, J, WARPS)
    OF_R: gl.constexpr = product_layout(D, R, WARPS)
    WIDE: gl.constexpr = copy_layout(D, WARPS)
    LOAD_J: gl.constexpr = copy_layout(J, WARPS)
    LOAD_R: gl.constexpr = copy_layout(R, WARPS)
    split, splits, block = gl.program_id(0), gl.num_programs(0), gl.program_id(1)

    W3_J: gl.constexpr = gl.NVMMASharedLayout.get_default_for([J, D], T)
    W3_R: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    w3_j = gl.allocate_shared_memory(T, [3, J, D], W3_J)
    w3_r = gl.allocate_shared_memory(T, [3, R, D], W3_R)
    for column in gl.static_range(3):
        copy_w3(w3_j.index(column), w3, 3 * block + column, 0, J, C_OUT, WIDTH, D, WARPS)
        copy_w3(w3_r.index(column), w3, 3 * block + column, J, R, C_OUT, WIDTH, D, WARPS)
    TAPS_J: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, J], T)
    TAPS_R: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, R], T)
    taps_j = gl.allocate_shared_memory(T, [3, P, J], TAPS_J)
    taps_r = gl.allocate_shared_memory(T, [3, P, R], TAPS_R)
    HIDDEN: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, D], T)
    ring = gl.allocate_shared_memory(T, [2, P, D], HIDDEN)

    i_wide = gl.arange(0, P, gl.SliceLayout(1, WIDE))
    i_of_j = gl.arange(0, P, gl.SliceLayout(1, LOAD_J))
    i_of_r = gl.arange(0, P, gl.SliceLayout(1, LOAD_R))
    d = block * D + gl.arange(0, D, gl.SliceLayout(0, WIDE))
    j = gl.arange(0, J, gl.SliceLayout(0, LOAD_J))
    r = J + gl.arange(0, R, gl.SliceLayout(0, LOAD_R))
    p = split * P + i_wide
    at = p.to(gl.int64)[:, None] * WIDTH + d[None, :]
    load_async(ring.index(0), h2 + at, mask=(p < PIXELS)[:, None])
    async_copy.commit_group()
    g_j = _load_rows(dparams, split * P + i_of_j, PIXELS, H, W, j, C_OUT)
    g_r = _load_rows(dparams, split * P + i_of_r, PIXELS, H, W, r, C_OUT)
    if dw3 is not None:
        dw3_j = (gl.zeros([D, J], gl.float32, OF_J),) * 3
        dw3_r = (gl.zeros([D, R], gl.float32, OF_R),) * 3
        db3_t = gl.zeros([J], gl.float32, gl.SliceLayout(0, LOAD_J))
        db2_t = gl.zeros([D], gl.float32, gl.SliceLayout(0, ACC))
    for tile in range(split, TILES, splits):
        for column in gl.static_range(3):
            moved = from_neighbour(g_j, tile * P + i_of_j, W, 1 - column, P, J)
            taps_j.index(column).store(moved)
            moved = from_neighbour(g_r, tile * P + i_of_r, W, 1 - column, P, R)
            taps_r.index(column).store(moved)
        if dw3 is not None:
            db3_t += gl.sum(g_j.to(gl.float32), 0)
        async_copy.wait_group(0)
        fence_async_shared()
        ahead = (tile + splits) * P
        p = ahead + i_wide
        at = p.to(gl.int64)[:, None] * WIDTH + d[None, :]
        load_async(ring.index((tile // splits + 1) % 2), h2 + at, mask=(p < PIXELS)[:, None])
        async_copy.commit_group()
        acc = gl.zeros([P, D], gl.float32, ACC)
        for column in gl.static_range(3):
            acc = warpgroup_mma(taps_j.index(column), w3_j.index(column), acc)
            acc = warpgroup_mma(taps_r.index(column), w3_r.index(column), acc)
        held = ring.index(tile // splits % 2)
        acc = gl.where(held.load(ACC).to(gl.float32) <= 0.0, 0.0, acc)
        p = tile * P + i_wide
        at = p.to(gl.int64)[:, None] * WIDTH + d[None, :]
        gl.store(dh2 + at, gl.convert_layout(acc.to(T), WIDE), mask=(p < PIXELS)[:, None])
        if dw3 is not None:
            db2_t += gl.sum(acc, 0)
        # Loaded earlier, they spill beside the gradient of h2.
        g_j = _load_rows(dparams, ahead + i_of_j, PIXELS, H, W, j, C_OUT)
        g_r = _load_rows(dparams, ahead + i_of_r, PIXELS, H, W, r, C_OUT)
        if dw3 is not None:
            h2_t = held.permute((1, 0))
            dw3_j = (
                warpgroup_mma(h2_t, taps_j.index(0), dw3_j[0]),
                warpgroup_mma(h2_t, taps_j.index(1), dw3_j[1]),
                warpgroup_mma(h2_t, taps_j.index(2), dw3_j[2]),
            )
            dw3_r = (
                warpgroup_mma(h2_t, taps_r.index(0), dw3_r[0]),
                warpgroup_mma(h2_t, taps_r.index(1), dw3_r[1]),
                warpgroup_mma(h2_t, taps_r.index(2), dw3_r[2]),
            )
    async_copy.wait_group(0)
    if dw3 is not None:
        row = split.to(gl.int64) * NUMBERS
        for column in gl.static_range(3):
            to = dw3 + row
            _store_dw3(to, dw3_j[column], d, column, 0, C_OUT, WIDTH, D, J, WARPS)
            _store_dw3(to, dw3_r[column], d, column, J, C_OUT, WIDTH, D, R, WARPS)
        gl.store(db2 + row + gl.convert_layout(d, gl.SliceLayout(0, ACC)), db2_t)
        if block == 0:
            gl.store(db3 + row + j % C_OUT, db3_t, mask=j // C_OUT == 1)
