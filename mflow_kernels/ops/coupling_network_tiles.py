"""Sizes of coupling networks, and the tiles and grids of their launches.

Tiles are chosen so that no launch of the presets' networks spills. `benchmarks.reports.static`
compiles them, and `benchmarks.reports.efficiency` says how well they use a card. Hopper has tiles
of its own (`HOPPER_TILES`): its wgmma multiplies 64 rows for each of a launch's groups of four
warps. GeForce cards have smaller ones where others spill (`geforce`).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.compiler import GLUON, cdiv, next_power_of_2
from mflow_kernels.ops.launch import HOPPER, architecture, geforce
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
        n, c, *sides = x.shape
        height, image_width = sides or (1, 1)
        taps, size = (9 if sides else 1), x.element_size()
        return cls(n * height * image_width, height, image_width, c, c_out, width, taps, size)

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
        return sum(_parts(self)[0])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The weights W1, W2 and W3, (out, taps, in), as views of one tensor."""
        sizes, shapes = _parts(self)
        parts = torch.split_with_sizes(packed, sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @property
    def flops(self) -> list[int]:
        """Operations of the product with each weight."""
        return [2 * self.pixels * math.prod(shape) for shape in self.weights]

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
        return [w.view(w.shape[0], side, side, -1).permute(0, 3, 1, 2) for w, side in sides]


@cache  # a step of flow unpacks weights five times, and the GPU may wait for the host
def _parts(s: Shape) -> tuple[list[int], tuple[tuple[int, int, int], ...]]:
    """The numbers of each weight, and their shapes."""
    return [math.prod(shape) for shape in s.weights], s.weights


def block(n: int, most: int = 1024) -> int:
    """The block of at most `most` places for n numbers."""
    return min(most, max(16, next_power_of_2(n)))


class Tile(NamedTuple):
    """Blocks of a launch: pixels, hidden channels of the result, hidden channels summed over,
    columns of taps; its warps; and stages of its pipeline.

    `block_r` has columns of taps too. In the forward launch these are the columns that `block_j`
    leaves over. The launch of d h1 adds the three taps of each row of W1 if it is not 0. If `held`,
    it keeps its weights in shared memory for all tiles of a program. If `gluon`, the launch is one
    of `coupling_network_hopper`, in which `block_j` and `block_r` share the columns of d h1 too.
    """

    block_p: int
    block_d: int
    block_k: int
    block_j: int
    warps: int
    stages: int = 1
    block_r: int = 0
    held: bool = False
    gluon: bool = False


# Up to this width a program has room for its columns of d W2; for wider networks a matrix product
# computes it, which reads d h2 and h1 once more.
DW2_WIDTH = 128
FEWEST_PIXELS = 1024  # of a program that stores partial sums


class Tiles(NamedTuple):
    """The tiles of a network's launches: forward, d h2 and d h1."""

    forward: Tile
    dh2: Tile
    dh1: Tile


# Hopper's tiles for 16-bit networks of images, by C_out (and C_in = C_out / 2: the first three
# levels of a Glow on RGB images) and whether d h1 also computes d W2. All products have 64 rows for
# each four warps, or warps that share columns, and run by wgmma. Other networks, whose blocks are
# padded or masked otherwise and need other registers, have the tiles of the functions below.
HOPPER_TILES = {
    (12, True): Tiles(
        Tile(128, 128, 32, 32, 8, 3, 8),
        Tile(128, 64, 0, 128, 8),
        Tile(128, 64, 128, 0, 8, 1, 32, held=True),
    ),
    (12, False): Tiles(
        Tile(128, 128, 32, 32, 8, 3, 8),
        Tile(128, 64, 0, 128, 8),
        Tile(128, 128, 64, 0, 8, held=True),
    ),
    (24, True): Tiles(
        Tile(128, 128, 16, 64, 8, 3, 8),
        Tile(64, 64, 0, 256, 8),
        Tile(128, 64, 128, 0, 8, 1, 64, held=True),
    ),
    (24, False): Tiles(
        Tile(128, 128, 16, 64, 8, 3, 8), Tile(64, 64, 0, 256, 8), Tile(64, 128, 64, 0, 8, 1, 64)
    ),
    # Here 64 pixels for 8 warps, which repeat products, are still the least time: with 128 pixels,
    # or 4 warps, launches spill. d W2 leaves no room for 64 pixels beside 256 columns of taps.
    (48, True): Tiles(
        Tile(64, 128, 32, 128, 8, 2, 16),
        Tile(64, 32, 0, 512, 8),
        Tile(32, 32, 128, 0, 8, 1, 128, held=True),
    ),
    (48, False): Tiles(
        Tile(64, 64, 32, 128, 8, 3, 16), Tile(64, 32, 0, 512, 8), Tile(64, 64, 64, 0, 8, 1, 128)
    ),
}

# Tiles of the kernels in Gluon, likewise. With 128 hidden channels, which are one block, plain
# Triton computes h1 once too if a level has few columns of taps; with 384, eight bytes would spill.
GLUON_WIDTHS = (128, 256, 512)
GLUON_TILES = {
    (12, False): HOPPER_TILES[12, False]._replace(
        forward=Tile(128, 128, 32, 32, 8, 3, 8, gluon=True),
        dh2=Tile(128, 64, 0, 32, 8, 1, 16, gluon=True),
    ),
    (24, False): Tiles(
        Tile(128, 128, 32, 64, 8, 3, 8, gluon=True),
        Tile(128, 64, 0, 64, 8, 1, 16, gluon=True),
        Tile(64, 128, 32, 32, 8, 4, 16, gluon=True),
    ),
    (48, True): HOPPER_TILES[48, True]._replace(
        forward=Tile(128, 64, 64, 128, 8, 3, 16, gluon=True),
        dh1=Tile(128, 32, 64, 64, 8, 2, 16, gluon=True),
    ),
    (48, False): Tiles(
        Tile(128, 64, 64, 128, 8, 3, 16, gluon=True),
        Tile(64, 64, 0, 128, 8, 1, 16, gluon=True),
        Tile(64, 64, 64, 64, 8, 3, 16, gluon=True),
    ),
}


def hopper_tiles(s: Shape, arch: int) -> Tiles | None:
    """Hopper's tiles for a network, if it has them. Those in Gluon consist of whole rows."""
    known = arch == HOPPER and s.itemsize == 2 and s.taps == 9
    if not known or s.c_out != 2 * s.c_in or s.width % 128:
        return None
    key = s.c_out, s.width <= DW2_WIDTH
    found = GLUON_TILES.get(key) if GLUON and s.width in GLUON_WIDTHS else None
    if found and not any(tile.gluon and halo(s, tile.block_p) for tile in found):
        return found
    return HOPPER_TILES.get(key)


def forward_tile(s: Shape, arch: int) -> Tile:
    if found := hopper_tiles(s, arch):
        return found.forward
    # 256 columns of a network of vectors spill on sm_90.
    columns = block(s.tap_rows * s.c_out, 256 if s.taps > 1 else 128)
    if s.itemsize == 4:
        block_d = 128 if s.width <= 128 and columns <= 64 else 64
        return Tile(32 if columns <= 128 else 16, block(s.width, block_d), 32, columns, 8, 3)
    if s.width <= 128:
        block_d = block(s.width)
        if columns > 64:
            return Tile(32 if columns > 128 else 64, block_d, 32, columns, 8, 3)
        if columns > 32:  # 8 warps spill on sm_100
            return Tile(64, block_d, 32, columns, 4, 3)
        return Tile(64, block_d, 64, columns, 8, 3)
    if columns > 128:
        return Tile(32, 64, 32, columns, 8, 3)
    if columns > 64:  # on sm_90, images spill with blocks of 32, and vectors with blocks of 64
        return Tile(32, 128, 64 if s.taps > 1 else 32, columns, 8, 3)
    if s.width <= 256:
        return Tile(64, 256, 64, columns, 8, 3)
    return Tile(32 if geforce(arch) else 64, 128, 32, columns, 8, 3)


def halo(s: Shape, block_p: int) -> int:
    """Number of pixels at each end of a forward tile that belong to the neighbouring tiles.

    It is 0 if tiles consist of whole rows of the image.
    """
    return int(s.taps > 1 and block_p % s.image_width > 0)


def dx_taps(s: Shape, tile: Tile) -> int:
    """Taps of d x that the launch of d h1 stores at each pixel, in each block of channels: all, or
    their sums over rows, which need tiles of whole rows of the image."""
    return s.tap_rows if tile.block_r and not halo(s, tile.block_p) else s.taps


def dh2_tile(s: Shape, arch: int) -> Tile:
    if found := hopper_tiles(s, arch):
        return found.dh2
    block_j = block(s.taps * s.c_out)
    if s.itemsize == 4:
        block_d = 64 if block_j <= 128 else 32 if block_j <= 256 else 16
        return Tile(16, block(s.width, block_d), 0, block_j, 8)
    block_d = 64 if block_j <= (128 if geforce(arch) else 256) else 32
    return Tile(32 if block_j <= 128 else 16, block(s.width, block_d), 0, block_j, 8)


def dh1_tile(s: Shape, arch: int) -> Tile:
    if found := hopper_tiles(s, arch):
        # The columns of W2 that a program holds take 128 KB at width 512.
        return found.dh1._replace(held=found.dh1.held and s.width <= 512)
    block_k, block_x = block(s.width, DW2_WIDTH), block(s.taps * s.c_in)
    if s.itemsize == 4:
        block_d = 32 if block_x <= 128 else 16
        if s.width > DW2_WIDTH:
            block_d *= 2
        return Tile(16, block(s.width, block_d), block_k, 0, 8)
    if s.width > DW2_WIDTH:
        # Addresses of rows that start at an odd multiple of 4 bytes take more registers.
        aligned = s.c_in % 4 == 0 and not geforce(arch)
        fits_128 = block_x <= 64 or (block_x <= 128 and aligned)
        return Tile(32, 128 if fits_128 else 64, block_k, 0, 8)
    # Addresses of rows that start at a multiple of 16 bytes take fewer registers.
    fits_64 = block_x <= 128 or (s.c_in % 8 == 0 and not geforce(arch))
    fits_32 = block_k != 64  # with 64, and these addresses, 32 hidden channels spill on sm_100
    block_d = 128 if block_x <= 64 else 64 if fits_64 else 32 if fits_32 else 16
    if block_x == 16:  # 128 hidden channels spill
        block_d = 32 if geforce(arch) else 64
    return Tile(16, block(s.width, block_d), block_k, 0, 8)


def splits(s: Shape, tile: Tile, numbers: int, card: int) -> int:
    """Programs that share the tiles of a backward launch, for each block of hidden channels, on a
    card of this number of multiprocessors.

    A launch without partial sums has two programs for each multiprocessor. If each program stores
    partial sums of `numbers` numbers, the launch has one for each multiprocessor, because more
    would only write more sums: a program's registers leave no room for a second one. Each then has
    at least `FEWEST_PIXELS`, and all sums have at most the bytes of a hidden tensor.
    """
    blocks = cdiv(s.width, tile.block_d)
    tiles = cdiv(s.pixels, tile.block_p)
    if not numbers:
        return max(1, min(tiles, 2 * card // blocks))
    most = s.itemsize * s.pixels * s.width // (4 * numbers)
    return max(1, min(s.pixels // FEWEST_PIXELS, card // blocks, most))


def partial_sums(s: Shape, weights: bool, device: torch.device) -> tuple[int, int, int]:
    """The splits of the launches of d h1 and of d h2, and the numbers of all their partial sums.
    Without `weights` they store none."""
    return _partial_sums(s, weights, architecture(device), multiprocessors(device))


@cache
def _partial_sums(s: Shape, weights: bool, arch: int, card: int) -> tuple[int, int, int]:
    of1, of2 = (sum(s.sums[:3]), sum(s.sums[3:])) if weights else (0, 0)
    splits1 = splits(s, dh1_tile(s, arch), of1, card)
    splits2 = splits(s, dh2_tile(s, arch), of2, card)
    return splits1, splits2, splits1 * of1 + splits2 * of2
