"""Chains of flow layers that rebuild their states in the backward pass.

The forward pass stores the output of the chain and every k-th state. The backward pass rebuilds
the others, each from the one after it, and runs each network again. It needs two launches a step,
plus the networks' own. Inverse weights are computed in float64. Networks run again under the same
autocast and with the same random numbers, and update running statistics only once.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.layers.actnorm import warn_if_not_initialized
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.coupling import check_latent
from mflow_kernels.layers.flow import Flow
from mflow_kernels.layers.networks import CouplingNetwork, check_takes
from mflow_kernels.ops.checks import check_channels, check_count
from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.reversible.apply import Result, apply_reversibly, apply_stored
from mflow_kernels.reversible.instructions import Call, Instruction, Layer
from mflow_kernels.reversible.masks import with_mask, zero_padding
from mflow_kernels.reversible.program import Program


class ReversibleChain(Flow):
    """Flow layers in sequence. Training stores few of their states, and no activations of networks.

    `z, logdet = chain(x)`. With splits, z is the tuple of latents, finest first, followed by the
    last state. `chain.log_prob(x)` is the density of x if the latents are standard normal.

    K steps of flow need K + 1 launches forward and 2 K backward, plus the networks' own. The input
    of any other layer is rebuilt by its `inverse`; autograd then differentiates a second call.

    Args:
        layers: any `Bijection`, and any module with `z, logdet = layer(x, *context)` and
            `x, logdet = layer.inverse(z, *context)`, as those of normflows and nflows. A context
            reaches all layers.
        reversible: rebuild the states in the backward pass. If False, autograd stores them, which
            allows `torch.compile` of the whole chain, and `torch.func.functional_call`.
            (Reversible mode fails there, because the parameters that `functional_call` passes no
            longer exist in the backward pass.)
            Transforms of `torch.func` always store them. Choose False if memory does not matter,
            because rebuilding states takes time, in small flows the largest share. A training step
            of a flow on two-dimensional points took 21.7 ms with True and 13.5 ms with False on a
            CPU (docs/memory.md).
        checkpoint_every: store the state before every k-th network or layer, and rebuild only the
            states in between, so that the rounding of at most k inversions adds up. None stores no
            state. Memory then stays flat, but gradients drift during training from those with
            stored states (see docs/memory.md). The networks' activations are never stored.
        input_shape: shape of x without N, which determines `latent_shapes`. `sample` and a
            `ManifoldFlow` around the chain need it.
        masked: whether calls take a mask after the state, as for sequences of several lengths:
            `z, logdet = chain(x, mask, *context)`, and the same for `inverse` and `initialize`. The
            mask (N, 1, *spatial), bool or floating point, is 1 at valid frames and 0 at padding.
            States are zero at padding, whatever x is there; log-determinants and the statistics of
            actnorms count valid frames only. Layers and networks get the mask, in the dtype of the
            state, as first context (docs/howto/sequences.md).

    Raises:
        TypeError, ValueError: naming the argument, if the input of a layer does not fit the output
            of the layer before it. A call checks its input before any kernel runs: the state (see
            `AffineCoupling`), whether the `Squeeze` layers can halve its sides, and the latents.
        RuntimeError: in the first call under gradients, if a layer or network depends on tensors
            for which a reversible backward pass has no gradient (docs/memory.md).

    Attributes:
        drift: the largest |rebuilt - true| of the chain's input and of all stored states, over all
            backward passes, a scalar tensor. The difference is divided by the largest number of the
            state if that is above 1. Reset it to None before a step to read the drift of that step
            alone.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        reversible: bool = True,
        checkpoint_every: int | None = 8,
        input_shape: Sequence[int] | None = None,
        masked: bool = False,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers: expected at least one, got none")
        for i, layer in enumerate(layers):
            if not isinstance(layer, nn.Module) or not callable(getattr(layer, "inverse", None)):
                raise TypeError(
                    f"layers[{i}]: expected a Bijection or another module with an `inverse`, "
                    f"got {type(layer).__name__}"
                )
        if checkpoint_every is not None:
            check_count("checkpoint_every", checkpoint_every, 1)
        self.layers = nn.ModuleList(layers)
        self._set_masked(masked)
        self.channels = _input_channels(self.layers)
        self.reversible = reversible
        self.checkpoint_every = checkpoint_every
        self.drift: Tensor | None = None
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.latent_shapes = None
        if self.input_shape is not None:
            for size in self.input_shape:
                check_count("input_shape", size, 1)
            program = self._program()
            _check_input_shape(self.input_shape, self.channels, program)
            self.latent_shapes = program.latent_shapes(self.input_shape)

    def _set_masked(self, masked: bool) -> None:
        self.masked = masked
        for i, layer in enumerate(self.layers):
            for module in layer.modules():
                if not isinstance(module, (Bijection, CouplingNetwork)):
                    continue
                if masked:
                    module.masked = True
                elif module.masked:
                    raise ValueError(f"layers[{i}]: it is masked, so the chain needs masked=True")
            if masked and any(one.moves_pixels for one in instructions_of(layer, "")):
                raise ValueError(
                    f"layers[{i}]: expected a layer that keeps the order of frames, got "
                    f"{type(layer).__name__}: a mask does not follow"
                )

    def instructions(self) -> list[Instruction]:
        return [
            instruction
            for i, layer in enumerate(self.layers)
            for instruction in instructions_of(layer, f"layers.{i}")
        ]

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._program().latent_shapes(shape)[-1]

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        program = self._program()
        x = self._checked_data(x, program)
        if self.masked:
            x, context = with_mask(x, context)
        warn_if_not_initialized(self)
        found = self._run(program, x, (), context)
        z = (*found.latents, found.x) if found.latents else found.x
        return z, found.logdet

    def inverse(self, z: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        program = self._program()
        x, latents = self._checked_latents(z, program)
        if self.masked:
            x, context = with_mask(x, context)
            latents = tuple(zero_padding(latent, context[0]) for latent in latents)
        found = self._run(program.inverted(), x, latents, context)
        return found.x, found.logdet

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        self._checked_data(x, self._program())
        if self.masked:
            x, context = with_mask(x, context)
        with torch.no_grad():
            state: Any = x
            for layer in self.layers:
                call: Any = layer.initialize if isinstance(layer, Bijection) else layer
                state, _ = call(state, *context)
                if isinstance(state, tuple):  # a chain returns its latents before its last state
                    state = state[-1] if isinstance(layer, ReversibleChain) else state[0]
        return self(x, *context)

    def _run(
        self, program: Program, x: Tensor, latents: tuple[Tensor, ...], context: tuple[Tensor, ...]
    ) -> Result:
        if not self.reversible:
            return apply_stored(program, x, latents, context)
        every = self.checkpoint_every
        return apply_reversibly(program, x, latents, context, every, self.record_drift)

    def record_drift(self, drift: Tensor) -> None:
        # One graph may contain the chain several times, in both directions.
        self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)

    def _program(self) -> Program:
        return Program(self.instructions())

    def _checked_data(self, value: object, program: Program) -> Tensor:
        """Return `value` as the input of `forward` after checking it."""
        x = flow_state("x", value)
        if self.input_shape is not None and tuple(x.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: expected shape (N, {expected}), got {tuple(x.shape)}")
        factor = _side_factor(program)
        if factor > 1 and (x.dim() != 4 or any(side % factor for side in x.shape[2:])):
            raise ValueError(
                f"x: expected shape (N, C, H, W) with H and W divisible by {factor}, "
                f"got {tuple(x.shape)}"
            )
        if self.channels is not None:
            _check_end("x", x, self.channels, program.calls)
        if any(i.resizes and not i.halvings for i in program.instructions):
            program.latent_shapes(tuple(x.shape[1:]))  # raises an error before any kernel runs
        return x

    def _checked_latents(self, z: object, program: Program) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Check z; return the last state, and the latents that were split off before it."""
        splits = program.splits
        latents: tuple[Any, ...] = z if isinstance(z, tuple) else (z,)
        if splits and not isinstance(z, tuple):
            raise TypeError(f"z: expected a tuple of {splits + 1} latents, got {type(z).__name__}")
        if len(latents) != splits + 1:
            raise ValueError(f"z: expected {splits + 1} latents, got {len(latents)}")
        name = f"z[{splits}]" if splits else "z"
        x = flow_state(name, latents[-1])
        if _side_factor(program) > 1 and x.dim() != 4:
            raise ValueError(f"{name}: expected shape (N, C, H, W), got {tuple(x.shape)}")
        if self.channels is None:
            return x, latents[:-1]
        *_, (_, *trial) = program.latent_shapes((self.channels, *[SIDE] * (x.dim() - 2)))
        data_sides = (n * SIDE // m for n, m in zip(x.shape[2:], trial, strict=True))
        *split_off, last = program.latent_shapes((self.channels, *data_sides))
        _check_end(name, x, last[0], program.calls[::-1])
        for i, (channels, *sides) in enumerate(split_off):
            check_latent(f"z[{i}]", latents[i], x, channels, tuple(sides))
        return x, latents[:-1]


def instructions_of(layer: nn.Module, place: str) -> list[Instruction]:
    """The instructions of a layer.

    If a subclass overrides `forward` or `inverse` but not `instructions`, the chain calls the layer
    instead of running the instructions that it inherits.
    """
    if isinstance(layer, ReversibleChain):
        return layer.instructions()
    kind: type = type(layer)
    own = isinstance(layer, Bijection) and _instructions_are_current(kind)
    found = layer.instructions() if own else [Layer(layer)]  # type: ignore[operator]
    return [instruction.at(place) for instruction in found]


@cache
def _instructions_are_current(kind: type) -> bool:
    """Whether no class derived from the one that defines `instructions` overrides a direction."""
    instructions, *directions = (
        next(c for c in kind.__mro__ if name in c.__dict__)
        for name in ("instructions", "forward", "inverse")
    )
    return all(issubclass(instructions, c) for c in directions)


SIDE = 2**40  # of an image that every squeeze can halve


def _side_factor(program: Program) -> int:
    """The number that must divide the sides of an image."""
    return 2 ** max(0, *accumulate(i.halvings for i in program.instructions))


def _check_input_shape(shape: tuple[int, ...], channels: int | None, program: Program) -> None:
    """Raise ValueError unless a chain of this program takes this shape."""
    factor = _side_factor(program)
    wrong_sides = factor > 1 and (len(shape) != 3 or any(side % factor for side in shape[1:]))
    if not shape or channels not in (None, shape[0]) or wrong_sides:
        sides = f"H, W) with H and W divisible by {factor}" if factor > 1 else "*spatial)"
        raise ValueError(f"input_shape: expected ({channels or 'C'}, {sides}, got {shape}")


def _input_channels(layers: Iterable[nn.Module]) -> int | None:
    """The channels that the first layer takes; None if the layers take any number.

    Raises:
        ValueError: a layer takes another number of channels than the layer before it returns.
    """
    taken: int | None = None
    width = SIDE  # of a trial state, until a layer says how many channels it takes
    for i, layer in enumerate(layers):
        channels = getattr(layer, "channels", None) if isinstance(layer, Bijection) else None
        if channels is not None and taken is None:
            factor = Fraction(width, SIDE)
            if channels % factor:
                raise ValueError(
                    f"layers[{i}]: expected a multiple of {factor} channels, got one of {channels}"
                )
            taken, width = int(channels / factor), channels
        if channels not in (None, width):
            raise ValueError(
                f"layers[{i}]: expected a layer of {width} channels, got one of {channels}"
            )
        shape: tuple[int, ...] = (width, SIDE, SIDE)
        for instruction in instructions_of(layer, f"layers.{i}"):
            try:
                shape = instruction.shape(shape)
            except ValueError:
                raise ValueError(f"layers[{i}]: cannot take {width} channels") from None
        width = shape[0]
    return taken


def _check_end(name: str, x: Tensor, channels: int, calls: Sequence[Call]) -> None:
    """Raise TypeError or ValueError unless x has these channels and fits the network next to it.

    `calls` are those of the program, in the order in which they will run on x.
    """
    if calls:
        check_takes(calls[0].module, name, x, channels)
    else:
        check_channels(name, x, channels)
