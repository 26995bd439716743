"""Masks of padded batches: which frames (pixels) of each sample are valid.

A mask is (N, 1, *spatial), 1 at valid frames and 0 at padding. It is the first context of a masked
program. Between instructions, states and their gradients are zero at padding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.checks import STATE_DTYPES, check_device, check_tensor
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.precision import accumulator


def with_mask(x: Tensor, context: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
    """x with zeros at padding, and the context with its mask in x's dtype.

    Raises:
        TypeError, ValueError: the first context is not a mask for x. The values of a mask are only
            read on a CPU, where that does not wait for a device.
    """
    if not context:
        raise TypeError("mask: expected a tensor (N, 1, *spatial) after the state, got none")
    mask = check_tensor("mask", context[0], (torch.bool, *STATE_DTYPES))
    sides = tuple(x.shape[2:])
    fits = mask.dim() == x.dim() > 2 and mask.shape[:2] == (len(x), 1)
    if not fits or any(a % b and b % a for a, b in zip(mask.shape[2:], sides, strict=True)):
        raise ValueError(
            f"mask: expected shape {(len(x), 1, *sides)} for a state {tuple(x.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    check_device("mask", mask, x)
    if _readable(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask: expected only 0 and 1, got other values")
    mask = mask.to(x.dtype)
    return zero_padding(x, mask), (mask, *context[1:])


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros at padding, whatever is there, also if it is not finite."""
    return torch.where(mask_at(mask, x) > 0, x, 0.0)


def mask_at(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of the frames of x, (N, 1, *spatial), in x's dtype.

    If x has fewer frames, as after `PixelPairs`, each stands for neighbouring frames of the mask.

    Raises:
        ValueError: neighbours that became one frame of x are valid and padding.
    """
    for axis, side in enumerate(x.shape[2:], start=2):
        own = mask.shape[axis]
        if own > side:
            blocks = mask.unflatten(axis, (side, -1))
            mask = blocks.amin(axis + 1)
            if _readable(mask) and not torch.equal(mask, blocks.amax(axis + 1)):
                raise ValueError(
                    f"mask: expected blocks of {own // side} frames that are all valid or all "
                    "padding, because the layers join them to one"
                )
        elif own < side:
            mask = mask.repeat_interleave(side // own, axis)
    return mask.to(x.dtype)


def frames(mask: Tensor, x: Tensor) -> Tensor:
    """The number of valid frames of each sample of x, (N,)."""
    return mask_at(mask, x).to(accumulator(x.dtype)).flatten(1).sum(1)


def _readable(mask: Tensor) -> bool:
    return mask.device.type == "cpu" and not (transformed() or torch.compiler.is_compiling())
