"""Linear maps as parts of steps of flow, and the gradients of their weights.

The steps that hold them share launches (`steps.py`). These classes fold the maps of all steps, and
undo one after the other in the backward pass.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mflow_kernels.ops.conv1x1 import invert
from mflow_kernels.ops.precision import without_autocast
from mflow_kernels.ops.rebuild_conv1x1 import (
    Halves,
    RebuiltConv1x1,
    rebuild_conv1x1,
    rebuild_splits,
)
from mflow_kernels.reversible.instructions import BackwardPass, FoldedWeights, Gradients

Map = TypeVar("Map", bound="LinearMap")


class LinearMap:
    """x -> W x + bias at each pixel, in the direction data -> latent.

    Attributes:
        dense: whether `fold` gives matrices (K, C, C), which the launches multiply with the state.
            If not, it gives vectors (K, C), and `run` and `undo` apply them.
    """

    dense = True

    @classmethod
    def fold(
        cls: type[Map],
        maps: Sequence[Map],
        places: Sequence[str],
        dtype: torch.dtype,
        *,
        inverted: bool,
        check: bool,
    ) -> FoldedWeights:
        """Compute the weights of maps of one width, or of their inverses, in one batch.

        Args:
            places: the layers that they came from, for errors.

        Raises:
            ValueError: with `check`, if an inverse is needed and does not exist.
        """
        raise NotImplementedError

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor, inverted: bool, net_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """The next state, and the network input of this dtype cut from it. Only if not `dense`.

        Args:
            weight, bias: (C,), from `fold`.
        """
        raise NotImplementedError

    def undo(
        self, y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, inverted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The state before `run`, its gradient, and those of weight and bias if they are needed."""
        raise NotImplementedError


PARTIALS_BYTES = 2**26  # most bytes of partial outer sums that wait for one reduction


class WeightGradients:
    """Undoes the linear maps of some steps, and computes the gradients of their weights.

    The launches store partial sums, from which dW = outer_sum W^-T and d bias follow for all steps
    at once.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, inverted: bool, backward: BackwardPass
    ) -> None:
        self.weight, self.bias, self.backward = weight, bias, backward
        self.inverse = invert(self.weight.double())[0]
        # LAPACK and cuSOLVER return contiguous columns, and the kernels read rows.
        self.rounded_inverse = self.inverse.to(self.weight.dtype).contiguous()
        rows = range(len(self.weight))
        self.remaining = list(reversed(rows) if inverted else rows)  # undone from the last one
        self.partials: tuple[Tensor, Tensor] | None = None
        self.waiting: list[int] = []  # the steps whose partial sums are in `partials`
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def undo_linear(
        self, linear: LinearMap, y: Halves, dy: Halves, dnet: Tensor | None, couple_next: bool
    ) -> RebuiltConv1x1:
        """Undo the last linear map that is not undone; see `rebuild_conv1x1`."""
        splits = rebuild_splits(y[1], self.weight.shape[-1])
        outer_sum, dbias = self._partial_sums(splits)
        row = self.waiting[-1]
        dtype = self.backward.network_dtype(y[1]) if couple_next else None
        return rebuild_conv1x1(
            y,
            dy,
            dnet,
            self.weight[row],
            self.rounded_inverse[row],
            self.bias[row],
            dtype,
            self.backward.channels_last,
            couple_next,
            outer_sum,
            dbias,
        )

    def _partial_sums(self, splits: int) -> tuple[Tensor, Tensor]:
        """Buffers for a step's partial outer sums (splits, C, C) and d bias (splits, C).

        The steps share one buffer of at most `PARTIALS_BYTES`, which one launch reduces.
        """
        if self.partials is not None and len(self.waiting) == len(self.partials[0]):
            self._reduce()
        if self.partials is None:
            c = self.weight.shape[-1]
            fit = PARTIALS_BYTES // (splits * c * c * self.weight.element_size())
            steps = max(1, min(len(self.remaining), fit))
            self.partials = (
                self.weight.new_empty((steps, splits, c, c)),
                self.weight.new_empty((steps, splits, c)),
            )
        self.waiting.append(self.remaining.pop())
        at = len(self.waiting) - 1
        return self.partials[0][at], self.partials[1][at]

    def _reduce(self) -> None:
        if self.partials is not None:
            outer_sums, dbiases = (part[: len(self.waiting)].sum(1) for part in self.partials)
            self.sums.update({r: (outer_sums[i], dbiases[i]) for i, r in enumerate(self.waiting)})
            self.partials, self.waiting = None, []

    def gradients(self) -> Gradients:
        """d weight (K, C, C) and d bias (K, C)."""
        self._reduce()
        if not (self.weight.requires_grad or self.bias.requires_grad):
            return None, None
        sums = [self.sums[row] for row in range(len(self.weight))]
        outer_sum, dbias = (torch.stack(part) for part in zip(*sums, strict=True))
        with without_autocast(outer_sum):
            return (outer_sum.double() @ self.inverse.mT).to(outer_sum.dtype), dbias


class VectorGradients:
    """As `WeightGradients`, for linear maps that are not dense."""

    def __init__(
        self, weight: Tensor, bias: Tensor, inverted: bool, backward: BackwardPass
    ) -> None:
        self.weight, self.bias, self.inverted, self.backward = weight, bias, inverted, backward
        rows = range(len(weight))
        self.remaining = list(reversed(rows) if inverted else rows)  # undone from the last one
        self.found: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def undo_linear(
        self, linear: LinearMap, y: Halves, dy: Halves, dnet: Tensor | None, couple_next: bool
    ) -> RebuiltConv1x1:
        row = self.remaining.pop()
        da = dy[0] if dnet is None else dy[0] + dnet
        whole = torch.cat([*y], dim=1), torch.cat([da, dy[1]], dim=1)
        needed = self.weight.requires_grad or self.bias.requires_grad
        weight, bias = (t[row].detach().requires_grad_(needed) for t in (self.weight, self.bias))
        x, dx, *gradients = linear.undo(*whole, weight, bias, self.inverted)
        self.found[row] = gradients[0], gradients[1]
        c_a = y[0].shape[1]
        x_halves, dx_halves = ((t[:, :c_a], t[:, c_a:]) for t in (x, dx))
        return RebuiltConv1x1(x_halves, dx_halves, (x, dx), None, x[:0], x[:0])

    def gradients(self) -> Gradients:
        """d weight (K, C) and d bias (K, C)."""
        if not (self.weight.requires_grad or self.bias.requires_grad):
            return None, None
        rows = [self.found[row] for row in range(len(self.weight))]
        dweight, dbias = (torch.stack(part) for part in zip(*rows, strict=True))
        return dweight, dbias
