"""The kernels of y = W x and of dW, for `conv1x1` and `coupling_conv1x1`.

The fused step is a 1x1 convolution that passes its input through the coupling as it loads it, so
both operators share these kernels. The operators' files give the formulas and the fewest bytes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from mflow_kernels.ops.addresses import at, store, strided
from mflow_kernels.ops.compiler import cdiv, next_power_of_2, tl, triton
from mflow_kernels.ops.coupling_kernels import couple, load_params
from mflow_kernels.ops.launch import AMD, RUN_TIME, architecture, launch, uses_triton
from mflow_kernels.ops.layouts import dense_pixels, net_input, pixels
from mflow_kernels.ops.partial_sums import count_partial_sums, empty_partial_sums, summing_programs
from mflow_kernels.ops.precision import TL_DTYPE, accumulator
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.tiles import columns, ledger_columns, tile_columns, write_ledger


@triton.jit
def load_gradient(
    dy,
    dnet,
    n,
    c,
    p,
    valid,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    PIXELS_FIRST: tl.constexpr = False,
):
    """A tile of dy, channels by columns or transposed, with the gradient of the network input added
    to its first half."""
    if PIXELS_FIRST:
        inside, is_a = (c[None, :] < C) & valid[:, None], (c[None, :] < C // 2) & valid[:, None]
    else:
        inside, is_a = (c[:, None] < C) & valid[None, :], (c[:, None] < C // 2) & valid[None, :]
    at_dy = at(dy, n, c, p, PIXELS_FIRST)
    dy_t = tl.load(at_dy, mask=inside, other=0.0).to(DTYPE)
    if dnet[0] is not None:
        at_dnet = at(dnet, n, c, p, PIXELS_FIRST)
        dy_t += tl.load(at_dnet, mask=is_a, other=0.0).to(DTYPE)
    return dy_t


@triton.jit
def tile_and_block(C: tl.constexpr, BLOCK_O: tl.constexpr):
    """This program's tile of columns and block of output channels.

    The blocks of a tile are neighbours in the grid, so that all but the first find the tile in the
    L2 cache.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    return tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS


