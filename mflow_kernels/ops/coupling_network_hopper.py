"""The forward kernel of wide `coupling_network`s on Hopper, in Gluon.

In plain Triton, h1 is computed again for each block of columns of h2, because a kernel has no say
in what lies in shared memory. Here h1 of a tile of pixels stays there, (PIXELS, width), and each
product is computed once. Weights pass through a ring of tiles, filled by asynchronous copies.

Gluon's interface changes with Triton's versions; `compiler.GLUON` says whether it is a known one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mflow_kernels.ops.coupling_network_kernels import RUN_TIME_SIZES


@gluon.jit
def _copy(
    ring, turn, w, block, COLUMNS: gl.constexpr, PARTS: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr, COPY: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Begin to copy what turn `turn` of block `block` needs of w (ROWS, COLUMNS): N rows and K
    columns. Turns past the last one of a block belong to the next block."""
    turn += block * PARTS
    n = turn // PARTS * N + gl.arange(0, N, gl.SliceLayout(1, COPY))
    k = turn % PARTS * K + gl.arange(0, K, gl.SliceLayout(0, COPY))
    inside = (n < ROWS)[:, None] & (k < COLUMNS)[None, :]
    at = w + n[:, None] * COLUMNS + k[None, :]
    async_copy.async_load(ring.index(turn % STAGES), at, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _add_rows(
    sums, h2, at_w3, w3_tile, first, step, p, W, C_OUT: gl.constexpr, WIDTH: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, P: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Add to sums [P, J] what h2 [P, N], hidden channels step * N + ..., gives each row of taps;
    its columns are first + 0 .. J - 1."""
    J: gl.constexpr = sums.shape[1]
    LAYOUT: gl.constexpr = sums.type.layout
    j = first + gl.arange(0, J, gl.SliceLayout(1, COPY))
    k = step * N + gl.arange(0, K, gl.SliceLayout(0, COPY))
    for column in gl.static_range(3):
        taps = gl.zeros([P, J], gl.float32, LAYOUT)
        for part in gl.static_range(N // K):
            at = ((j % C_OUT) * 9 + j // C_OUT * 3 + column)[:, None] * WIDTH
            at = at_w3 + at + (part * K + k)[None, :]
            async_copy.async_load(w3_tile, at, mask=(j < 3 * C_OUT)[:, None])
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
            taps = warpgroup_mma(h2.slice(part * K, K, 1), w3_tile.permute((1, 0)), taps)
        if column == 1:
            sums += taps
        else:  # of the pixel to the left or right, as `from_neighbour`
            source = gl.arange(0, P, gl.SliceLayout(1, LAYOUT)) + column - 1
            beside = p % W + column - 1
            there = (beside >= 0) & (beside < W)
            source = gl.minimum(gl.maximum(source, 0), P - 1)
            moved = gl.gather(taps, source[:, None] + gl.zeros([P, J], gl.int32, LAYOUT), 0)
            sums += gl.where(there[:, None], moved, 0.0)
    return sums


@gluon.jit
def _store_sums(
    row_sums, sums, first, tile, PIXELS, C_OUT: gl.constexpr, P: gl.constexpr, J: gl.constexpr,
    OUT: gl.constexpr,
):  # fmt: skip
    p = tile * P + gl.arange(0, P, gl.SliceLayout(1, OUT))
    j = first + gl.arange(0, J, gl.SliceLayout(0, OUT))
    value = gl.convert_layout(sums.to(row_sums.dtype.element_ty), OUT)
    at = row_sums + p.to(gl.int64)[:, None] * (3 * C_OUT) + j[None, :]
    gl.store(at, value, mask=(p < PIXELS)[:, None] & (j < 3 * C_OUT)[None, :])


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

    BLOCK_D divides WIDTH and BLOCK_X, and BLOCK_J + BLOCK_R columns hold all sums of a pixel.
    """
    TAPS: gl.constexpr = 9
    P: gl.constexpr = BLOCK_P
    N: gl.constexpr = BLOCK_D
    K: gl.constexpr = BLOCK_K
    T: gl.constexpr = x.dtype.element_ty
    # Groups of four warps share the pixels if there are 64 for each, and the columns otherwise.
    BY_P: gl.constexpr = P // 16
    BY_N: gl.constexpr = gl.num_warps() // BY_P
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BY_P, BY_N], [16, N // BY_N, 16])
    OF_J: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BY_P, BY_N], [16, BLOCK_J // BY_N, 16])
    OF_R: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BY_P, BY_N], [16, BLOCK_R // BY_N, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [gl.num_warps(), 1], [1, 0])
    TURNS1: gl.constexpr = (TAPS * C_IN + K - 1) // K
    tile = gl.program_id(0)

    p = tile * P + gl.arange(0, P, gl.SliceLayout(1, WIDE))
    i = gl.arange(0, BLOCK_X, gl.SliceLayout(0, WIDE))
    tap, c = i // C_IN, i % C_IN
    down, right = tap // 3 - 1, tap % 3 - 1
    row, column = ((p // W) % H)[:, None] + down[None, :], (p % W)[:, None] + right[None, :]
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    inside = inside & (tap < TAPS)[None, :] & (p < PIXELS)[:, None]
    source = (p[:, None] + down[None, :] * W + right[None, :]).to(gl.int64)
    x_t = gl.load(x + source * C_IN + c[None, :], mask=inside, other=0.0)
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, BLOCK_X], T)
    x_held = gl.allocate_shared_memory(T, [P, BLOCK_X], X_LAYOUT, x_t)

    H_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P, N], T)
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, K], T)
    h1_held = gl.allocate_shared_memory(T, [WIDTH // N, P, N], H_LAYOUT)
    ring = gl.allocate_shared_memory(T, [STAGES, N, K], RING)
    own = (p < PIXELS)[:, None]
    hidden = p.to(gl.int64)[:, None] * WIDTH
    columns = gl.arange(0, N, gl.SliceLayout(0, WIDE))[None, :]
    n = gl.arange(0, N, gl.SliceLayout(0, ACC))
    for early in gl.static_range(STAGES - 1):
        _copy(ring, early, w1, 0, TAPS * C_IN, TURNS1, N, K, STAGES, COPY, WIDTH)
    for block in range(WIDTH // N):
        bias = gl.load(b1 + block * N + n).to(gl.float32)
        acc = gl.zeros([P, N], gl.float32, ACC)
        for turn in gl.static_range(TURNS1):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            weights = ring.index((block * TURNS1 + turn) % STAGES).permute((1, 0))
            acc = warpgroup_mma(x_held.slice(turn * K, K, 1), weights, acc)
            _copy(ring, turn + STAGES - 1, w1, block, TAPS * C_IN, TURNS1, N, K, STAGES, COPY,
                  WIDTH)  # fmt: skip
        acc += bias[None, :]
        h1_held.index(block).store(gl.where(acc <= 0.0, 0.0, acc).to(T))
        if h1 is not None:
            gl.store(h1 + hidden + block * N + columns, h1_held.index(block).load(WIDE), mask=own)
    async_copy.wait_group(0)

    h2_held = x_held.slice(0, N, 1)  # x is no longer needed
    J_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_J, K], T)
    R_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_R, K], T)
    tile_j = gl.allocate_shared_memory(T, [BLOCK_J, K], J_LAYOUT)
    tile_r = gl.allocate_shared_memory(T, [BLOCK_R, K], R_LAYOUT)
    sums = gl.zeros([P, BLOCK_J], gl.float32, OF_J)
    rest = gl.zeros([P, BLOCK_R], gl.float32, OF_R)
    p_of_j = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_J))
    p_of_r = tile * P + gl.arange(0, P, gl.SliceLayout(1, OF_R))
    for early in gl.static_range(STAGES - 1):
        _copy(ring, early, w2, 0, WIDTH, WIDTH // K, N, K, STAGES, COPY, WIDTH)
    for block in range(WIDTH // N):
        bias = gl.load(b2 + block * N + n).to(gl.float32)
        acc = gl.zeros([P, N], gl.float32, ACC)
        for held in range(WIDTH // N):
            for part in gl.static_range(N // K):
                step = held * (N // K) + part
                async_copy.wait_group(STAGES - 2)
                fence_async_shared()
                weights = ring.index((block * (WIDTH // K) + step) % STAGES).permute((1, 0))
                acc = warpgroup_mma(h1_held.index(held).slice(part * K, K, 1), weights, acc)
                _copy(ring, step + STAGES - 1, w2, block, WIDTH, WIDTH // K, N, K, STAGES, COPY,
                      WIDTH)  # fmt: skip
        acc += bias[None, :]
        h2_held.store(gl.where(acc <= 0.0, 0.0, acc).to(T))
        if h2 is not None:
            gl.store(h2 + hidden + block * N + columns, h2_held.load(WIDE), mask=own)
        sums = _add_rows(sums, h2_held, w3, tile_j, 0, block, p_of_j, W, C_OUT, WIDTH, N, K, P,
                         COPY)  # fmt: skip
        rest = _add_rows(rest, h2_held, w3, tile_r, BLOCK_J, block, p_of_r, W, C_OUT, WIDTH, N, K,
                         P, COPY)  # fmt: skip
    async_copy.wait_group(0)
    _store_sums(row_sums, sums, 0, tile, PIXELS, C_OUT, P, BLOCK_J, OUT)
    _store_sums(row_sums, rest, BLOCK_J, tile, PIXELS, C_OUT, P, BLOCK_R, OUT)
