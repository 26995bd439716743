"""The kernels of wide `coupling_network`s on Hopper, in Gluon: the forward pass.

In plain Triton a kernel has no say in what lies in shared memory. Here h1 of a tile of pixels stays
there, (PIXELS, width), so that each product is computed once. Weights pass through a ring of tiles,
filled by asynchronous copies.

Gluon's interface changes with Triton's versions; `compiler.GLUON` says whether it is a known one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

from mflow_kernels.ops.coupling_network_kernels import RUN_TIME_SIZES

# Triton 3.9 renamed it.
load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def product_layout(rows: int, columns: int, warps: int) -> gl.NVMMADistributedLayout:
    """Groups of four warps share the rows if there are 64 for each, and the columns otherwise."""
    by_rows = min(warps, rows // 16)
    shape = [16, columns * by_rows // warps, 16]
    return gl.NVMMADistributedLayout([3, 0], [by_rows, warps // by_rows], shape)


@gluon.constexpr_function
def copy_layout(columns: int, warps: int) -> gl.BlockedLayout:
    """Each thread has 16 bytes of a row."""
    across = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def load_taps(x, p, PIXELS, H, W, i, C: gl.constexpr, SIGN: gl.constexpr):
    """As in `coupling_network_kernels`, for the columns i of a 3x3 convolution."""
    tap, c = i // C, i % C
    down, right = SIGN * (tap // 3 - 1), SIGN * (tap % 3 - 1)
    row, column = ((p // W) % H)[:, None] + down[None, :], (p % W)[:, None] + right[None, :]
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    inside = inside & (tap < 9)[None, :] & (p < PIXELS)[:, None]
    source = (p[:, None] + down[None, :] * W + right[None, :]).to(gl.int64)
    return gl.load(x + source * C + c[None, :], mask=inside, other=0.0)


@gluon.jit
def from_neighbour(taps, p, W, STEP: gl.constexpr, P: gl.constexpr, J: gl.constexpr):
    """As in `coupling_network_kernels`."""
    if STEP == 0:
        return taps
    else:
        LAYOUT: gl.constexpr = taps.type.layout
        source = gl.arange(0, P, gl.SliceLayout(1, LAYOUT)) + STEP
        source = gl.minimum(gl.maximum(source, 0), P - 1)
        column = p % W + STEP
        moved = gl.gather(taps, source[:, None] + gl.zeros([P, J], gl.int32, LAYOUT), 0)
        return gl.where(((column >= 0) & (column < W))[:, None], moved, 0.0)


@gluon.jit
def store_rows(
    y, value, row, first, ROW: gl.constexpr, P: gl.constexpr, J: gl.constexpr, PIXELS, p,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Store value [P, J] at columns first + 0 .. J - 1 of the given rows of y, of ROW numbers."""
    OUT: gl.constexpr = copy_layout(J, WARPS)
    there = gl.convert_layout(p < PIXELS, gl.SliceLayout(1, OUT))
    row = gl.convert_layout(row, gl.SliceLayout(1, OUT))
    j = first + gl.arange(0, J, gl.SliceLayout(0, OUT))
    value = gl.convert_layout(value.to(y.dtype.element_ty), OUT)
    at = y + row[:, None] * ROW + j[None, :]
    gl.store(at, value, mask=there[:, None] & (j < ROW)[None, :])


