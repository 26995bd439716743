"""Instructions that only change the order of a state's numbers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops.launch import on_gpu, transformed
from mflow_kernels.ops.layouts import is_channels_last, pixels
from mflow_kernels.reversible.instructions import Directed, Rearrange, Shape


class SpaceToDepth(Directed, Rearrange):
    """(N, C, H, W) -> (N, 4C, H/2, W/2), or back if `inverted`, in `F.pixel_unshuffle`'s channel
    order.

    It makes one copy. State and gradient keep their memory layout. `F.pixel_unshuffle` would keep
    channels_last on a CPU only, and return contiguous tensors on CUDA.
    """

    resizes = True

    def __init__(self, inverted: bool = False) -> None:
        self.inverted = inverted

    @property
    def halvings(self) -> int:  # type: ignore[override]
        return -1 if self.inverted else 1

    def shape(self, shape: Shape) -> Shape:
        """Raises ValueError: another number of axes, odd H or W, or (inverted) a number of
        channels that 4 does not divide."""
        if self.inverted:
            if len(shape) != 3 or shape[0] % 4:
                raise ValueError(
                    f"z: expected (N, 4C, H, W), got (N, {', '.join(map(str, shape))})"
                )
            return shape[0] // 4, 2 * shape[1], 2 * shape[2]
        if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
            got = ", ".join(map(str, shape))
            raise ValueError(f"x: expected (N, C, H, W) with even H and W, got (N, {got})")
        return 4 * shape[0], shape[1] // 2, shape[2] // 2

    def apply(self, x: Tensor) -> Tensor:
        shape = self.shape(tuple(x.shape[1:]))
        if not x.shape[0]:  # torch returns an empty batch unchanged
            return x.reshape(0, *shape)
        by_torch = F.pixel_shuffle if self.inverted else F.pixel_unshuffle
        if transformed() or not is_channels_last(x):
            return by_torch(x, 2)
        on_cpu = x.device.type == "cpu" and not on_gpu(x.device)
        if on_cpu and not torch.compiler.is_compiling():
            # torch's CPU kernel keeps channels_last and takes less time than the copy below.
            z = by_torch(x, 2)
            if is_channels_last(z):
                return z
        return _SqueezeChannelsLast.apply(x, self.inverted)


class _SqueezeChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inverted: bool) -> Tensor:
        ctx.inverted = inverted
        rows = x.permute(0, 2, 3, 1)
        n, h, w, c = rows.shape
        if inverted:
            blocks = rows.reshape(n, h, w, c // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
            shape = (n, c // 4, 2 * h, 2 * w)
        else:
            blocks = rows.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4)
            shape = (n, 4 * c, h // 2, w // 2)
        last = torch.channels_last
        z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
        z.permute(0, 2, 3, 1).view(blocks.shape).copy_(blocks)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        return SpaceToDepth(not ctx.inverted).apply(dz), None


class Reorder(Rearrange):
    """A fixed permutation: entry i along an axis of the result is entry index[i] of the state.

    Args:
        index: (C,) or (P,), integers.
        by_pixel: whether it permutes the P pixels instead of the C channels.
    """

    def __init__(self, index: Tensor, by_pixel: bool = False) -> None:
        self.index = index
        self.by_pixel = self.moves_pixels = by_pixel

    def inverse(self) -> "Reorder":
        return Reorder(self.index.argsort(), self.by_pixel)

    def apply(self, x: Tensor) -> Tensor:
        expected, actual = len(self.index), pixels(x) if self.by_pixel else x.shape[1]
        if actual != expected:
            what = "pixels" if self.by_pixel else "channels"
            raise ValueError(f"x: expected {expected} {what}, got {tuple(x.shape)}")
        if not self.by_pixel:
            return select_channels(x, self.index)
        last = is_channels_last(x) and not transformed()
        rows, axis = (x.movedim(1, -1).flatten(1, -2), 1) if last else (x.flatten(2), 2)
        rows = rows.index_select(axis, self.index)
        return rows.movedim(-1, 1).view_as(x) if last else rows.view_as(x)


def select_channels(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index] in the layout of x, and its gradient in that layout too.

    `index_select` along the channels would return contiguous tensors.
    """
    if transformed() or not is_channels_last(x):
        return x.index_select(1, index)
    return x.movedim(1, -1).index_select(-1, index).movedim(-1, 1)


class PairPixels(Directed, Rearrange):
    """(N, C, ...) -> (N, 2C, ...) with half of the pixels: a coupling's two halves of the channels
    are then two sets of pixels. Or back, if `inverted`.

    Args:
        by: "checkerboard" moves the pixels (i, j) with odd i + j of (N, C, H, W) into channels
            (the result is (N, 2C, H, W/2)); "neighbours" those with odd index along the last axis;
            "halves" the second half of the last axis.
    """

    resizes = True

    def __init__(self, by: str, inverted: bool = False) -> None:
        self.by, self.inverted = by, inverted
        self.moves_pixels = by == "halves"

    def shape(self, shape: Shape) -> Shape:
        c, *sizes = shape
        got = f"(N, {', '.join(map(str, shape))})"
        if self.by == "checkerboard" and len(sizes) != 2:
            raise ValueError(f"x: expected (N, C, H, W), got {got}")
        if not sizes or (c % 2 if self.inverted else sizes[-1] % 2):
            expected = "even C" if self.inverted else "an even last axis"
            raise ValueError(f"x: expected (N, C, *spatial) with {expected}, got {got}")
        if self.inverted:
            return c // 2, *sizes[:-1], 2 * sizes[-1]
        return 2 * c, *sizes[:-1], sizes[-1] // 2

    def apply(self, x: Tensor) -> Tensor:
        self.shape(tuple(x.shape[1:]))  # raises an error
        last = is_channels_last(x) and not transformed()  # the result keeps the layout
        rows = x.movedim(1, -1) if last else x
        end = rows.dim() - 1
        channel, pixel = (end, end - 1) if last else (1, end)
        neighbours, checkered = self.by != "halves", self.by == "checkerboard"
        pair = pixel + 1 if neighbours else pixel  # its axis, next to that of the pairs
        if self.inverted:
            z = rows.unflatten(channel, (2, -1)).movedim(channel, pair).flatten(pixel, pixel + 1)
            z = _checkered(z, pixel) if checkered else z
        else:
            rows = _checkered(rows, pixel) if checkered else rows
            pairs = rows.unflatten(pixel, (-1, 2) if neighbours else (2, -1))
            z = pairs.movedim(pair, channel).flatten(channel, channel + 1)
        return z.movedim(-1, 1) if last else z


def _checkered(x: Tensor, axis: int) -> Tensor:
    """Swap the neighbours 2j and 2j + 1 along this axis in odd rows, those of the axis before."""
    flat = x.flatten(axis - 1, axis)
    index = torch.arange(flat.shape[axis - 1], device=x.device)
    return flat.index_select(axis - 1, index ^ (index // x.shape[axis] % 2)).view(x.shape)
