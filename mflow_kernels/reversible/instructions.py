"""Instructions: the invertible operations that a program is made of.

An instruction is one class. It says how it runs, how the backward pass undoes it, which
instruction inverts it, and which shape it leaves. `reversible.steps` has the instruction that
fuses affine couplings with 1x1 convolutions; the others are here.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.registration import eager_function

BackwardPass = Any  # of `reversible.backward`, which imports this module
Shape = tuple[int, ...]  # of a state without N: (C, *spatial)


Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None]  # None if nobody asks for one


class Call(NamedTuple):
    """A call of a user's module, which a reversible backward pass makes a second time."""

    module: nn.Module
    function: Callable[..., Any]  # the module itself, or one of its methods


class FoldedWeights(NamedTuple):
    """The linear maps of K steps, each folded into one 1x1 convolution."""

    weight: Tensor  # (K, C, C)
    bias: Tensor  # (K, C)
    log_det: Tensor  # (), sum over the steps of log |det weight|, for one pixel


@dataclass
class ForwardPass:
    """The state of a program while it runs, and its results.

    Attributes:
        x: the state (N, C, *spatial).
        waiting: the latents that `Join` appends, taken from the end.
        context: further inputs of every network and layer.
        latents: the latents that were split off, in order.
        ledger: terms of the log-determinant of each sample, each (N, T).
    """

    x: Tensor
    waiting: list[Tensor]
    context: Sequence[Tensor]
    latents: list[Tensor] = field(default_factory=list)
    ledger: list[Tensor] = field(default_factory=list)

    def call(self, call: Call, x: Tensor, module_input: Tensor) -> Any:
        """Call a module with this input and the context; x is the state before it."""
        return call.function(module_input, *self.context)


class Directed:
    """An operation that runs in one of two directions.

    Attributes:
        inverted: whether it is the inverse of what its class describes.
    """

    inverted = False

    def inverse(self) -> Self:
        """The same operation in the other direction."""
        other = copy.copy(self)
        other.inverted = not self.inverted
        return other


class Instruction:
    """One invertible operation of a program.

    Attributes:
        place: the layer that it came from, named in errors, such as "layers.3".
        joins, splits: the number of latents that it appends to the state and splits off it.
        resizes: whether it changes the number of pixels. A level begins at such an instruction.
        halvings: how many times it halves the height and width of images.
        computes: whether it has a network, a layer or a linear map.
        moves_pixels: whether it moves pixels to where the mask of a batch does not follow.
    """

    place = ""
    joins = splits = halvings = 0
    resizes = computes = moves_pixels = False

    @property
    def calls(self) -> Sequence[Call]:
        """The modules that it calls, in order."""
        return ()

    def fold(self, dtype: torch.dtype, *, check: bool = False) -> FoldedWeights | None:
        """The linear maps that it applies, computed once for each run of the program.

        Raises:
            ValueError: with `check`, if an inverse is needed and does not exist.
        """
        return None

    def pixels(self, forward: ForwardPass) -> int | Tensor:
        """The number of pixels to which it applies its linear maps, or that of each sample (N,)."""
        return pixels(forward.x)

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        """Replace `forward.x` by the next state, and record latents and log-determinants."""
        raise NotImplementedError

    def undo(self, backward: BackwardPass, folded: Pair | None) -> Gradients | None:
        """Replace the state of the backward pass, and its gradient, by those before it.

        Args:
            folded: the weight and bias of `fold`. `requires_grad` says whose gradient is needed.

        Returns:
            The gradients of that weight and bias; None for one that is not needed.
        """
        raise NotImplementedError

    def inverse(self) -> "Instruction":
        """The instruction that undoes this one."""
        raise NotImplementedError

    def shape(self, shape: Shape) -> Shape:
        """The shape after it of a state of this shape, without N."""
        return shape

    def latent_shape(self, shape: Shape) -> Shape:
        """The shape, without N, of the latent that it splits off a state of this shape."""
        raise NotImplementedError

    def fused(self, following: "Instruction") -> "Instruction | None":
        """One instruction that does this and the following one in fewer launches, if any does."""
        return None

    def at(self, place: str) -> "Instruction":
        """Name the layer that it came from."""
        self.place = place
        return self


