"""Partial sums of weight gradients: how many a launch computes, and where it stores them.

A launch that sums over pixels gives each of its programs a partial sum of its own, and a reduction
adds them in a fixed order. All K steps of a group share one buffer (K, splits, C, C), so that one
reduction adds the sums of all steps without copying them first.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.launch import card_of, transformed

MULTIPROCESSORS = 132  # of an H100; where no GPU can be asked


@torch.compiler.assume_constant_result  # Dynamo does not trace properties of devices
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU. On other devices, kernels run in a machine that
    stands for a GPU, and the number is `MULTIPROCESSORS`."""
    device = card_of(device)
    return _multiprocessors(device) if device.type == "cuda" else MULTIPROCESSORS


@cache  # torch asks the driver again at each call
def _multiprocessors(device: torch.device) -> int:
    if not torch.cuda.is_available():  # a fake tensor's device
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def summing_programs(device: torch.device) -> int:
    """Programs of a launch that sums over pixels: two for each multiprocessor."""
    return 2 * multiprocessors(device)


def count_partial_sums(columns: int, c: int, most: int) -> int:
    """Number of partial sums of a C x C product over `columns` columns of C values.

    It is at most `most`, and the sums together have no more values than the state.
    """
    return max(1, min(most, columns // c))


class _Buffer:
    """The partial sums of K steps, while one backward pass computes them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.clear()

    def clear(self) -> None:
        self.whole: Tensor | None = None
        self.rows: dict[int, Tensor] = {}

    def row(self, step: int, weight: Tensor) -> Tensor:
        """Room for the gradient of a step's weight (splits, C, C).

        A weight that is used twice has two gradients, and autograd adds them, so the second one
        gets memory of its own.
        """
        if step in self.rows:
            return torch.empty_like(weight, memory_format=torch.contiguous_format)
        if self.whole is None:
            self.whole = weight.new_empty((self.steps, *weight.shape))
        self.rows[step] = self.whole[step]
        return self.rows[step]


class _Unbind(torch.autograd.Function):
    """`Tensor.unbind` of weights (K, splits, C, C), without a copy of their gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.partial_sums = _Buffer(len(weight))
        return weight.unbind()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        buffer = ctx.partial_sums
        rows, whole = buffer.rows, buffer.whole
        buffer.clear()
        if whole is None:  # no launch computed them
            like = next(g for g in gradients if g is not None)
            whole = like.new_empty((len(gradients), *like.shape))
        for step, gradient in enumerate(gradients):
            if gradient is None:
                whole[step].zero_()
            elif gradient is not rows.get(step):
                whole[step].copy_(gradient)
        return whole


def unbind_weights(weight: Tensor) -> tuple[Tensor, ...]:
    """The K weights (splits, C, C) of a group (K, splits, C, C).

    The backward launches that use them store their partial sums in one buffer.
    """
    if torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled():
        return weight.unbind()
    return _Unbind.apply(weight)


def empty_partial_sums(weight: Tensor) -> Tensor:
    """An empty tensor for the partial sums of dW that a launch with this weight stores."""
    # Autograd restores the node that made a saved tensor, and the tensor's place in its results.
    buffer = getattr(weight.grad_fn, "partial_sums", None)
    if isinstance(buffer, _Buffer):
        return buffer.row(weight.output_nr, weight)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)
