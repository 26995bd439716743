"""The masked networks of autoregressive layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_choice, check_count, check_tensor
from mflow_kernels.ops.masked_network import (
    ACTIVATIONS,
    Activation,
    ActivationKind,
    Add,
    AddContext,
    Linear,
    Operation,
    network_ref,
)


class MaskedNetwork(nn.Module):
    """A MADE (arXiv 1502.03509): the params of variable i depend on the variables before i only.

    With residual blocks, as nflows builds it: a linear layer, to which a context adds
    activation(linear(context)); `depth` blocks h + linear(activation(linear(activation(h)) +
    linear(context))); a linear layer. Without, linear layers and activations in turn, `depth` of
    each, where the context is added before the first activation, and a last linear layer. The last
    weights are zero, so the params start as its bias.

    Args:
        order: the variables in the order in which each depends on those before it.
        numbers: how many params a variable has.
        planar: whether the first D params are the first of each variable, and so on; otherwise the
            params of a variable follow one another.
        width: number of units of each hidden layer.
        depth: number of residual blocks, or of hidden layers.
        activation: the name of a function in `ops.masked_network.ACTIVATIONS`.
        context_channels: K of a context (N, K); 0 for none.
    """

    def __init__(
        self,
        order: Sequence[int],
        numbers: int,
        planar: bool,
        width: int,
        depth: int,
        residual: bool,
        activation: ActivationKind,
        context_channels: int,
    ) -> None:
        super().__init__()
        check_count("width", width, 1)
        check_count("depth", depth, 1)
        check_count("context_channels", context_channels, 0)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.width, self.depth, self.residual = width, depth, bool(residual)
        self.activation, self.context_channels = activation, context_channels
        features = len(order)
        hidden = 2 * depth if residual else depth - 1  # layers from hidden units to hidden units
        self.first = nn.Linear(features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(hidden))
        self.last = nn.Linear(width, features * numbers)
        nn.init.zeros_(self.last.weight)
        contexts = (1 + depth if residual else 1) if context_channels else 0
        self.contexts = nn.ModuleList(nn.Linear(context_channels, width) for _ in range(contexts))
        # The masks are not stored, so they have values on the device "meta", too.
        with torch.device("cpu"):
            place = torch.empty(features, dtype=torch.int64)
            place[list(order)] = torch.arange(1, features + 1)
            units = torch.arange(width) % max(1, features - 1) + min(1, features - 1)
        of_params = place.repeat(numbers) if planar else place.repeat_interleave(numbers)
        for name, mask in (
            ("mask_first", units[:, None] >= place),
            ("mask_hidden", units[:, None] >= units),
            ("mask_last", of_params[:, None] > units),
        ):
            self.register_buffer(name, mask.to(self.first.weight.dtype), persistent=False)

    def operations(self) -> list[Operation]:
        """The network with its present tensors; see `ops.masked_network`."""
        made: list[Operation] = []

        def linear(layer: Any, mask: Any) -> None:
            made.append(Linear(len(made), layer.weight, mask, layer.bias))

        def activate() -> None:
            made.append(Activation(len(made), self.activation))

        linear(self.first, self.mask_first)
        if self.context_channels:
            made.append(AddContext(len(made), 0))
        if self.residual:
            for block in range(self.depth):
                start = len(made)
                activate()
                linear(self.hidden[2 * block], self.mask_hidden)
                if self.context_channels:
                    made.append(AddContext(len(made), 1 + block))
                activate()
                linear(self.hidden[2 * block + 1], self.mask_hidden)
                made.append(Add(start, len(made)))
        else:
            activate()
            for layer in self.hidden:
                linear(layer, self.mask_hidden)
                activate()
        linear(self.last, self.mask_last)
        return made

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The params (N, D * numbers) of x (N, D), and of a context (N, K)."""
        return network_ref(self.operations(), x, self.of_context(x, context))

    def of_context(self, x: Tensor, context: object = None) -> list[Tensor]:
        """The contexts of `operations` from a context (N, K); none without context channels.

        Raises:
            TypeError, ValueError: it is missing, not expected, or has another shape.
        """
        if not self.context_channels:
            if context is not None:
                raise TypeError("context: expected none, because the layer has no context_channels")
            return []
        if context is None:
            raise TypeError(f"context: expected vectors (N, {self.context_channels}), got none")
        given = check_tensor("context", context).to(x.dtype)
        if given.shape != (len(x), self.context_channels):
            expected = f"({len(x)}, {self.context_channels})"
            raise ValueError(f"context: expected shape {expected}, got {tuple(given.shape)}")
        first, *others = (layer(given) for layer in self.contexts)
        if self.residual:
            first = ACTIVATIONS[self.activation](first, 1.0)
        return [first, *others]
