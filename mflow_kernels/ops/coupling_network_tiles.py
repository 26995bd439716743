"""Sizes of coupling networks, and the tiles and grids of their launches.

Tiles are chosen so that no launch spills on sm_80, sm_90 and sm_100. `benchmarks.reports.static`
compiles them, and `benchmarks.reports.efficiency` says how well they use a card. Hopper has tiles
of its own (`HOPPER`): its wgmma multiplies 64 rows for each of a launch's groups of four warps.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.compiler import triton
from mflow_kernels.ops.launch import HOPPER, architecture
from mflow_kernels.ops.partial_sums import multiprocessors


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
        """Sizes of the sums over pixels: d W1, d W2 (0 if no kernel computes it), d b1, d W3, d b2,
        d b3. The launch of d h1 computes the first three, that of d h2 the others."""
        w1, w2, w3 = map(math.prod, self.weights)
        return [w1, w2 if self.width <= DW2_WIDTH else 0, self.width, w3, self.width, self.c_out]

    def shaped(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [w.view(shape) for w, shape in zip(weights, self.weights, strict=True)]

    def layers(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights (out, taps, in) with the axes that torch's layers have."""
        if self.taps == 1:
            return [w[:, 0] for w in weights]
        sides = zip(weights, (3, 1, 3), strict=True)
        return [w.unflatten(1, (side, side)).permute(0, 3, 1, 2) for w, side in sides]


def block(n: int, most: int = 1024) -> int:
    """The block of at most `most` places for n numbers."""
    return min(most, max(16, triton.next_power_of_2(n)))


class Tile(NamedTuple):
    """Blocks of a launch: pixels, hidden channels of the result, hidden channels summed over,
    columns of taps; its warps; stages of its pipeline; and columns that one block of taps leaves
    over."""

    block_p: int
    block_d: int
    block_k: int
    block_j: int
    warps: int
    stages: int = 1
    block_r: int = 0


# Up to this width a program has room for its columns of d W2; for wider networks a matrix product
# computes it, which reads d h2 and h1 once more.
DW2_WIDTH = 128
SHARE = 2  # partial sums of one launch take at most 1 / SHARE of the bytes of a hidden tensor


HOPPER_FORWARD: dict[tuple[int, bool], Tile] = {}
HOPPER_DH2: dict[tuple[int, bool], Tile] = {}
HOPPER_DH1: dict[tuple[int, bool], Tile] = {}


def _kind(s: Shape) -> tuple[int, bool]:
    return 0, False


def forward_tile(s: Shape, arch: int) -> Tile:
    if arch == HOPPER and s.itemsize == 2 and (found := HOPPER_FORWARD.get(_kind(s))):
        return found
    # 256 columns of a network of vectors spill on sm_90.
    columns = block(s.tap_rows * s.c_out, 256 if s.taps > 1 else 128)
    if s.itemsize == 4:
        block_d = 128 if s.width <= 128 and columns <= 64 else 64
        return Tile(32 if columns <= 128 else 16, block(s.width, block_d), 32, columns, 8)
    if s.width <= 128:
        block_d = block(s.width)
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


def dh2_tile(s: Shape, arch: int) -> Tile:
    if arch == HOPPER and s.itemsize == 2 and (found := HOPPER_DH2.get(_kind(s))):
        return found
    block_j = block(s.taps * s.c_out)
    if s.itemsize == 4:
        block_d = 64 if block_j <= 128 else 32 if block_j <= 256 else 16
        return Tile(16, block(s.width, block_d), 0, block_j, 8)
    return Tile(
        32 if block_j <= 128 else 16, block(s.width, 64 if block_j <= 256 else 32), 0, block_j, 8
    )


def dh1_tile(s: Shape, arch: int) -> Tile:
    if arch == HOPPER and s.itemsize == 2 and (found := HOPPER_DH1.get(_kind(s))):
        return found
    block_k, block_x = block(s.width, DW2_WIDTH), block(s.taps * s.c_in)
    if s.itemsize == 4:
        block_d = 32 if block_x <= 128 else 16
        if s.width > DW2_WIDTH:
            block_d *= 2
        return Tile(16, block(s.width, block_d), block_k, 0, 8)
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
    return Tile(16, block(s.width, block_d), block_k, 0, 8)


def splits(s: Shape, tile: Tile, numbers: int, device: torch.device) -> int:
    """Programs that share the tiles of a backward launch, for each block of hidden channels.

    A launch has two programs for each multiprocessor. If each program stores partial sums of
    `numbers` numbers, these have at most half the bytes of one hidden tensor, and the launch may
    have one program for each multiprocessor.
    """
    blocks = triton.cdiv(s.width, tile.block_d)
    most = triton.cdiv(s.pixels, tile.block_p)
    if numbers:
        most = min(most, s.itemsize * s.pixels * s.width // (SHARE * 4 * numbers))
    card = multiprocessors(device)
    waves = 2 if most * blocks >= 2 * card else 1
    return max(1, min(most, waves * card // blocks))


def partial_sums(s: Shape, weights: bool, device: torch.device) -> tuple[int, int, int]:
    """The splits of the launches of d h1 and of d h2, and the numbers of all their partial sums.
    Without `weights` they store none."""
    arch = architecture(device)
    of1, of2 = (sum(s.sums[:3]), sum(s.sums[3:])) if weights else (0, 0)
    splits1 = splits(s, dh1_tile(s, arch), of1, device)
    splits2 = splits(s, dh2_tile(s, arch), of2, device)
    return splits1, splits2, splits1 * of1 + splits2 * of2