@gluon.jit
def _copy(
    ring, turn, w, block, COLUMNS: gl.constexpr, TURNS: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Begin to copy what turn `turn` of block `block` needs of w (ROWS, COLUMNS): N rows and K
    columns. Turns past the last one of a block belong to the next block."""
    COPY: gl.constexpr = copy_layout(K, WARPS)
    turn += block * TURNS
    n = turn // TURNS * N + gl.arange(0, N, gl.SliceLayout(1, COPY))
    k = turn % TURNS * K + gl.arange(0, K, gl.SliceLayout(0, COPY))
    inside = (n < ROWS)[:, None] & (k < COLUMNS)[None, :]
    at = w + n[:, None] * COLUMNS + k[None, :]
    load_async(ring.index(turn % STAGES), at, mask=inside)
    async_copy.commit_group()


@gluon.jit
def copy_w3(
    to, w3, step, first, J: gl.constexpr, C_OUT: gl.constexpr, WIDTH: gl.constexpr,
    N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Begin to copy J columns of W3's sums over rows, in the tap column step % 3, for the hidden
    channels step // 3 * N + ..."""
    COPY: gl.constexpr = copy_layout(N, WARPS)
    j = first + gl.arange(0, J, gl.SliceLayout(1, COPY))
    d = step // 3 * N + gl.arange(0, N, gl.SliceLayout(0, COPY))
    at = ((j % C_OUT) * 9 + j // C_OUT * 3 + step % 3)[:, None] * WIDTH
    inside = (j < 3 * C_OUT)[:, None] & (d < WIDTH)[None, :]
    load_async(to, w3 + at + d[None, :], mask=inside)


@gluon.jit
def _relu(acc, bias, n, T: gl.constexpr):
    acc += gl.load(bias + n).to(gl.float32)[None, :]
    return gl.where(acc <= 0.0, 0.0, acc).to(T)


@gluon.jit(do_not_specialize=RUN_TIME_SIZES)
def _hopper_network_kernel(
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
    C_IN: gl.constexpr,
    WIDTH: gl.constexpr,
    C_OUT: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_X: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_J: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Store the sums over the three taps in each row of W3 (3 * C_OUT at a pixel), for one tile of
    pixels, which are whole rows of the image. Store h1 and h2 too if they are given.

    BLOCK_D divides WIDTH, and BLOCK_J + BLOCK_R columns hold all sums of a pixel.
    """
    P: gl.constexpr = BLOCK_P
    N: gl.constexpr = BLOCK_D
    K: gl.constexpr = BLOCK_K
    J: gl.constexpr = BLOCK_J
    R: gl.constexpr = BLOCK_R
    T: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    TURNS1: gl.constexpr = (9 * C_IN + K - 1) // K
    TURNS2: gl.constexpr = WIDTH // K
    ACC: gl.constexpr = product_layout(P, N, WARPS)
    OF_J: gl.constexpr = product_layout(P, J, WARPS)
    OF_R: gl.constexpr = product_layout(P, R, WARPS)
    WIDE: gl.constexpr = copy_layout(N, WARPS)
    OF_X: gl.constexpr = copy_layout(BLOCK_X, WARPS)
    tile = gl.program_id(0)

    p = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_X))
    i = gl.arange(0, BLOCK_X, gl.SliceLayout(0, OF_X))
    x_t = load_taps(x, p, PIXELS, H, W, i, C_IN, 1)
    X_HELD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, BLOCK_X], T)
    x_held = gl.allocate_shared_memory(T, [P, BLOCK_X], X_HELD, x_t)

    HIDDEN: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, N], T)
    h1_held = gl.allocate_shared_memory(T, [WIDTH // N, P, N], HIDDEN)
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, K], T)
    ring = gl.allocate_shared_memory(T, [STAGES, N, K], RING)
    p = tile * P + gl.arange(0, P, gl.SliceLayout(1, WIDE))
    own = (p < PIXELS)[:, None]
    n = gl.arange(0, N, gl.SliceLayout(0, ACC))
    hidden = p.to(gl.int64)[:, None] * WIDTH + gl.arange(0, N, gl.SliceLayout(0, WIDE))[None, :]
    for early in gl.static_range(STAGES - 1):
        _copy(ring, early, w1, 0, 9 * C_IN, TURNS1, N, K, STAGES, WIDTH, WARPS)
    for block in range(WIDTH // N):
        acc = gl.zeros([P, N], gl.float32, ACC)
        for turn in gl.static_range(TURNS1):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            weights = ring.index((block * TURNS1 + turn) % STAGES).permute((1, 0))
            acc = warpgroup_mma(x_held.slice(turn * K, K, 1), weights, acc)
            _copy(ring, turn + STAGES - 1, w1, block, 9 * C_IN, TURNS1, N, K, STAGES, WIDTH, WARPS)
        h1_held.index(block).store(_relu(acc, b1, block * N + n, T))
        if h1 is not None:
            gl.store(h1 + hidden + block * N, h1_held.index(block).load(WIDE), mask=own)
    async_copy.wait_group(0)

    IN_J: gl.constexpr = gl.NVMMASharedLayout.get_default_for([J, N], T)
    IN_R: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, N], T)
    w3_j = gl.allocate_shared_memory(T, [2, J, N], IN_J)
    w3_r = gl.allocate_shared_memory(T, [2, R, N], IN_R)
    sums = gl.zeros([P, J], gl.float32, OF_J)
    rest = gl.zeros([P, R], gl.float32, OF_R)
    p_of_h2 = tile * P + gl.arange(0, P, gl.SliceLayout(1, ACC))
    p_of_j = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_J))
    p_of_r = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_R))
    for early in gl.static_range(STAGES - 1):
        _copy(ring, early, w2, 0, WIDTH, TURNS2, N, K, STAGES, WIDTH, WARPS)
    for block in range(WIDTH // N):
        copy_w3(w3_j.index(block % 2), w3, 3 * block, 0, J, C_OUT, WIDTH, N, WARPS)
        copy_w3(w3_r.index(block % 2), w3, 3 * block, J, R, C_OUT, WIDTH, N, WARPS)
        async_copy.commit_group()
        acc = gl.zeros([P, N], gl.float32, ACC)
        for held in range(WIDTH // N):
            for part in gl.static_range(N // K):
                step = held * (N // K) + part
                async_copy.wait_group(STAGES - 2)
                fence_async_shared()
                weights = ring.index((block * TURNS2 + step) % STAGES).permute((1, 0))
                acc = warpgroup_mma(h1_held.index(held).slice(part * K, K, 1), weights, acc)
                _copy(ring, step + STAGES - 1, w2, block, WIDTH, TURNS2, N, K, STAGES, WIDTH, WARPS)
        h2_r = _relu(acc, b2, block * N + n, T)
        if h2 is not None:
            gl.store(h2 + hidden + block * N, gl.convert_layout(h2_r, WIDE), mask=own)
        for column in gl.static_range(3):
            step = 3 * block + column
            async_copy.wait_group(0)
            fence_async_shared()
            now_j, now_r = w3_j.index(step % 2), w3_r.index(step % 2)
            if column < 2:
                copy_w3(w3_j.index((step + 1) % 2), w3, step + 1, 0, J, C_OUT, WIDTH, N, WARPS)
                copy_w3(w3_r.index((step + 1) % 2), w3, step + 1, J, R, C_OUT, WIDTH, N, WARPS)
                async_copy.commit_group()
            # Neighbours of h2 take less room than those of the sums, which have float32.
            moved = from_neighbour(h2_r, p_of_h2, W, column - 1, P, N)
            of_j = gl.convert_layout(moved, gl.DotOperandLayout(0, OF_J, 2))
            sums = warpgroup_mma(of_j, now_j.permute((1, 0)), sums)
            of_r = gl.convert_layout(moved, gl.DotOperandLayout(0, OF_R, 2))
            rest = warpgroup_mma(of_r, now_r.permute((1, 0)), rest)
    async_copy.wait_group(0)
    store_rows(row_sums, sums, p_of_j.to(gl.int64), 0, 3 * C_OUT, P, J, PIXELS, p_of_j, WARPS)
    store_rows(row_sums, rest, p_of_r.to(gl.int64), J, 3 * C_OUT, P, R, PIXELS, p_of_r, WARPS)
