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
    from_neighbour,
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
    async_copy.async_load(ring.index(turn % STAGES), at, mask=(p < PIXELS)[:, None])


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
    """As `_dh1_kernel` with sums over rows of taps and without d W2, which must be None.

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
    OF_X: gl.constexpr = product_layout(D, X, WARPS)
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
        async_copy.async_load(w2_held.index(turn), w2 + o[:, None] * WIDTH + d[None, :])
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
        dw1_t = gl.zeros([D, X], gl.float32, OF_X)
    turns = 0
    for tile in range(split, TILES, splits):
        p = tile * P + gl.arange(0, P, gl.SliceLayout(1, WIDE))
        at_h1 = h1 + p.to(gl.int64)[:, None] * WIDTH + d[None, :]
        async_copy.async_load(h1_held, at_h1, mask=(p < PIXELS)[:, None])
        if dw1 is not None:
            p = tile * P + gl.arange(0, P, gl.SliceLayout(1, LOAD))
            i = gl.arange(0, X, gl.SliceLayout(0, LOAD))
            x_t = load_taps(x, p, PIXELS, H, W, i, C_IN, 1)
            x_t = gl.where((i == 9 * C_IN)[None, :], 1.0, x_t).to(T)
        acc = gl.zeros([P, D], gl.float32, ACC)
        for turn in gl.static_range(TURNS):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            acc = warpgroup_mma(ring.index((turns + turn) % STAGES), w2_held.index(turn), acc)
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
            dw1_t = warpgroup_mma(h1_held.permute((1, 0)), x_held, dw1_t)
        p = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_J))
        row = p.to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
        sums = _rows_of_dx(h1_held, w1_j, p, W, P, J, OF_J)
        store_rows(dx_taps, sums, row, 0, 3 * C_IN, P, J, PIXELS, p, WARPS)
        p = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_R))
        row = p.to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
        sums = _rows_of_dx(h1_held, w1_r, p, W, P, R, OF_R)
        store_rows(dx_taps, sums, row, J, 3 * C_IN, P, R, PIXELS, p, WARPS)
    async_copy.wait_group(0)
    if dw1 is not None:
        row = split.to(gl.int64) * NUMBERS
        d = gl.program_id(1) * D + gl.arange(0, D, gl.SliceLayout(1, OF_X))
        i = gl.arange(0, X, gl.SliceLayout(0, OF_X))
        at_dw1 = dw1 + row + d[:, None] * (9 * C_IN) + i[None, :]
        gl.store(at_dw1, dw1_t, mask=(i < 9 * C_IN)[None, :])
        at_db1 = db1 + row + d[:, None] + 0 * i[None, :]
        gl.store(at_db1, dw1_t, mask=(i == 9 * C_IN)[None, :])