class Layer(Directed, Instruction):
    """Any invertible layer. Its own `inverse` rebuilds its input in the backward pass, and autograd
    differentiates the layer on the rebuilt input.

    Args:
        module: z, logdet = module(x, *context) and x, logdet = module.inverse(z, *context), where
            the logdet is (N,), or one number for all samples. If it changes the shape of a state,
            `module.output_shape(shape)` says how.
        inverted: whether the instruction is the layer's inverse.
    """

    computes = True

    def __init__(self, module: nn.Module, inverted: bool = False) -> None:
        self.module, self.inverted = module, inverted

    @property
    def calls(self) -> Sequence[Call]:
        return (self._call(self.inverted),)

    def _call(self, inverted: bool) -> Call:
        module: Any = self.module
        return Call(module, module.inverse if inverted else module)

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        x = forward.x
        forward.x, logdet = self.checked(x, forward.call(self.calls[0], x, x))
        forward.ledger.append(logdet[:, None])

    def checked(self, x: Tensor, result: Any) -> tuple[Tensor, Tensor]:
        """The layer's result for the state x, with one log-determinant for each sample."""
        name = f"{self.place or 'layer'} ({type(self.module).__name__})"
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{name}: expected (z, logdet), got {type(result).__name__}")
        z, logdet = result
        if not isinstance(z, Tensor) or len(z) != len(x):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"{name}: expected a state of {len(x)} samples, got {got}")
        if not isinstance(logdet, Tensor) or logdet.shape not in ((), (1,), (len(x),)):
            got = tuple(logdet.shape) if isinstance(logdet, Tensor) else type(logdet).__name__
            raise TypeError(f"{name}: expected a logdet of shape ({len(x)},), got {got}")
        return z, logdet.to(accumulator(z.dtype)).expand(x.shape[0])

    def undo(self, backward: BackwardPass, folded: Pair | None) -> None:
        again, stored = backward.next_call()
        (z, dz), context = backward.whole(), backward.context
        rebuild = self._call(not self.inverted).function
        with torch.no_grad(), torch.autocast(**backward.autocast), again.as_in_forward():
            x = rebuild(z, *(c.detach() for c in context))[0]
        if stored is not None:
            backward.compare([x], stored[0])
            x = stored[0]
        x = x.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**backward.autocast):
            outputs = self.checked(x, again.run_again(x, context))
        dlogdet = backward.dlogdet.to(outputs[1].dtype)
        dx = backward.differentiate(again, outputs, (dz, dlogdet), x)
        backward.set(x.detach(), torch.zeros_like(x) if dx is None else dx)

    def shape(self, shape: Shape) -> Shape:
        output_shape = getattr(self.module, "output_shape", None)
        if output_shape is None:
            return shape
        if self.inverted:
            raise ValueError(f"{self.place}: the shape of an inverse is not known")
        return tuple(output_shape(shape))


class Rearrange(Instruction):
    """A fixed order of a state's numbers. Subclasses say how, in `apply` and `inverse`."""

    def apply(self, x: Tensor) -> Tensor:
        """The state x (N, C, *spatial) in its new order."""
        raise NotImplementedError

    def inverse(self) -> "Rearrange":
        raise NotImplementedError

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        forward.x = self.apply(forward.x)

    def undo(self, backward: BackwardPass, folded: Pair | None) -> None:
        back = self.inverse()
        x, dx = backward.whole()
        backward.set(back.apply(x), back.apply(dx))


class SplitOff(Instruction):
    """Remove channels from the end of the state; they become a latent.

    Args:
        kept: the number of channels that stay; None for half of them (rounded down).
    """

    splits = 1

    def __init__(self, kept: int | None = None) -> None:
        self.kept = kept

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        eager = torch.is_grad_enabled() and not (transformed() or torch.compiler.is_compiling())
        split = _split_off_eager if eager else _split_off
        forward.x, latent = split(forward.x, self._kept(forward.x.shape[1]))
        forward.latents.append(latent)

    def _kept(self, channels: int) -> int:
        kept = channels // 2 if self.kept is None else self.kept
        if not 0 < kept < channels:
            raise ValueError(f"x: expected more than {kept} channels, got {channels}")
        return kept

    def undo(self, backward: BackwardPass, folded: Pair | None) -> None:
        latent, dlatent = backward.next_latent()
        x, dx = backward.whole()
        backward.set_halves((x, latent), (dx, dlatent))

    def inverse(self) -> "Join":
        return Join(self.kept)

    def shape(self, shape: Shape) -> Shape:
        return self._kept(shape[0]), *shape[1:]

    def latent_shape(self, shape: Shape) -> Shape:
        return shape[0] - self._kept(shape[0]), *shape[1:]


class Join(Instruction):
    """Append the next latent to the state as its last channels: the inverse of `SplitOff`."""

    joins = 1

    def __init__(self, kept: int | None = None) -> None:
        self.kept = kept

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        forward.x = torch.cat([forward.x, forward.waiting.pop()], dim=1)

    def undo(self, backward: BackwardPass, folded: Pair | None) -> None:
        (a, _), (da, db) = backward.halves(self.kept)
        backward.joined.append(db)
        backward.set(a, da)

    def inverse(self) -> SplitOff:
        return SplitOff(self.kept)


def _split_off(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """A view of the first channels, and a copy of the others."""
    return x[:, :kept], x[:, kept:].clone()


# Autograd's own gradient of a slice is a contiguous state that is zero outside the slice. This
# function keeps the layout of the state.


def _setup_split(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.like = torch.empty_like(inputs[0], device="meta")


def _split_off_backward(ctx: Any, dfirst: Tensor, dlatent: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.empty_like(ctx.like, device=dfirst.device)
    dx[:, : dfirst.shape[1]] = dfirst
    dx[:, dfirst.shape[1] :] = dlatent
    return dx, None


_split_off_eager = eager_function(_split_off, _setup_split, _split_off_backward)
