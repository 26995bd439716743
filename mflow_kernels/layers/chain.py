"""Chains of flow layers that rebuild their states in the backward pass.

The forward pass stores the output of the chain and every k-th state. The backward pass rebuilds
the others, each from the one after it, and runs each network again. It needs two launches a step,
plus the networks' own. Inverse weights are computed in float64. Networks run again under the same
autocast and with the same random numbers, and update running statistics only once.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.actnorm import warn_if_not_initialized
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.chain_layer import ChainLayer, assemble
from mflow_kernels.layers.coupling import check_latent
from mflow_kernels.layers.flow import Flow
from mflow_kernels.layers.networks import check_takes
from mflow_kernels.ops.checks import check_channels, check_count
from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.reversible.apply import apply_program
from mflow_kernels.reversible.program import (
    Couple,
    Instruction,
    Program,
    SpaceToDepth,
    SplitOff,
    output_channels,
)


class ReversibleChain(Flow):
    """Flow layers in sequence. Training stores few of their states, and no activations of networks.

    `z, logdet = chain(x)`. With splits, z is the tuple of latents, finest first, followed by the
    last state. K steps need K + 1 launches forward and 2 K backward, plus the networks' own.
    `chain.log_prob(x)` is the density of x if the latents are standard normal.

    Args:
        layers: `FlowStep`, `Squeeze`, `Split` or any other `ChainLayer`.
        reversible: rebuild the states in the backward pass. If False, autograd stores them, which
            allows `torch.compile` of the whole chain, and `torch.func.functional_call`.
            (Reversible mode fails there, because the parameters that `functional_call` passes no
            longer exist in the backward pass.)
            Transforms of `torch.func` always store them. Choose False if memory does not matter,
            because rebuilding states takes time, in small flows the largest share. A training step
            of a flow on two-dimensional points took 21.7 ms with True and 13.5 ms with False on a
            CPU (docs/memory.md).
        checkpoint_every: store the state before every k-th network, and the network's input, and
            rebuild only the states in between, so that the rounding of at most k inversions adds
            up. None stores no state. Memory then stays flat, but gradients drift during training
            from those with stored states (see docs/memory.md). The networks' activations are never
            stored.
        input_shape: shape of x without N, which determines `latent_shapes`. `sample` and a
            `ManifoldFlow` around the chain need it.

    Raises:
        TypeError, ValueError: naming the argument, if the input of a layer does not fit the output
            of the layer before it. A call checks its input before any kernel runs: the state (see
            `AffineCoupling`), whether the `Squeeze` layers can halve its sides, and the latents.

    Attributes:
        drift: the largest |rebuilt - true| of the chain's input over all backward passes, a scalar
            tensor. Reset it to None before a step to read the drift of that step alone.
    """

    def __init__(
        self,
        layers: Sequence[Bijection],
        *,
        reversible: bool = True,
        checkpoint_every: int | None = 8,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        chain: list[ChainLayer] = []
        if not layers:
            raise ValueError("layers: expected at least one, got none")
        for i, layer in enumerate(layers):
            if not isinstance(layer, ChainLayer):
                raise TypeError(
                    f"layers[{i}]: expected FlowStep, Squeeze, Split or another ChainLayer, "
                    f"got {type(layer).__name__}"
                )
            chain.append(layer)
        self._channels = _input_channels(chain)
        if checkpoint_every is not None:
            check_count("checkpoint_every", checkpoint_every, 1)
        self.layers = nn.ModuleList(layers)
        self.reversible = reversible
        self.checkpoint_every = checkpoint_every
        self.drift: Tensor | None = None
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.latent_shapes = None
        if self.input_shape is not None:
            instructions = [i for layer in chain for i in layer.instructions()]
            _check_input_shape(self.input_shape, self._channels, instructions)
            self.latent_shapes = _latent_shapes(instructions, self.input_shape)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        program = self._program()
        x = self._checked_data(x, program)
        warn_if_not_initialized(self)
        x, latents, ledger, log_det = apply_program(self, program, x, (), context, self.reversible)
        z = (*latents, x) if latents else x
        return z, ops.accumulate_logdet(ledger, log_det)

    def inverse(self, z: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        program = self._program()
        x, latents = self._checked_latents(z, program)
        x, _, ledger, log_det = apply_program(
            self, program.inverted(), x, latents, context, self.reversible
        )
        return x, ops.accumulate_logdet(ledger, log_det)

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        self._checked_data(x, self._program())
        with torch.no_grad():
            state: Any = x
            for layer in self.layers:
                state, _ = layer.initialize(state, *context)  # type: ignore[operator]
                state = state[0] if isinstance(state, tuple) else state
        return self(x, *context)

    def record_drift(self, drift: Tensor) -> None:
        # One graph may contain the chain several times, in both directions.
        self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)

    def _program(self) -> Program:
        layers: Any = self.layers
        return assemble({f"layers.{i}.": layer for i, layer in enumerate(layers)})

    def _checked_data(self, value: object, program: Program) -> Tensor:
        """Return `value` as the input of `forward` after checking it."""
        x = flow_state("x", value)
        if self.input_shape is not None and tuple(x.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: expected shape (N, {expected}), got {tuple(x.shape)}")
        factor = 2**program.total_squeezes
        if factor > 1 and (x.dim() != 4 or any(side % factor for side in x.shape[2:])):
            raise ValueError(
                f"x: expected shape (N, C, H, W) with H and W divisible by {factor}, "
                f"got {tuple(x.shape)}"
            )
        if self._channels is not None:
            _check_end("x", x, self._channels, program.instructions)
        return x

    def _checked_latents(self, z: object, program: Program) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Check z; return the last state, and the latents that were split off before it."""
        splits = sum(isinstance(i, SplitOff) for i in program.instructions)
        latents: tuple[Any, ...] = z if isinstance(z, tuple) else (z,)
        if splits and not isinstance(z, tuple):
            raise TypeError(f"z: expected a tuple of {splits + 1} latents, got {type(z).__name__}")
        if len(latents) != splits + 1:
            raise ValueError(f"z: expected {splits + 1} latents, got {len(latents)}")
        name = f"z[{splits}]" if splits else "z"
        x = flow_state(name, latents[-1])
        if program.total_squeezes and x.dim() != 4:
            raise ValueError(f"{name}: expected shape (N, C, H, W), got {tuple(x.shape)}")
        if self._channels is None:
            return x, latents[:-1]
        factor = 2**program.total_squeezes
        data_shape = (self._channels, *(factor * side for side in x.shape[2:]))
        *split_off, last = _latent_shapes(program.instructions, data_shape)
        _check_end(name, x, last[0], reversed(program.instructions))
        for i, (channels, *sides) in enumerate(split_off):
            check_latent(f"z[{i}]", latents[i], x, channels, tuple(sides))
        return x, latents[:-1]


