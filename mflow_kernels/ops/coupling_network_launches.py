"""Tiles and launches of the kernels of `coupling_network`.

Tiles are chosen so that none spills on sm_80, sm_90 and sm_100. `benchmarks.reports.static`
compiles them.

A loop that uses an operand of a product again has `num_stages=1`. With a pipeline, Triton would
overwrite the operand with the next tile too early. The forward launch has it only if Triton sets no
fence between a copy and the product that reads it (`FENCES_COPIES`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.channel_products import FENCES_COPIES
from mflow_kernels.ops.compiler import triton
from mflow_kernels.ops.coupling_network_kernels import (
    _dh1_kernel,
    _dh2_kernel,
    _network_kernel,
    _sum_taps_kernel,
)
from mflow_kernels.ops.launch import launch
from mflow_kernels.ops.partial_sums import summing_programs


class Shape(NamedTuple):
    """Sizes of a network and of the images that it works on."""

    pixels: int  # of all samples
    height: int
    image_width: int
    c_in: int
    c_out: int
    width: int  # hidden channels
    taps: int  # 9 for a 3x3 convolution, 1 for a linear layer
    itemsize: int  # bytes of a number

    @classmethod
    def of(cls, x: Tensor, width: int, c_out: int) -> "Shape":
        height, image_width = x.shape[2:] if x.dim() == 4 else (1, 1)
        pixels = x.shape[0] * height * image_width
        taps = 9 if x.dim() == 4 else 1
        return cls(pixels, height, image_width, x.shape[1], c_out, width, taps, x.element_size())

    @property
    def tap_rows(self) -> int:
        """Rows of taps of a convolution."""
        return 3 if self.taps == 9 else 1

    @property
    def weights(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes of the weights as the kernels read them: (out, taps, in)."""
        return (
            (self.width, self.taps, self.c_in),
            (self.width, 1, self.width),
            (self.c_out, self.taps, self.width),
        )

    @property
    def packed(self) -> int:
        """Numbers of all weights."""
        return sum(map(math.prod, self.weights))

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The weights W1, W2 and W3, (out, taps, in), as views of one tensor."""
        return self.shaped(packed.split([math.prod(shape) for shape in self.weights]))

    @property
    def sums(self) -> list[int]:
        """Sizes of the sums over pixels: d W1, d W2 (0 if no kernel computes it), d W3, d b1, d b2,
        d b3."""
        w1, w2, w3 = map(math.prod, self.weights)
        return [w1, w2 if self.width <= DW2_WIDTH else 0, w3, self.width, self.width, self.c_out]

    def shaped(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [w.view(shape) for w, shape in zip(weights, self.weights, strict=True)]

    def layers(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights (out, taps, in) with the axes that torch's layers have."""
        if self.taps == 1:
            return [w[:, 0] for w in weights]
        sides = zip(weights, (3, 1, 3), strict=True)
        return [w.unflatten(1, (side, side)).permute(0, 3, 1, 2) for w, side in sides]


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


def _block(n: int, most: int = 1024) -> int:
    return min(most, max(16, triton.next_power_of_2(n)))


class Tile(NamedTuple):
    """Blocks of a launch: pixels, hidden channels of the result, hidden channels summed over,
    columns of taps; and its warps."""

    block_p: int
    block_d: int
    block_k: int
    block_j: int
    warps: int


# Up to this width a program has room for its columns of d W2; for wider networks a matrix product
# computes it, which reads d h2 and h1 once more.
DW2_WIDTH = 128


def forward_tile(s: Shape) -> Tile:
    # 256 columns of a network of vectors spill on sm_90.
    columns = _block(s.tap_rows * s.c_out, 256 if s.taps > 1 else 128)
    if s.itemsize == 4:
        block_d = 128 if s.width <= 128 and columns <= 64 else 64
        return Tile(32 if columns <= 128 else 16, _block(s.width, block_d), 32, columns, 8)
    if s.width <= 128:
        block_d = _block(s.width)
        if columns > 64:
            return Tile(32 if columns > 128 else 64, block_d, 32, columns, 8)
        if columns > 32:  # 8 warps spill on sm_100
            return Tile(64, block_d, 32, columns, 4)
        return Tile(64, block_d, 64, columns, 8)
    if columns > 128:
        return Tile(32, 64, 32, columns, 8)
    if columns > 64:  # on sm_90, images spill with blocks of 32, and vectors with blocks of 64
        return Tile(32, 128, 64 if s.taps > 1 else 32, columns, 8)
    return Tile(64, 256, 64, columns, 8) if s.width <= 256 else Tile(64, 128, 32, columns, 8)


def halo(s: Shape, block_p: int) -> int:
    """Number of pixels at each end of a forward tile that belong to the neighbouring tiles.

    It is 0 if tiles consist of whole rows of the image.
    """
    return int(s.taps > 1 and block_p % s.image_width > 0)


def dh2_tile(s: Shape) -> Tile:
    block_j = _block(s.taps * s.c_out)
    if s.itemsize == 4:
        block_d = 64 if block_j <= 128 else 32 if block_j <= 256 else 16
        return Tile(16, _block(s.width, block_d), 0, block_j, 8)
    return Tile(
        32 if block_j <= 128 else 16, _block(s.width, 64 if block_j <= 256 else 32), 0, block_j, 8
    )


