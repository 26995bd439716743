"""Layers that only change the order of a state's numbers. Their log-determinants are 0."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mflow_kernels.layers.bijection import Instructed
from mflow_kernels.ops.checks import check_choice
from mflow_kernels.reversible.rearrangements import PairPixels, Reorder, SpaceToDepth


class Squeeze(Instructed):
    """(N, C, H, W) -> (N, 4C, H/2, W/2): each 2x2 block of a channel becomes four channels.

    The order of the channels is that of `F.pixel_unshuffle`.
    """

    def instructions(self) -> list[SpaceToDepth]:
        return [SpaceToDepth()]


class Unsqueeze(Instructed):
    """(N, 4C, H, W) -> (N, C, 2H, 2W): the inverse of `Squeeze`."""

    def instructions(self) -> list[SpaceToDepth]:
        return [SpaceToDepth(inverted=True)]


class PixelPairs(Instructed):
    """(N, C, *spatial) -> (N, 2C, *spatial) with half as many pixels along the last axis.

    A coupling after it reads one set of pixels and changes the other: `PixelPairs(by)`, a coupling
    of 2C channels, `PixelPairs(by, inverted=True)` is a coupling whose halves are pixels.

    Args:
        by: "checkerboard", the squares of (N, C, H, W) with even and with odd row + column
            (RealNVP, arXiv 1605.08803, section 3.4); "halves", the first and the second half of
            the last axis, as of tokens (N, C, T); or "neighbours", the pixels with even and with
            odd index along the last axis, as Glow-TTS squeezes frames (arXiv 2005.11129).
        inverted: undo it: (N, 2C, *spatial) -> (N, C, *spatial).
    """

    def __init__(
        self, by: Literal["checkerboard", "halves", "neighbours"], inverted: bool = False
    ) -> None:
        super().__init__()
        check_choice("by", by, ("checkerboard", "halves", "neighbours"))
        self.by, self.inverted = by, inverted

    def instructions(self) -> list[PairPixels]:
        return [PairPixels(self.by, self.inverted)]


class Permutation(Instructed):
    """A fixed permutation: entry i along an axis of z is entry index[i] of x.

    Args:
        index: each of 0 to n - 1 once.
        axis: "channels", the C channels of (N, C, *spatial); or "pixels", its P pixels, in the
            order of `x.flatten(2)`.
    """

    index: Tensor

    def __init__(
        self, index: Sequence[int] | Tensor, axis: Literal["channels", "pixels"] = "channels"
    ) -> None:
        super().__init__()
        check_choice("axis", axis, ("channels", "pixels"))
        index = index if isinstance(index, Tensor) else torch.tensor(index, device="cpu")
        whole = not index.is_floating_point() and index.dtype != torch.bool
        if index.dim() != 1 or not whole or sorted(index.tolist()) != [*range(len(index))]:
            raise ValueError(
                f"index: expected each of 0 to n - 1 once, got a tensor of shape "
                f"{tuple(index.shape)} and dtype {str(index.dtype).removeprefix('torch.')}"
            )
        self.axis = axis
        self.channels = len(index) if axis == "channels" else None
        self.register_buffer("index", index.long())

    def instructions(self) -> list[Reorder]:
        return [Reorder(self.index, self.axis == "pixels")]