def _input_channels(layers: Sequence[ChainLayer]) -> int | None:
    """The channels that the first layer takes; None if the layers take any number.

    Raises:
        ValueError: a layer takes another number of channels than the layer before it returns.
    """
    sized = [(i, layer.channels) for i, layer in enumerate(layers) if layer.channels is not None]
    if not sized:
        return None
    first, channels = sized[0]
    before = [i for layer in layers[:first] for i in layer.instructions()]
    start = 2 ** len(before)  # splits halve it without a remainder
    factor = Fraction(output_channels(before, start), start)
    if channels % factor:
        raise ValueError(
            f"layers[{first}]: expected a multiple of {factor} channels, got one of {channels}"
        )
    taken = width = int(channels / factor)
    for i, layer in enumerate(layers):
        if layer.channels not in (None, width):
            raise ValueError(
                f"layers[{i}]: expected a layer of {width} channels, got one of {layer.channels}"
            )
        width = output_channels(layer.instructions(), width)
    return taken


def _check_input_shape(
    shape: tuple[int, ...], channels: int | None, instructions: Sequence[object]
) -> None:
    """Raise TypeError or ValueError unless a chain of these instructions takes this shape."""
    for size in shape:
        check_count("input_shape", size, 1)
    factor = 2 ** sum(isinstance(i, SpaceToDepth) for i in instructions)
    wrong_sides = factor > 1 and (len(shape) != 3 or any(side % factor for side in shape[1:]))
    if not shape or channels not in (None, shape[0]) or wrong_sides:
        sides = f"H, W) with H and W divisible by {factor}" if factor > 1 else "*spatial)"
        raise ValueError(f"input_shape: expected ({channels or 'C'}, {sides}, got {shape}")


def _latent_shapes(
    instructions: Iterable[object], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """The shapes without N of the latents of an input of this shape, finest first."""
    latents = []
    for instruction in instructions:
        c, *sizes = shape
        if isinstance(instruction, SpaceToDepth):
            shape = (4 * c, *(size // 2 for size in sizes))
        elif isinstance(instruction, SplitOff):
            latents.append((c - c // 2, *sizes))
            shape = (c // 2, *sizes)
    return (*latents, shape)


def _check_end(name: str, x: Tensor, channels: int, instructions: Iterable[Instruction]) -> None:
    """Raise TypeError or ValueError unless x has these channels and fits the network next to it.

    `instructions` are in the order in which they will run on x.
    """
    net = next((i.net for i in instructions if isinstance(i, Couple)), None)
    if net is None:
        check_channels(name, x, channels)
    else:
        check_takes(net, name, x, channels)
