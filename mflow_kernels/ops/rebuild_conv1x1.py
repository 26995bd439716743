r"""Backward through the 1x1 convolution of a step of flow that stored nothing.

This is the second launch of a step's backward pass. `rebuild_coupling` and the backward pass of the
network ran before it, and the network gave a gradient dnet of y_a. With y = W x + bias and
dy = (dy_a + dnet, dy_b), the launch computes

    x = W^-1 (y - bias),   dx = W^T dy
    outer_sum = sum over samples and pixels of dy (y - bias)^T,   d bias = sum of dy

and the network input, a copy of x_a in the network's dtype. The caller computes
dW = sum dy x^T = outer_sum W^-T in float64, for all steps at once; these are C x C products. Swap W
and W^-1 for an inverse (sampling) chain. The halves of y and dy are separate tensors, as
`rebuild_coupling` returns them.

Shapes: states (N, C, *spatial), C_a = C // 2, C_b = C - C_a. dtypes: as `conv1x1`; every
float32 product is computed as three tf32 products.
Bytes at least, in states: 2 (and dnet) read, 2 (and the network input) written. Up to C = 96 (64
before Triton 3.9) one program computes all three products of its pixels; above C = 64 it reads y
and dy twice on cards before sm_90. With more channels, three products do not fit the registers.
Other programs then compute outer_sum and read y and dy once more, and each block of 128 output
channels reads its input again; arithmetic limits the speed. Float64 states always use these other
programs, with blocks of at most 32 channels.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import KernelState, strided, strided_halves
from mflow_kernels.ops.channel_products import arithmetic
from mflow_kernels.ops.compiler import cdiv, next_power_of_2, triton
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import architecture, geforce, launch, uses_triton
from mflow_kernels.ops.layouts import cut_net_input, dense_pixels, halves, pixels
from mflow_kernels.ops.partial_sums import count_partial_sums, multiprocessors
from mflow_kernels.ops.precision import accumulator, without_autocast
from mflow_kernels.ops.rebuild_conv1x1_kernels import (
    _rebuild_conv1x1_kernel,
    _rebuild_conv1x1_sliced_kernel,
    _rebuild_conv1x1_wide_kernel,
)
from mflow_kernels.ops.tiles import tile_columns

Halves = tuple[Tensor, Tensor]


class RebuiltConv1x1(NamedTuple):
    """Results of `rebuild_conv1x1`.

    Attributes:
        x: the halves of x.
        dx: the halves of its gradient.
        whole: the whole states x and dx, if `x` and `dx` are views of their halves; None if the
            halves are separate dense tensors.
        net: the network input x_a, or None.
        outer_sum: partial sums, (splits, C, C).
        dbias: partial sums, (splits, C).
    """

    x: Halves
    dx: Halves
    whole: tuple[Tensor, Tensor] | None
    net: Tensor | None
    outer_sum: Tensor
    dbias: Tensor


def in_one_piece(
    x: Tensor, dx: Tensor, net: Tensor | None, outer_sum: Tensor, dbias: Tensor
) -> RebuiltConv1x1:
    """Results whose halves are views of whole states."""
    return RebuiltConv1x1(halves(x), halves(dx), (x, dx), net, outer_sum, dbias)


def rebuild_conv1x1_ref(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
) -> RebuiltConv1x1:
    dtype, c = accumulator(y[1].dtype), weight.shape[0]
    shifted = torch.cat(y, dim=1).to(dtype)
    gradient = torch.cat(dy, dim=1).to(dtype)
    if dnet is not None:
        gradient[:, : c // 2] += dnet
    columns = [t.movedim(1, -1).reshape(-1, c) for t in (shifted, gradient)]
    y_p, dy_p = columns[0] - bias, columns[1]

    def state(rows: Tensor) -> Tensor:
        n, *spatial = y[1].shape[:1] + y[1].shape[2:]
        whole = rows.view(n, *spatial, c).movedim(-1, 1).to(y[1].dtype)
        return whole if channels_last or not spatial else whole.contiguous()

    with without_autocast(shifted):
        x, dx = state(y_p @ weight_inverse.t()), state(dy_p @ weight)
        outer_sum, dbias = (dy_p.t() @ y_p)[None], dy_p.sum(0)[None]
    net = None if net_dtype is None else cut_net_input(x, net_dtype)
    return in_one_piece(x, dx, net, outer_sum, dbias)


class RebuildTile(NamedTuple):
    """Tile of a launch.

    Attributes:
        kernel: one of `rebuild_conv1x1_kernels`.
        blocks: the kernel's compile-time sizes of blocks of channels, by their names.
        block_o: output channels of a program.
        block_p: columns of a tile.
        warps: warps of a program.
        programs: programs per multiprocessor; each stores a partial sum.
        registers: most registers of a thread; None leaves the limit to ptxas.
    """

    kernel: Any
    blocks: dict[str, int]
    block_o: int
    block_p: int
    warps: int
    programs: int
    registers: int | None = None


# Channels whose three products one program computes. At 96 channels, Triton 3.6 compiles a program
# for sm_100 that only traps, and spills on sm_90.
MOST_SLICED = 96 if TorchVersion(triton.__version__) >= "3.9" else 64


def rebuild_tile(c: int, dtype: torch.dtype, device: torch.device) -> RebuildTile:
    """Tiles with which no launch of the presets' models spills on any target of
    `benchmarks.reports.static`.
    """
    if dtype == torch.float64:
        # Without a limit of registers, ptxas spills at C = 24 to fit a seventh program.
        block_o = 16 if c <= 16 else 32
        kernel, blocks = _rebuild_conv1x1_wide_kernel, {"BLOCK_O": block_o, "BLOCK_C": 16}
        return RebuildTile(kernel, blocks, block_o, 16, 4, 2, registers=128)
    # On sm_120, programs for more than 64 channels spill up to 600 bytes.
    if c > (64 if architecture(device) // 10 == 12 else MOST_SLICED):
        blocks = {"BLOCK_O": 128, "BLOCK_C": 64}
        return RebuildTile(_rebuild_conv1x1_wide_kernel, blocks, 128, 16, 8, 2)
    c_b = c - c // 2
    if c_b < 16:
        half = 8 if c_b < 8 else 16  # more than c_b: the last place sums d bias
        blocks, programs = {"HALF": half, "WARPS": 4}, 4 if half == 8 else 2
        # Without a limit, ptxas spills at C = 12 to fit a fourth program on sm_86.
        registers = 168 if half == 8 and geforce(architecture(device)) else None
        kernel = _rebuild_conv1x1_kernel
        return RebuildTile(kernel, blocks, 2 * half, 64, 4, programs, registers)
    if c <= 64:
        half = next_power_of_2(c_b)
        warps = 2 * half // 16  # each warp takes 16 rows of a product
        # A multiprocessor gets two programs, which fit 255 registers. Without this limit, ptxas
        # spills at C = 48 to fit a third one.
        kernel, blocks = _rebuild_conv1x1_sliced_kernel, {"SLICE": half}
        return RebuildTile(kernel, blocks, 2 * half, 16, warps, 2, registers=255)
    return RebuildTile(_rebuild_conv1x1_sliced_kernel, {"SLICE": 32}, 128, 32, 8, 1)


def rebuild_splits(half: Tensor, c: int) -> int:
    """Number of partial sums for a state of c channels; `half` is one of its halves."""
    if not uses_triton(half):
        return 1
    tile = rebuild_tile(c, accumulator(half.dtype), half.device)
    blocks = cdiv(c, tile.block_o) ** 2
    n, p = half.shape[0], pixels(half)
    programs = tile.programs * multiprocessors(half.device) // blocks
    return count_partial_sums(n * p, c, min(tile_columns(n, p, tile.block_p).programs, programs))


def launch_rebuild_conv1x1(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
    separate_halves: bool,
    outer_sum: Tensor,
    dbias: Tensor,
) -> RebuiltConv1x1:
    """One launch."""
    y_a, y_b, dy_a, dy_b = map(dense_pixels, (*y, *dy))
    dnet = None if dnet is None else dense_pixels(dnet)
    weight, weight_inverse = weight.contiguous(), weight_inverse.contiguous()
    n, c, p, splits = y_a.shape[0], weight.shape[0], pixels(y_a), outer_sum.shape[0]
    tile = rebuild_tile(c, accumulator(y_b.dtype), y_b.device)
    tiles = tile_columns(n, p, tile.block_p)
    narrow = tile.kernel is _rebuild_conv1x1_kernel
    if separate_halves and narrow:
        c_a = c // 2
        new = partial(empty_state, y_b, channels_last=channels_last)
        x, dx_halves = ((new(c_a), new(c - c_a)) for _ in range(2))
        made = RebuiltConv1x1(x, dx_halves, None, None, outer_sum, dbias)
    else:
        dx = empty_state(y_b, c, channels_last)
        made = in_one_piece(torch.empty_like(dx), dx, None, outer_sum, dbias)
    net = stored = None
    if net_dtype is not None:
        if made.whole is None and net_dtype == y_b.dtype:
            net = made.x[0]
        else:
            net = stored = torch.empty_like(made.x[0], dtype=net_dtype)
        made = made._replace(net=net)
    if n == 0:
        outer_sum.zero_()
        dbias.zero_()
    else:
        wide = tile.kernel is _rebuild_conv1x1_wide_kernel
        o_blocks = cdiv(c, tile.block_o)
        grid = tiles.programs * o_blocks + splits * o_blocks**2 if wide else splits
        products = arithmetic(y_b, "tf32x3")
        states: tuple[KernelState, ...]
        results: tuple[KernelState, ...]
        if narrow:
            states = *strided_halves(y_a, y_b), *strided_halves(dy_a, dy_b)
            results = *strided_halves(*made.x), *strided_halves(*made.dx)
        else:
            assert made.whole is not None
            states = tuple(map(strided, (y_a, y_b, dy_a, dy_b)))
            results = tuple(map(strided, made.whole))
        launch(
            tile.kernel,
            (grid,),
            *(*states, strided(dnet), weight, weight_inverse, bias, *results),
            *(strided(stored), outer_sum, dbias, n, p, tiles.programs),
            *([splits] if wide else []),
            flops=3 * 2 * n * p * c**2,
            C=c,
            PRECISION=products["PRECISION"],
            **({"DTYPE": products["DTYPE"]} if wide else {}),
            **tile.blocks,
            COLUMNS=tiles.columns,
            num_warps=tile.warps,
            maxnreg=tile.registers,
            num_stages=1,
        )
    return made


def empty_state(half: Tensor, channels: int, channels_last: bool) -> Tensor:
    """An empty dense tensor with `channels` channels and the batch and pixels of `half`."""
    if not channels_last:
        return half.new_empty((half.shape[0], channels, *half.shape[2:]))
    last = half.new_empty((half.shape[0], *half.shape[2:], channels))
    return last.movedim(-1, 1)


@falls_back("rebuild_conv1x1")
def rebuild_conv1x1(
    y: Halves,
    dy: Halves,
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    channels_last: bool,
    separate_halves: bool,
    outer_sum: Tensor,
    dbias: Tensor,
) -> RebuiltConv1x1:
    """Run the second launch of a step's backward pass; on a CPU, its loop or its reference.

    Args:
        y: the halves (N, C_a, *spatial), (N, C_b, *spatial) of y = W x + bias.
        dy: the halves of its gradient.
        dnet: further gradient of the first half, or None.
        weight, bias: (C, C) and (C,), float32 (float64).
        weight_inverse: W^-1.
        net_dtype: dtype of the network input to cut from x, or None for none.
        channels_last: whether the results have this memory format. Pass the format of the states,
            which halves with few channels do not show. In another format, a network may compute
            other bits.
        separate_halves: whether the halves of x and dx may be separate tensors. A kernel that reads
            one half of a channels_last state with few channels fetches much of the other half too.
        outer_sum, dbias: receive the partial sums, (splits, C, C) and (splits, C), contiguous, with
            `rebuild_splits` splits.
    """
    given = y, dy, dnet, weight, weight_inverse, bias, net_dtype, channels_last
    if uses_triton(y[0]):
        return launch_rebuild_conv1x1(*given, separate_halves, outer_sum, dbias)
    if weight.shape[0] <= cpu.CONV1X1_MAX_CHANNELS and cpu.serves(y[1]):
        dx, sums = empty_state(y[1], weight.shape[0], channels_last), (outer_sum, dbias)
        x, net, _, _ = cpu.conv1x1_backward(
            y, dy, dnet, weight, dx, weight_inverse, bias, net_dtype, sums
        )
        assert x is not None
        return in_one_piece(x, dx, net if net_dtype is not None else None, outer_sum, dbias)
    made = rebuild_conv1x1_ref(*given)
    # A kernel that failed would have stored more sums.
    outer_sum.zero_()[:1] = made.outer_sum
    dbias.zero_()[:1] = made.dbias
    return made._replace(outer_sum=outer_sum, dbias=dbias)
