"""The interface of invertible layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mflow_kernels.ops.checks import check_channels
from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.reversible.apply import apply_stored
from mflow_kernels.reversible.instructions import Instruction, Layer
from mflow_kernels.reversible.masks import with_mask, zero_padding
from mflow_kernels.reversible.program import Program


class Bijection(nn.Module):
    """`z, logdet = layer(x)` and `x, logdet = layer.inverse(z)`.

    Layers with a network pass further arguments to it: `layer(x, context)`.

    States are (N, C, *spatial). Log-determinants are per sample, (N,), in nats, float32 (float64
    for float64 states). The logdet of `inverse` is minus that of `forward`.

    Attributes:
        channels: C of the states that it takes; None for a layer that takes any number.
        masked: whether the first argument after the state is a mask (N, 1, *spatial) of 0 and 1.
            The layer then keeps zeros at padding, and its logdet counts valid frames only. A
            `ReversibleChain` sets it on its layers.
    """

    channels: int | None = None
    masked = False

    def instructions(self) -> Sequence[Instruction]:
        """The instructions that a `ReversibleChain` runs for this layer, data -> latent.

        By default the chain calls `forward` and `inverse`. A layer that returns other instructions
        shares launches with its neighbours, or splits off latents.
        """
        return [Layer(self)]

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `forward`'s state, without N, for a state of this shape. Override it in a
        layer that changes the shape."""
        return shape

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        """Initialize actnorms from a first batch, and return `forward(x, *context)`.

        By default, this runs `forward` twice: in the first run, each layer inside that has an
        `initialize` of its own is initialized from the state that reaches it.
        """
        handles: dict[nn.Module, RemovableHandle] = {}

        def initialize_first(module: Any, args: Any, kwargs: Any) -> None:
            handles.pop(module).remove()  # `initialize` calls the module again
            module.initialize(*args, **kwargs)

        for module in self.modules():
            overrides = isinstance(module, Bijection) and (
                type(module).initialize is not Bijection.initialize
            )
            if overrides:
                handles[module] = module.register_forward_pre_hook(
                    initialize_first, with_kwargs=True
                )
        if handles:
            try:
                with torch.no_grad():
                    self(x, *context)
            finally:
                for handle in handles.values():
                    handle.remove()
        return self(x, *context)


class Instructed(Bijection):
    """A layer that runs its `instructions` when it is called, too."""

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return Program(self.instructions()).latent_shapes(shape)[-1]

    def checked(self, name: str, value: object) -> Tensor:
        """Return `value` as a state for this layer; raise TypeError or ValueError if it is not."""
        x = flow_state(name, value)
        if self.channels is not None:
            check_channels(name, x, self.channels)
        return x

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        z, latents, logdet = self._run(self.checked("x", x), (), context)
        return ((z, *latents) if latents else z), logdet

    def inverse(self, z: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        x, _, logdet = self._run(self.checked("z", z), (), context, inverse=True)
        return x, logdet

    def _run(
        self, x: Tensor, latents: Sequence[Tensor], context: Sequence[Any], *, inverse: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """The state, the latents that were split off, and the log-determinant (N,)."""
        if self.masked:
            x, context = with_mask(x, context)
            latents = [zero_padding(latent, context[0]) for latent in latents]
        program = Program(self.instructions())
        program = program.inverted() if inverse else program
        found = apply_stored(program, x, latents, context)
        return found.x, found.latents, found.logdet
