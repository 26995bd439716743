"""Launches of the kernels of `coupling_network`.

A loop that uses an operand of a product again has `num_stages=1`. With a pipeline, Triton would
overwrite the operand with the next tile too early. The forward launch has a pipeline only if Triton
sets no fence between a copy and the product that reads it (`FENCES_COPIES`).
"""

import torch
from torch import Tensor

from mflow_kernels.ops.channel_products import FENCES_COPIES
from mflow_kernels.ops.compiler import triton
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


def pack(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Pack the weights into one tensor of x's dtype, for `Shape.unpack`.

    This takes one launch if the weights of convolutions are in channels_last.
    """
    s = Shape.of(x, len(w1), len(w3))
    packed = x.new_empty(sum(w.numel() for w in (w1, w2, w3)))
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


def launch_network(
    x: Tensor, packed: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Two launches: params and, if `keep`, h1 and h2."""
    s = Shape.of(x, len(b1), len(b3))
    w1, w2, w3 = s.unpack(packed)
    row_sums = empty_images(x, s.tap_rows * s.c_out)
    h1, h2 = (empty_images(x, s.width) if keep else None for _ in range(2))
    tile = forward_tile(s, architecture(x.device))
    edge = halo(s, tile.block_p)
    tiles = triton.cdiv(s.pixels, tile.block_p - 2 * edge)
    columns = triton.cdiv(s.tap_rows * s.c_out - tile.block_r, tile.block_j)
    first, second, third = s.flops
    launch(
        _network_kernel,
        (tiles, columns),
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
        flops=columns * (triton.cdiv(s.width, tile.block_d) * first + second) + third,
        C_IN=s.c_in,
        WIDTH=s.width,
        C_OUT=s.c_out,
        TAPS=s.taps,
        HALO=edge,
        BLOCK_P=tile.block_p,
        BLOCK_X=block(s.taps * s.c_in),
        BLOCK_D=tile.block_d,
        BLOCK_K=tile.block_k,
        BLOCK_J=tile.block_j,
        BLOCK_R=tile.block_r,
        num_warps=tile.warps,
        num_stages=tile.stages if FENCES_COPIES else 1,
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
    block_c = block(channels, 64)
    block_p = 1024 // block_c
    launch(
        _sum_taps_kernel,
        (triton.cdiv(s.pixels, block_p), triton.cdiv(channels, block_c)),
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
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )
    return y


def launch_network_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches and, if `weights`, a reduction of their partial sums and a matrix product for
    wide networks; see `network_backward`."""
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    w1, w2, w3 = s.unpack(packed)
    arch = architecture(x.device)
    tile2, tile1 = dh2_tile(s, arch), dh1_tile(s, arch)
    blocks2, blocks1 = (triton.cdiv(s.width, tile.block_d) for tile in (tile2, tile1))
    tiles2, tiles1 = (triton.cdiv(s.pixels, tile.block_p) for tile in (tile2, tile1))
    numbers1, numbers2 = (sum(s.sums[:3]), sum(s.sums[3:])) if weights else (0, 0)
    splits1, splits2, size = partial_sums(s, weights, x.device)
    if weights:
        partials = x.new_empty(size, dtype=torch.float32)
        partial1, partial2 = partials.split([splits1 * numbers1, splits2 * numbers2])
        dw1, dw2, db1 = partial1.view(splits1, numbers1).split(s.sums[:3], dim=1)
        dw3, db2, db3 = partial2.view(splits2, numbers2).split(s.sums[3:], dim=1)
    else:
        dw1 = dw2 = dw3 = db1 = db2 = db3 = None
    dh2 = torch.empty_like(h2)
    stored = dx_taps(s, tile1)
    taps = empty_images(x, blocks1 * stored * s.c_in)
    images = s.pixels, s.height, s.image_width
    first, second, third = (2 * f if weights else f for f in s.flops)
    launch(
        _dh2_kernel,
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
        flops=third,
        WIDTH=s.width,
        C_OUT=s.c_out,
        TAPS=s.taps,
        BLOCK_P=tile2.block_p,
        BLOCK_D=tile2.block_d,
        BLOCK_J=tile2.block_j,
        num_warps=tile2.warps,
        num_stages=tile2.stages,
    )
    launch(
        _dh1_kernel,
        (splits1, blocks1),
        dh2,
        h1,
        x,
        w1,
        w2,
        taps,
        dw2 if s.sums[1] else None,
        dw1,
        db1,
        numbers1,
        *images,
        tiles1,
        flops=first + (second if s.sums[1] else s.flops[1]),
        C_IN=s.c_in,
        WIDTH=s.width,
        TAPS=s.taps,
        ROWS=stored,
        BLOCK_P=tile1.block_p,
        BLOCK_D=tile1.block_d,
        BLOCK_K=tile1.block_k,
        BLOCK_X=block(s.taps * s.c_in),
        BLOCK_R=block(stored * s.c_in),
        num_warps=tile1.warps,
        num_stages=tile1.stages,
    )
    dx = launch_sum_taps(taps, None, x, s, s.c_in, stored, -1, blocks1)
    nothing = x.new_empty(0, dtype=torch.float32)
    if not weights:
        return dx, nothing, nothing.clone()  # an operator's outputs must not share memory
    sums = x.new_empty(numbers1 + numbers2, dtype=torch.float32)
    block_n = 128
    launch(
        _sum_partials_kernel,
        (triton.cdiv(numbers1, block_n) + triton.cdiv(numbers2, block_n),),
        partials,
        sums,
        numbers1,
        numbers2,
        splits1,
        splits2,
        BLOCK=block_n,
    )
    return dx, sums, nothing if s.sums[1] else w2_gradient(dh2, h1)


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
