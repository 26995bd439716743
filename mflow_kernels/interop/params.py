"""Networks of other libraries' couplings, wrapped to return params in the order of our kernels.

That order is the raw scales in the first half of the channels and the shifts in the second.
"""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.interop.linear import constant
from mflow_kernels.layers.networks import fused_params, has_hooks
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.reversible.rearrangements import select_channels

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Passing = Literal["none", "channels", "argument"]


class Params(nn.Module):
    """One network whose output channels are scales and shifts in another order.

    If its last layer is a convolution or linear layer whose weights are smaller than its output,
    the weights are reordered instead of the output. A network like Glow's runs as one operator on
    a GPU.

    Args:
        net: the network, which keeps its parameters.
        raw, shift: the output channels that are the raw scales and the shifts; raw is None for
            additive couplings, where all are shifts.
        factors: factors of the raw scales and of the shifts.
        passing: how the network receives conditions: not at all, as channels after those of the
            state, or as a second argument that may be None.
        conditions: the indices of the sequence's conditions that it receives; None for all.
        inner: the name of the `nn.Sequential` in `net`, if `net` only calls that.
    """

    def __init__(
        self,
        net: nn.Module,
        raw: slice | None,
        shift: slice,
        factors: tuple[float, float] = (1.0, 1.0),
        *,
        passing: Passing = "none",
        conditions: tuple[int, ...] | None = None,
        inner: str = "",
    ) -> None:
        super().__init__()
        self.net = net
        self.raw, self.shift, self.factors = raw, shift, factors
        self.passing, self.conditions, self.inner = passing, conditions, inner

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        if self.conditions is not None:
            context = tuple(context[i] for i in self.conditions)
        if self.passing == "argument":
            return self._ordered(self.net(x, context[0] if context else None))
        if self.passing == "channels" and context:
            x = torch.cat([x, *context], dim=1)
        layers = self._layers(x)
        if layers is None:
            return self._ordered(self.net(x))
        last: Any = layers[-1]
        weight = self._ordered(last.weight, 0)
        bias = None if last.bias is None else self._ordered(last.bias, 0)
        params = fused_params(layers, x, (weight, bias))
        if params is not None:
            return params
        for layer in layers[:-1]:
            x = layer(x)
        if isinstance(last, nn.Linear):
            return F.linear(x, weight, bias)
        return last._conv_forward(x, weight, bias)

    def given(self, conditions: tuple[int, ...] | None) -> "Params":
        """Return a copy that receives only these conditions of its sequence, or all."""
        made = copy.copy(self)
        made.conditions = conditions
        return made

    def _layers(self, x: Tensor) -> list[nn.Module] | None:
        """Return the network's layers, if the output channels of the last one can be reordered, and
        its weights are smaller than its output for x."""
        if self.raw is None:
            return None
        layers = getattr(self.net, self.inner) if self.inner else self.net
        if type(layers) is not nn.Sequential or not len(layers) or has_hooks(self.net, layers):
            return None
        last: Any = layers[-1]
        if type(last) is nn.Linear or (type(last) in _CONVOLUTIONS and last.groups == 1):
            smaller = last.weight[0].numel() <= x.shape[0] * pixels(x)
            return list(layers) if smaller and not has_hooks(last) else None
        return None

    def _in_order(self) -> bool:
        at_start = self.raw is not None and self.raw.start in (None, 0) and self.raw.step is None
        return at_start and self.shift.step is None and self.factors == (1.0, 1.0)

    def _ordered(self, out: Tensor, dim: int = 1) -> Tensor:
        if self._in_order():
            return out
        if self.raw is None:
            return torch.cat([torch.zeros_like(out), out], dim)
        channels = range(out.shape[dim])
        raw, shift = channels[self.raw], channels[self.shift]
        if (order := (*raw, *shift)) != (*channels,):
            index = constant(order, out.device)
            out = select_channels(out, index) if dim == 1 else out.index_select(dim, index)
        if self.factors != (1.0, 1.0):
            factors = (self.factors[0],) * len(raw) + (self.factors[1],) * len(shift)
            vector = constant(factors, out.device, accumulator(out.dtype))
            out = (out * vector.view(-1, *(1,) * (out.dim() - dim - 1))).to(out.dtype)
        return out


class Joined(nn.Module):
    """Two networks whose outputs are the channels of one, in order."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], dim=1)


class Masked(nn.Module):
    """Two networks that get the whole state, with the features to transform set to 0.

    One returns a scale and the other a shift for every feature. A missing network stands for one
    that returns 0. Values that are not finite become NaN, as in normflows.

    Args:
        unchanged, transformed: the indices of the features that the coupling reads and changes.
    """

    def __init__(
        self,
        scale_net: nn.Module | None,
        shift_net: nn.Module | None,
        unchanged: tuple[int, ...],
        transformed: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.scale_net, self.shift_net = scale_net, shift_net
        self.unchanged, self.transformed = unchanged, transformed

    def forward(self, x: Tensor) -> Tensor:
        masked = x.new_zeros(x.shape[0], len(self.unchanged) + len(self.transformed))
        masked[:, constant(self.unchanged, x.device)] = x
        index = constant(self.transformed, x.device)
        outs = []
        for net in (self.scale_net, self.shift_net):
            if net is None:
                outs.append(x.new_zeros(x.shape[0], len(self.transformed)))
            else:
                out = net(masked)[:, index]
                outs.append(torch.where(out.isfinite(), out, torch.nan))
        return torch.cat(outs, dim=1)
