"""Launches of the kernels of `coupling_network`.

A loop that uses an operand of a product again has `num_stages=1`. With a pipeline, Triton would
overwrite the operand with the next tile too early. The forward launch has a pipeline only if Triton
sets no fence between a copy and the product that reads it (`FENCES_COPIES`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.channel_products import FENCES_COPIES
from mflow_kernels.ops.compiler import GLUON, cdiv
from mflow_kernels.ops.coupling_network_kernels import (
    _dh1_kernel,
    _dh2_kernel,
    _network_kernel,
    _sum_partials_kernel,
    _sum_taps_kernel,
)
from mflow_kernels.ops.coupling_network_tiles import (
    Shape,
    block,
    dh1_tile,
    dh2_tile,
    dx_taps,
    forward_tile,
    halo,
    partial_sums,
)
from mflow_kernels.ops.launch import architecture, launch, on_gpu

if GLUON:
    from mflow_kernels.ops.coupling_network_hopper import _hopper_network_kernel
    from mflow_kernels.ops.coupling_network_hopper_backward import (
        _hopper_dh1_kernel,
        _hopper_dh2_kernel,
    )


def pack(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Pack the weights into one tensor of x's dtype, for `Shape.unpack`.

    This takes one launch if the weights of convolutions are in channels_last.
    """
    s = Shape.of(x, w1.shape[0], w3.shape[0])
    packed = x.new_empty(s.packed)
    torch._foreach_copy_(s.layers(s.unpack(packed)), [w1, w2, w3])
    return packed


def empty_images(x: Tensor, channels: int) -> Tensor:
    """An empty tensor in channels_last, shaped like x except for the number of channels."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def rows(x: Tensor) -> Tensor:
    """Dense images as (pixels, channels)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


# Constants of launches, derived from a network's sizes. They are cached: a step of flow makes
# seven of these launches and the GPU may wait for the host.
Constants = dict[str, Any]


@cache
def _forward_grid(s: Shape, arch: int, pipelined: bool) -> tuple[Any, tuple[int, int], Constants]:
    """The kernel, its grid and its constants."""
    tile = forward_tile(s, arch)
    edge = halo(s, tile.block_p)
    tiles = cdiv(s.pixels, tile.block_p - 2 * edge)
    columns = cdiv(s.tap_rows * s.c_out - tile.block_r, tile.block_j)
    first, second, third = s.flops
    constants = dict(
        C_IN=s.c_in,
        WIDTH=s.width,
        C_OUT=s.c_out,
        BLOCK_P=tile.block_p,
        BLOCK_X=block(s.taps * s.c_in),
        BLOCK_D=tile.block_d,
        BLOCK_K=tile.block_k,
        BLOCK_J=tile.block_j,
        BLOCK_R=tile.block_r,
        num_warps=tile.warps,
    )
    if tile.gluon:
        constants |= dict(flops=first + second + third, STAGES=tile.stages)
        return _hopper_network_kernel, (tiles, columns), constants
    constants |= dict(
        flops=columns * (cdiv(s.width, tile.block_d) * first + second) + third,
        TAPS=s.taps,
        HALO=edge,
        num_stages=tile.stages if pipelined else 1,
    )
    return _network_kernel, (tiles, columns), constants


@cache
def _sum_taps_grid(pixels: int, channels: int) -> tuple[tuple[int, int], Constants]:
    block_c = block(channels, 64)
    block_p = 1024 // block_c
    grid = cdiv(pixels, block_p), cdiv(channels, block_c)
    return grid, dict(BLOCK_P=block_p, BLOCK_C=block_c)


@cache
def _dh2_grid(s: Shape, arch: int, weights: bool) -> tuple[Any, int, int, Constants]:
    """The kernel, blocks of hidden channels, tiles of pixels, and the kernel's constants."""
    tile = dh2_tile(s, arch)
    constants = dict(
        flops=(1 + weights) * s.flops[2],
        WIDTH=s.width,
        C_OUT=s.c_out,
        BLOCK_P=tile.block_p,
        BLOCK_D=tile.block_d,
        BLOCK_J=tile.block_j,
        num_warps=tile.warps,
    )
    kernel = _dh2_kernel
    if tile.gluon:
        kernel = _hopper_dh2_kernel
        constants |= dict(BLOCK_R=tile.block_r)
    else:
        constants |= dict(TAPS=s.taps, num_stages=tile.stages)
    return kernel, cdiv(s.width, tile.block_d), cdiv(s.pixels, tile.block_p), constants


@cache
def _dh1_grid(s: Shape, arch: int, weights: bool) -> tuple[Any, int, int, int, Constants]:
    """The kernel, blocks of hidden channels, tiles of pixels, taps of d x that it stores, and its
    constants."""
    tile = dh1_tile(s, arch)
    stored = dx_taps(s, tile)
    first, second, _ = s.flops
    constants = dict(
        flops=(1 + weights) * first + (1 + (weights and s.sums[1] > 0)) * second,
        C_IN=s.c_in,
        WIDTH=s.width,
        BLOCK_P=tile.block_p,
        BLOCK_D=tile.block_d,
        BLOCK_K=tile.block_k,
        BLOCK_X=block(s.taps * s.c_in),
        num_warps=tile.warps,
    )
    kernel = _dh1_kernel
    if tile.gluon:
        kernel = _hopper_dh1_kernel
        constants |= dict(BLOCK_J=tile.block_j, BLOCK_R=tile.block_r, STAGES=tile.stages)
    else:
        constants |= dict(
            TAPS=s.taps,
            ROWS=stored,
            HELD=tile.held,
            BLOCK_R=block(stored * s.c_in),
            num_stages=tile.stages,
        )
    return kernel, cdiv(s.width, tile.block_d), cdiv(s.pixels, tile.block_p), stored, constants


