"""The backward pass of a program whose forward pass stored few states and no activations.

It undoes the instructions from last to first, and rebuilds each state together with its gradient.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.layouts import is_channels_last
from mflow_kernels.ops.rebuild_conv1x1 import Halves
from mflow_kernels.reversible.graph import without_hooks
from mflow_kernels.reversible.instructions import Gradients, Instruction, Pair
from mflow_kernels.reversible.rerun import RerunCall, check_repeats


class Stored(NamedTuple):
    """A state that the forward pass stored, and the input of the module that it called next."""

    x: Tensor
    module_input: Tensor


def as_leaves(context: Sequence[Any]) -> list[Any]:
    """The context as leaves of a graph of its own. It may contain None."""
    leaves = []
    for c in context:
        leaves.append(c.detach().requires_grad_(c.requires_grad) if isinstance(c, Tensor) else c)
    return leaves


class BackwardPass:
    """The state between two instructions, its gradient, and the gradients found so far.

    Both are one tensor, or two halves of the channels in tensors of their own: couplings read and
    write halves.

    Attributes:
        context: further inputs of every network and layer, as leaves.
        autocast: arguments of the `torch.autocast` that was active in the forward pass.
        channels_last: whether states are in channels_last, which narrow halves do not show.
        dlogdet: (N,), the gradient of the log-determinant of each sample.
        joined: gradients of the latents that the instructions undone so far had joined.
        gradients: of parameters and context, by id.
    """

    dlogdet: Tensor

    def __init__(
        self, x: Tensor, dx: Tensor, context: Sequence[Tensor], autocast: dict[str, Any]
    ) -> None:
        self.autocast = autocast
        self.context = as_leaves(context)
        self.gradients: dict[int, Tensor] = {}
        self.joined: list[Tensor] = []
        self._differences: list[list[Tensor]] = []  # of each state that was compared
        self._sizes: list[Tensor] = []  # its largest number
        self.set(x, dx)

    def undo(
        self,
        instructions: Sequence[Instruction],
        folded: Sequence[Pair | None],
        calls: Sequence[RerunCall],
        stored: dict[int, Stored],
        latents: Sequence[tuple[Tensor, Tensor]],
        dlogdet: Tensor,
    ) -> list[Gradients | None]:
        """Undo these instructions; the state is then the one before them.

        Args:
            instructions: the last instructions that are not yet undone, in forward order.
            folded: the weights and biases of their linear maps.
            calls: the calls that they made, in forward order.
            stored: states before calls, by the ordinal of the call.
            latents: the latents that they split off, with their gradients.
            dlogdet: (N,).

        Returns:
            The gradients of these weights and biases.

        Raises:
            RuntimeError: a module did not repeat its first run.
        """
        # dlogdet is often one number that autograd expanded. Copy it once here, so that no launch
        # has to.
        self.dlogdet, self.joined = dlogdet.contiguous(), []
        self._calls, self._stored, self._latents = list(calls), stored, list(latents)
        pairs = list(zip(instructions, folded, strict=True))
        gradients = [instruction.undo(self, weights) for instruction, weights in reversed(pairs)]
        check_repeats(calls[::-1])
        return gradients[::-1]

    def next_call(self) -> tuple[RerunCall, Stored | None]:
        """The last call that is not yet undone, and the state before it if that was stored."""
        call = self._calls.pop()
        return call, self._stored.get(call.ordinal)

    def next_latent(self) -> tuple[Tensor, Tensor]:
        """The last latent that is not yet put back, and its gradient."""
        return self._latents.pop()

    def whole(self) -> Pair:
        """The state and its gradient, as one tensor each."""
        if isinstance(self._x, Tensor) and isinstance(self._dx, Tensor):
            return self._x, self._dx
        x, dx = torch.cat([*self._x], dim=1), torch.cat([*self._dx], dim=1)
        return x, dx

    def halves(self, first: int | None = None) -> tuple[Halves, Halves]:
        """The two halves of the state, and those of its gradient; the first half has this number of
        channels, by default half of them (rounded down)."""
        if isinstance(self._x, tuple) and isinstance(self._dx, tuple):
            a, b = self._x
            if a.shape[1] == ((a.shape[1] + b.shape[1]) // 2 if first is None else first):
                return self._x, self._dx
        x, dx = self.whole()
        first = x.shape[1] // 2 if first is None else first
        return (x[:, :first], x[:, first:]), (dx[:, :first], dx[:, first:])

    def set(self, x: Tensor, dx: Tensor) -> None:
        self.channels_last = is_channels_last(x)
        self._x: Tensor | Halves = x
        self._dx: Tensor | Halves = dx

    def set_halves(self, x: Halves, dx: Halves) -> None:
        self._x, self._dx = x, dx

    def differentiate(
        self,
        call: RerunCall,
        outputs: Sequence[Tensor],
        doutputs: Sequence[Tensor],
        module_input: Tensor,
    ) -> Tensor | None:
        """Differentiate a call that ran again.

        Returns:
            The gradient of its input. Those of parameters and context are added to `gradients`.
        """
        ys, dys, sources, hooked = [], [], [*call.sources], []
        for y, dy in zip(outputs, doutputs, strict=True):
            if y.requires_grad:
                ys.append(y)
                dys.append(dy)
        if not ys:
            return None
        for c in self.context:
            if c is not None and c.requires_grad:
                sources.append(c)
        for source in call.sources:
            if source._backward_hooks:
                hooked.append(source)
        call.check_sources(ys, [module_input, *sources])
        with (
            call.trained_as_in_forward(),
            without_hooks(hooked) if hooked else nullcontext(),
            call.differentiated(module_input.device) if call.drawn else nullcontext(),
        ):
            dx, *gradients = torch.autograd.grad(
                ys, [module_input, *sources], dys, allow_unused=True
            )
        for source, g in zip(sources, gradients, strict=True):
            if g is not None:
                total = self.gradients.get(id(source))
                self.gradients[id(source)] = g if total is None else total + g
        return dx

    def compare(self, rebuilt: Sequence[Tensor], true: Tensor) -> None:
        """Record the difference of a rebuilt state, given in parts of its channels, from the true
        one."""
        if not true.numel():
            return
        largest = partial(torch.linalg.vector_norm, ord=math.inf)
        parts = true.split([part.shape[1] for part in rebuilt], dim=1)
        self._sizes.append(largest(true))
        self._differences.append([largest(a - b) for a, b in zip(rebuilt, parts, strict=True)])

    @property
    def drift(self) -> Tensor | None:
        """The largest |rebuilt - true| of all states that were compared; it is divided by the
        largest number of the state if that is above 1."""
        if not self._differences:
            return None
        sizes = [s for s, parts in zip(self._sizes, self._differences, strict=True) for _ in parts]
        differences = [d for parts in self._differences for d in parts]
        return (torch.stack(differences) / torch.stack(sizes).clamp(min=1)).max()

    def network_dtype(self, x: Tensor) -> torch.dtype:
        """`autocast_dtype` of the state x in the forward pass."""
        casts = self.autocast["enabled"] and x.dtype != torch.float64
        return self.autocast["dtype"] if casts else x.dtype