@triton.jit(do_not_specialize=RUN_TIME)
def _conv1x1_kernel(
    x,
    dnet,
    coupling_params,
    weight,
    weight_strides,
    bias,
    y,
    net,
    ledger,
    N,
    P,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute y = W x + bias for one tile of columns.

    With a SCALE, x passes through its coupling first. In a backward pass x is a gradient, and dnet
    is added to its first half.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    tile, block = tile_and_block(C, BLOCK_O)
    n, p, valid = columns(tile, N, P, COLUMNS)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    y_t = tl.zeros([BLOCK_O, BLOCK_P], DTYPE)
    log_s_sum = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x_t = load_gradient(x, dnet, n, c, p, valid, C, DTYPE)
        if SCALE is not None:
            raw, shift, is_b = load_params(coupling_params, n, c, p, valid, C, DTYPE)
            x_t, log_s = couple(x_t, raw, shift, is_b, SCALE, INVERSE)
            log_s_sum += log_s
        at_w = weight + o[:, None] * weight_strides[0] + c[None, :] * weight_strides[1]
        w_t = tl.load(at_w, mask=(o[:, None] < C) & (c[None, :] < C), other=0.0)
        y_t = tl.dot(w_t, x_t, y_t, input_precision=PRECISION, out_dtype=DTYPE)
    if bias is not None:
        y_t += tl.load(bias + o, mask=o < C, other=0.0)[:, None]
    tl.store(at(y, n, o, p), y_t, mask=(o[:, None] < C) & valid[None, :])
    if net[0] is not None:
        is_a = (o[:, None] < C // 2) & valid[None, :]
        store(at(net, n, o, p), y_t, mask=is_a)
    if SCALE is not None and block == 0:
        write_ledger(ledger, log_s_sum, tile, N, P, COLUMNS)


@triton.jit(do_not_specialize=RUN_TIME)
def _weight_gradient_kernel(
    dy,
    dnet,
    x,
    coupling_params,
    dweight,
    dbias,
    N,
    P,
    TILES,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One partial sum of dW = sum dy x^T and d bias = sum dy, over every `splits`-th tile.

    Each warp takes 16 output channels. If there are too few channels for all warps, each of GROUPS
    groups of warps takes a part of the columns, and the groups' sums are added at the end.
    """
    BLOCK_P: tl.constexpr = COLUMNS.block
    split, splits = tl.program_id(0), tl.num_programs(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    if GROUPS is None:
        dweight_t = tl.zeros([BLOCK_O, BLOCK_C], DTYPE)
    else:
        dweight_t = tl.zeros([GROUPS, BLOCK_O, BLOCK_C], DTYPE)
    dbias_t = tl.zeros([BLOCK_P, BLOCK_O], DTYPE)
    for tile in range(split, TILES, splits):
        n, p, valid = columns(tile, N, P, COLUMNS)
        dy_t = load_gradient(dy, dnet, n, o, p, valid, C, DTYPE, True)
        # Load columns by channels, as the product needs them. Triton would load a transposed tile
        # in single words.
        at_x = at(x, n, c, p, PIXELS_FIRST=True)
        x_t = tl.load(at_x, mask=valid[:, None] & (c[None, :] < C), other=0.0).to(DTYPE)
        if SCALE is not None:
            raw, shift, is_b = load_params(coupling_params, n, c, p, valid, C, DTYPE)
            x_t = tl.trans(couple(tl.trans(x_t), raw, shift, is_b, SCALE, INVERSE)[0])
        dbias_t += dy_t
        if GROUPS is None:
            dy_t = tl.trans(dy_t)
        else:
            dy_t = tl.reshape(dy_t, [GROUPS, BLOCK_P // GROUPS, BLOCK_O])
            dy_t = tl.permute(dy_t, (0, 2, 1))
            x_t = tl.reshape(x_t, [GROUPS, BLOCK_P // GROUPS, BLOCK_C])
        dweight_t = tl.dot(dy_t, x_t, dweight_t, input_precision=PRECISION, out_dtype=DTYPE)
    if GROUPS is not None:
        dweight_t = tl.sum(dweight_t, axis=0)
    at_dweight = dweight + split.to(tl.int64) * (C * C) + o[:, None] * C + c[None, :]
    tl.store(at_dweight, dweight_t, mask=(o[:, None] < C) & (c[None, :] < C))
    if tl.program_id(2) == 0:
        tl.store(dbias + split * C + o, tl.sum(dbias_t, axis=0), mask=o < C)


class Conv1x1Tile(NamedTuple):
    """Blocks of a product: output channels, input channels, columns; its warps; and the most
    registers of a thread (None leaves the limit to ptxas)."""

    block_o: int
    block_c: int
    block_p: int
    warps: int
    registers: int | None = None


def conv1x1_tile(c: int) -> Conv1x1Tile:
    block_o = min(128, max(16, next_power_of_2(c)))
    block_c = 16 if c <= 16 or 32 < c <= 48 else 32  # three blocks of 16 hold 48 channels
    # In tf32x3 each warp takes 16 rows of a product, and further warps would repeat rows. Up to
    # C = 32 there are more columns than rows, and the warps share out the columns.
    # With fewer registers, ptxas spills at C = 24 to fit one more program on a multiprocessor.
    registers = 255 if 16 < c <= 32 else None
    return Conv1x1Tile(block_o, block_c, 64 if c <= 32 else 32, 4, registers)


# A batch of one product. Triton before 3.9 keeps its operands in local memory: up to 8 KB a thread
# at C = 48 (static report with Triton 3.6.0, 3.7.0 and 3.7.1).
ONE_GROUP = 1 if TorchVersion(triton.__version__) >= "3.9" else None


class WeightGradientTile(NamedTuple):
    """Blocks of dW and of columns, warps, groups of warps that share out the columns, and the most
    registers of a thread (None leaves the limit to ptxas).

    If `groups` is a number, even 1, the operands pass through shared memory with few bank
    conflicts. If it is None, the loads are pipelined; above 64 channels there are enough registers
    for that.
    """

    block: int
    block_p: int
    warps: int
    groups: int | None
    registers: int | None = None


def weight_gradient_tile(c: int, dtype: torch.dtype) -> WeightGradientTile:
    """Tile for a state of c channels whose products are summed in dtype."""
    block = min(128, max(16, next_power_of_2(c)))
    if dtype == torch.float64:
        return WeightGradientTile(block, 32 if c <= 64 else 16, max(4, block // 16), None)
    if block <= 32:
        # Two programs of a multiprocessor fit 255 registers. Without this limit, ptxas spills at
        # C = 24 to fit a third one.
        return WeightGradientTile(block, 64, 4, 4, 255 if block == 32 else None)
    if c <= 64:
        return WeightGradientTile(block, 32, block // 16, ONE_GROUP)
    # Here 32 columns spill on sm_90 and do not fit the shared memory of sm_80.
    return WeightGradientTile(block, 16, block // 16, None)


def weight_gradient_splits(x: Tensor) -> int:
    """Number of partial sums of dW that a backward launch on the state x stores."""
    if not uses_triton(x):
        return 1
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    tile = weight_gradient_tile(c, accumulator(x.dtype))
    tiles = tile_columns(n, p, tile.block_p).programs
    programs = summing_programs(x.device) // cdiv(c, tile.block) ** 2
    return count_partial_sums(n * p, c, min(tiles, programs))


# Triton before 3.7.1 sets no proxy fence between an asynchronous copy to shared memory and a tensor
# core of sm_90 that reads the copy (triton-lang/triton#9610).
FENCES_COPIES = TorchVersion(triton.__version__) >= "3.7.1"


def pipeline_stages(precision: str) -> int:
    """Pipelining stages of a loop that multiplies tiles as they were loaded.

    A pipeline loads tiles by asynchronous copies. Only a "tf32" product reads such a copy directly.
    For "tf32x3" the operands are split in registers and written back, with a fence.
    """
    return 3 if FENCES_COPIES or precision != "tf32" else 1


def arithmetic(x: Tensor, precision: str) -> dict[str, Any]:
    """The compile-time constants of a kernel that computes products of the state x.

    AMD's matrix cores multiply float32 directly, and its compiler has no tf32x3.
    """
    dtype = accumulator(x.dtype)
    exact = dtype == torch.float64 or architecture(x.device) == AMD
    return {"PRECISION": "ieee" if exact else precision, "DTYPE": TL_DTYPE[dtype]}


def shared_operand_stages(precision: str) -> int:
    """Pipelining stages of a loop that multiplies a tile as loaded and also uses it in another way.

    With "tf32", sm_90 multiplies asynchronously from the buffer that the tile was loaded to. Triton
    3.9 frees that buffer after the other use, so the next load would overwrite the operand of a
    product that still runs. One stage prevents this, since it holds one tile at a time. "tf32x3"
    and 16-bit states are multiplied from registers.
    """
    return 1 if precision == "tf32" else 2


def launch_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: str,
    net_dtype: torch.dtype | None = None,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
    dnet: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One launch: y = W x + bias, the network input cut from y, and the coupling's ledger.

    With params, x passes through its coupling first.
    """
    x = dense_pixels(x)
    params = None if params is None else dense_pixels(params)
    dnet = None if dnet is None else dense_pixels(dnet)
    y = torch.empty_like(x)
    net = net_input(y, net_dtype)
    net_or_none = None if net_dtype is None else net
    ledger, tile = None, conv1x1_tile(x.shape[1])
    if params is not None:
        entries = ledger_columns(x, tile.block_p)
        ledger = x.new_empty((len(x), entries), dtype=accumulator(x.dtype))
    tensors = (
        *(strided(x), strided(dnet), strided(params), weight, weight.stride(), bias),
        *(strided(y), strided(net_or_none), ledger),
    )
    launch_product(_conv1x1_kernel, tensors, x, precision, scale, inverse, tile)
    return y, net, ledger


def launch_product(
    kernel: Any,
    tensors: tuple[Any, ...],
    x: Tensor,
    precision: str,
    scale: ScaleFunction | None,
    inverse: bool,
    tile: Conv1x1Tile,
) -> None:
    """Launch a kernel that multiplies W with a state like x: one program for each block of output
    channels of each tile of columns."""
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    tiles = tile_columns(n, p, tile.block_p)
    if n:
        launch(
            kernel,
            (tiles.programs * cdiv(c, tile.block_o),),
            *(*tensors, n, p),
            flops=2 * n * p * c**2,
            C=c,
            SCALE=scale,
            INVERSE=inverse,
            **arithmetic(x, precision),
            BLOCK_O=tile.block_o,
            BLOCK_C=tile.block_c,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            maxnreg=tile.registers,
            # More stages than turns of the loop would only take shared memory and registers.
            num_stages=min(pipeline_stages(precision), cdiv(c, tile.block_c)),
        )


def launch_weight_gradient(
    dy: Tensor,
    dnet: Tensor | None,
    x: Tensor,
    weight: Tensor,
    precision: str,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One launch: partial sums of dW, shaped as weight (splits, C, C), and d bias (splits, C)."""
    dy, x = dense_pixels(dy), dense_pixels(x)
    dnet = None if dnet is None else dense_pixels(dnet)
    params = None if params is None else dense_pixels(params)
    n, c, p = x.shape[0], x.shape[1], pixels(x)
    tile = weight_gradient_tile(c, accumulator(x.dtype))
    tiles = tile_columns(n, p, tile.block_p)
    dweight = empty_partial_sums(weight)
    dbias = dweight.new_empty(dweight.shape[:2])
    if n == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        launch(
            _weight_gradient_kernel,
            (len(dweight), cdiv(c, tile.block), cdiv(c, tile.block)),
            *(strided(dy), strided(dnet), strided(x), strided(params)),
            *(dweight, dbias, n, p, tiles.programs),
            flops=2 * n * p * c**2,
            C=c,
            SCALE=scale,
            INVERSE=inverse,
            **arithmetic(x, precision),
            BLOCK_O=tile.block,
            BLOCK_C=tile.block,
            GROUPS=tile.groups,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            maxnreg=tile.registers,
            # Groups have no pipeline: their order of columns would need 4-byte asynchronous copies.
            num_stages=shared_operand_stages(precision) if tile.groups is None else 1,
        )
    return dweight, dbias