def dh1_tile(s: Shape) -> Tile:
    block_k, block_x = _block(s.width, DW2_WIDTH), _block(s.taps * s.c_in)
    if s.itemsize == 4:
        block_d = 32 if block_x <= 128 else 16
        if s.width > DW2_WIDTH:
            block_d *= 2
        return Tile(16, _block(s.width, block_d), block_k, 0, 8)
    if s.width > DW2_WIDTH:
        # Addresses of rows that start at an odd multiple of 4 bytes take more registers.
        fits_128 = block_x <= 64 or (block_x <= 128 and s.c_in % 4 == 0)
        return Tile(32, 128 if fits_128 else 64, block_k, 0, 8)
    # Addresses of rows that start at a multiple of 16 bytes take fewer registers.
    fits_64 = block_x <= 128 or s.c_in % 8 == 0
    fits_32 = block_k != 64  # with 64, and these addresses, 32 hidden channels spill on sm_100
    block_d = 128 if block_x <= 64 else 64 if fits_64 else 32 if fits_32 else 16
    if block_x == 16:  # 128 hidden channels spill
        block_d = 64
    return Tile(16, _block(s.width, block_d), block_k, 0, 8)


def launch_network(
    x: Tensor, packed: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Two launches: params and, if `keep`, h1 and h2."""
    s = Shape.of(x, len(b1), len(b3))
    w1, w2, w3 = s.unpack(packed)
    row_sums = empty_images(x, s.tap_rows * s.c_out)
    h1, h2 = (empty_images(x, s.width) if keep else None for _ in range(2))
    tile = forward_tile(s)
    edge = halo(s, tile.block_p)
    tiles = triton.cdiv(s.pixels, tile.block_p - 2 * edge)
    launch(
        _network_kernel,
        (tiles, triton.cdiv(s.tap_rows * s.c_out, tile.block_j)),
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
        C_IN=s.c_in,
        WIDTH=s.width,
        C_OUT=s.c_out,
        TAPS=s.taps,
        HALO=edge,
        BLOCK_P=tile.block_p,
        BLOCK_X=_block(s.taps * s.c_in),
        BLOCK_D=tile.block_d,
        BLOCK_K=tile.block_k,
        BLOCK_J=tile.block_j,
        num_warps=tile.warps,
        num_stages=3 if FENCES_COPIES else 1,
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
    block_c = _block(channels, 64)
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
    numbers = sum(s.sums)
    tile2, tile1 = dh2_tile(s), dh1_tile(s)
    blocks2, blocks1 = (triton.cdiv(s.width, tile.block_d) for tile in (tile2, tile1))
    tiles2, tiles1 = (triton.cdiv(s.pixels, tile.block_p) for tile in (tile2, tile1))
    splits = min(tiles2, tiles1, summing_programs(x.device) // min(blocks2, blocks1))
    if weights:
        # Partial sums take at most a quarter of the bytes of one hidden tensor.
        splits = max(1, min(splits, h1.nbytes // (4 * 4 * numbers)))
        partial = x.new_empty((splits, numbers), dtype=torch.float32)
        dw1, dw2, dw3, db1, db2, db3 = partial.split(s.sums, dim=1)
    else:
        dw1 = dw2 = dw3 = db1 = db2 = db3 = None
    dh2 = torch.empty_like(h2)
    dx_taps = empty_images(x, blocks1 * s.taps * s.c_in)
    images = s.pixels, s.height, s.image_width
    launch(
        _dh2_kernel,
        (splits, blocks2),
        dparams,
        h2,
        w3,
        dh2,
        dw3,
        db3,
        db2,
        numbers,
        *images,
        tiles2,
        WIDTH=s.width,
        C_OUT=s.c_out,
        TAPS=s.taps,
        BLOCK_P=tile2.block_p,
        BLOCK_D=tile2.block_d,
        BLOCK_J=tile2.block_j,
        num_warps=tile2.warps,
        num_stages=1,
    )
    launch(
        _dh1_kernel,
        (splits, blocks1),
        dh2,
        h1,
        x,
        w1,
        w2,
        dx_taps,
        dw2 if s.sums[1] else None,
        dw1,
        db1,
        numbers,
        *images,
        tiles1,
        C_IN=s.c_in,
        WIDTH=s.width,
        TAPS=s.taps,
        BLOCK_P=tile1.block_p,
        BLOCK_D=tile1.block_d,
        BLOCK_K=tile1.block_k,
        BLOCK_X=_block(s.taps * s.c_in),
        num_warps=tile1.warps,
        num_stages=1,
    )
    dx = launch_sum_taps(dx_taps, None, x, s, s.c_in, s.taps, -1, blocks1)
    nothing = x.new_empty(0, dtype=torch.float32)
    if not weights:
        return dx, nothing, nothing.clone()  # an operator's outputs must not share memory
    return dx, partial.sum(0), nothing if s.sums[1] else w2_gradient(dh2, h1)


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
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