def launch_network(
    x: Tensor, packed: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Two launches: params and, if `keep`, h1 and h2."""
    s = Shape.of(x, b1.shape[0], b3.shape[0])
    w1, w2, w3 = s.unpack(packed)
    row_sums = empty_images(x, s.tap_rows * s.c_out)
    h1 = empty_images(x, s.width) if keep else None
    h2 = empty_images(x, s.width) if keep else None
    kernel, grid, constants = _forward_grid(s, architecture(x.device), FENCES_COPIES)
    launch(
        kernel,
        grid,
        x,
        w1,
        b1,
        w2,
        b2,
        w3,
        row_sums,
        h1,
        h2,
        s.pixels,
        s.height,
        s.image_width,
        **constants,
    )
    return launch_sum_taps(row_sums, b3, x, s, s.c_out, s.tap_rows, 1, 1), h1, h2


def launch_sum_taps(
    taps: Tensor,
    bias: Tensor | None,
    x: Tensor,
    s: Shape,
    channels: int,
    count: int,
    sign: int,
    parts: int,
) -> Tensor:
    """One launch: the sum of each pixel's taps, (N, channels, *spatial).

    `taps` holds `parts` groups of `count` taps at each pixel. `sign` is that of `neighbour`.
    """
    y = empty_images(x, channels)
    grid, constants = _sum_taps_grid(s.pixels, channels)
    launch(
        _sum_taps_kernel,
        grid,
        taps,
        bias,
        y,
        s.pixels,
        s.height,
        s.image_width,
        C=channels,
        TAPS=count,
        SIGN=sign,
        PARTS=parts,
        **constants,
    )
    return y


def launch_network_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches and, if `weights`, a reduction of their partial sums and a matrix product for
    wide networks; see `network_backward`."""
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    w1, w2, w3 = s.unpack(packed)
    kernel2, blocks2, tiles2, constants2 = _dh2_grid(s, architecture(x.device), weights)
    kernel1, blocks1, tiles1, stored, constants1 = _dh1_grid(s, architecture(x.device), weights)
    sums = s.sums
    numbers1, numbers2 = (sum(sums[:3]), sum(sums[3:])) if weights else (0, 0)
    splits1, splits2, size = partial_sums(s, weights, x.device)
    of1: Sequence[Tensor | None] = (None,) * 3
    of2 = of1
    if weights:
        partials = x.new_empty(size, dtype=torch.float32)
        split: Any = torch.split_with_sizes  # half the host's time of `Tensor.split`
        partial1, partial2 = split(partials, [splits1 * numbers1, splits2 * numbers2])
        of1 = split(partial1.view(splits1, numbers1), sums[:3], 1)
        of2 = split(partial2.view(splits2, numbers2), sums[3:], 1)
    (dw1, dw2, db1), (dw3, db2, db3) = of1, of2
    dh2 = torch.empty_like(h2)
    taps = empty_images(x, blocks1 * stored * s.c_in)
    images = s.pixels, s.height, s.image_width
    launch(
        kernel2,
        (splits2, blocks2),
        dparams,
        h2,
        w3,
        dh2,
        dw3,
        db3,
        db2,
        numbers2,
        *images,
        tiles2,
        **constants2,
    )
    launch(
        kernel1,
        (splits1, blocks1),
        dh2,
        h1,
        x,
        w1,
        w2,
        taps,
        dw2 if sums[1] else None,
        dw1,
        db1,
        numbers1,
        *images,
        tiles1,
        **constants1,
    )
    dx = launch_sum_taps(taps, None, x, s, s.c_in, stored, -1, blocks1)
    nothing = x.new_empty(0, dtype=torch.float32)
    if not weights:
        return dx, nothing, nothing.clone()  # an operator's outputs must not share memory
    added = x.new_empty(numbers1 + numbers2, dtype=torch.float32)
    block_n = 128
    launch(
        _sum_partials_kernel,
        (cdiv(numbers1, block_n) + cdiv(numbers2, block_n),),
        partials,
        added,
        numbers1,
        numbers2,
        splits1,
        splits2,
        BLOCK=block_n,
    )
    return dx, added, nothing if sums[1] else w2_gradient(dh2, h1)


def w2_gradient(dh2: Tensor, h1: Tensor) -> Tensor:
    """d W2 (width, width) in float32, as one product over all pixels.

    For float32 images cuDNN computes it, because its setting says whether convolutions use TF32.
    """
    if dh2.dtype == torch.float32 and dh2.dim() == 4:
        w2 = h1.new_empty(h1.shape[1], h1.shape[1], 1, 1)
        _, dw2, _ = torch.ops.aten.convolution_backward(
            dh2, h1, w2, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
        )
        return dw2[:, :, 0, 0]
    return product_in_float32(rows(dh2).t(), rows(h1))


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b, with a result in float32 that is not rounded to the dtype of 16-bit factors."""
    if a.dtype != torch.float32 and on_gpu(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
