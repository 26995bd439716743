"""The default coupling network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.checks import (
    STATE_DTYPES,
    check_channels,
    check_count,
    check_device,
    check_tensor,
)
from mflow_kernels.ops.coupling_network import (
    coupling_network,
    has_epilogues,
    implementation,
    layer,
)
from mflow_kernels.ops.launch import uses_triton
from mflow_kernels.ops.precision import autocast_dtype

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def coupling_net(
    in_channels: int, out_channels: int, width: int, spatial_dims: int, context_channels: int = 0
) -> nn.Module:
    """Glow's network: 3x3, 1x1 and 3x3 convolutions with ReLU in between.

    It maps (N, in_channels, *spatial) to (N, out_channels, *spatial). The last convolution is
    initialized to zero. Without spatial axes it has three linear layers. With context_channels > 0
    it also takes a context; see `CouplingNetwork`.

    Raises:
        TypeError, ValueError: a width below 1, spatial_dims outside 0 to 3, context_channels
            below 0.
    """
    check_count("width", width, 1)
    check_count("spatial_dims", spatial_dims, 0, 3)
    check_count("context_channels", context_channels, 0)
    in_channels += context_channels
    layers: list[nn.Module]
    if spatial_dims == 0:
        layers = [nn.Linear(in_channels, width), nn.Linear(width, width)]
        last: nn.Module = nn.Linear(width, out_channels)
    else:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
        pointwise = conv(width, width, 1)  # drawn first, so that seeds keep their weights
        layers = [conv(in_channels, width, 3, padding=1), pointwise]
        last = conv(width, out_channels, 3, padding=1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    layers = [layers[0], nn.ReLU(inplace=True), layers[1], nn.ReLU(inplace=True), last]
    return CouplingNetwork(*layers, context_channels=context_channels)


class CouplingNetwork(nn.Sequential):
    """Glow's network, as `coupling_net` builds it.

    On a GPU the operator `ops.coupling_network` computes it if that is faster.

    Args:
        layers: the layers, in order.
        context_channels: K. If positive, calls take a context, a vector (N, K) or a map
            (N, K, *sides), also of integers, which becomes further channels of x. A vector is
            repeated at every pixel. The sides of a map must be multiples of those of x; it is
            averaged to x's size.

    Attributes:
        masked: whether calls take a mask (N, 1, *spatial) of 0 and 1 before the context. Each layer
            then reads zeros at padding. A masked `ReversibleChain` sets it.

    Raises:
        TypeError, ValueError: in a call, a context that is missing, not expected, or does not fit.
    """

    masked = False

    def __init__(self, *layers: nn.Module, context_channels: int = 0) -> None:
        super().__init__(*layers)
        self.context_channels = context_channels
        # The layers that were looked at last, and whether they form Glow's network.
        self._layers: list[Any] = []
        self._is_glow = False

    def forward(self, x: Tensor, context: Tensor | None = None, *after_mask: Tensor) -> Tensor:
        mask = None
        if self.masked:
            mask, context = context, after_mask[0] if after_mask else None
        if context is not None or self.context_channels:
            x = with_context(x, context, self.context_channels)
        if mask is not None:
            for each in self:
                x = each(x if isinstance(each, nn.ReLU) else x * mask)
            return x
        layers = [*self._modules.values()]
        if layers != self._layers:
            self._layers, self._is_glow = layers, is_glow_network(layers)
        if not self._is_glow or has_hooks(*layers):
            return super().forward(x)
        params = fused_params(layers, x)
        if params is not None:
            return params
        # As torch's modules compute it, without five calls of modules.
        for product in layers[:-1:2]:
            x = layer(x, product.weight, product.bias).relu_()
        return layer(x, layers[-1].weight, layers[-1].bias)


def with_context(x: Tensor, context: object, channels: int) -> Tensor:
    """x (N, C, *spatial) with the context as further channels; see `CouplingNetwork`.

    The result is in channels_last, the layout of the fused networks.
    """
    if not channels:
        raise TypeError("context: expected none, because the networks have no context_channels")
    if context is None:
        raise TypeError(f"context: expected classes, vectors (N, {channels}) or maps, got none")
    given = check_tensor("context", context, (*STATE_DTYPES, *_INTEGERS)).to(x.dtype)
    n, sides = x.shape[0], x.shape[2:]
    is_map = given.dim() == x.dim() > 2
    divides = is_map and all(
        own % side == 0 for own, side in zip(given.shape[2:], sides, strict=True)
    )
    if given.shape[:2] != (n, channels) or not (given.dim() == 2 or divides):
        maps = f" or a map with multiples of the sides {tuple(sides)}" if sides else ""
        raise ValueError(
            f"context: expected shape ({n}, {channels}){maps}, got {tuple(given.shape)}"
        )
    if is_map:
        for axis, side in enumerate(sides, start=2):
            given = given.unflatten(axis, (side, -1)).mean(axis + 1)
    else:
        given = given.view(n, channels, *[1] * len(sides)).expand(n, channels, *sides)
    return torch.cat([x.movedim(1, -1), given.movedim(1, -1)], dim=-1).movedim(-1, 1)


def fused_params(
    layers: Sequence[nn.Module], x: Tensor, last: tuple[Tensor, Tensor | None] | None = None
) -> Tensor | None:
    """The output of a sequence of layers for x, by `ops.coupling_network`.

    Args:
        last: weight and bias that replace those of the last layer.

    Returns:
        None if the layers form another network, or if torch's own layers are faster.
    """
    if not (uses_triton(x) or has_epilogues(x)) or not is_glow_network(layers):
        return None
    products: Sequence[Any] = layers[::2]
    first, second, third = products
    weight, bias = (third.weight, third.bias) if last is None else last
    parameters = [first.weight, first.bias, second.weight, second.bias, weight, bias]
    device = x.device
    for p in parameters:
        # If a device differs, torch's layers raise a clear error. A kernel would read another
        # device's memory.
        if p is None or p.device != device:
            return None
    x = x.to(autocast_dtype(x))
    chosen = implementation(x, parameters, first.training)
    if chosen == "torch":
        return None
    return coupling_network(x, *parameters, kernels=chosen == "kernels")


def is_glow_network(layers: Sequence[nn.Module]) -> bool:
    """Whether layers are 3x3, 1x1 and 3x3 convolutions or three linear layers, joined by ReLU.

    Layers with hooks do not count, since the operator would not call them.
    """
    if len(layers) != 5 or has_hooks(*layers) or not all(map(_is_relu, layers[1::2])):
        return False
    products = layers[::2]
    if all(type(layer) is nn.Linear for layer in products):
        return True
    return all(map(_is_same_convolution, products, (3, 1, 3)))


def _is_relu(layer: Any) -> bool:
    return type(layer) is nn.ReLU or (type(layer) is nn.LeakyReLU and layer.negative_slope == 0.0)


def _is_same_convolution(layer: Any, side: int) -> bool:
    """Whether it is a plain convolution with kernel (side, side) that keeps the images' size."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (side, side)
        and layer.padding == (side // 2, side // 2)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def has_hooks(*modules: nn.Module) -> bool:
    """Whether these modules have hooks, which a fused operator or sequence would not call."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
    return False


# The spatial axes that torch's layers expect.
SPATIAL = {nn.Linear: (), nn.Conv1d: ("L",), nn.Conv2d: ("H", "W"), nn.Conv3d: ("D", "H", "W")}

# Containers that pass the state unchanged to their first layer.
SEQUENTIALS = (nn.Sequential, CouplingNetwork)


def check_takes(net: nn.Module, name: str, x: Tensor, channels: int) -> None:
    """Check that the state x has these channels and, as far as possible, that `net` accepts it.

    If the network starts with a layer of torch, as the default one does, x must also have the
    spatial axes, device and (outside autocast) dtype of that layer.

    Raises:
        TypeError, ValueError: naming the argument `name`.
    """
    first: Any = next(iter(net._modules.values()), net) if type(net) in SEQUENTIALS else net
    spatial = SPATIAL.get(type(first))  # None for a subclass, which may cast and reshape
    try:
        check_channels(name, x, channels, spatial)
    except ValueError as error:
        axes = x.dim() - 2
        if type(net) is not CouplingNetwork or x.shape[1] != channels or not 0 <= axes <= 3:
            raise
        raise ValueError(f"{error}; spatial_dims={axes} makes a network for it") from None
    if spatial is None:
        return
    weight = first.weight
    check_device(name, x, weight)
    if x.dtype != weight.dtype and autocast_dtype(x) != autocast_dtype(weight):
        expected, actual = (str(t.dtype).removeprefix("torch.") for t in (weight, x))
        raise TypeError(f"{name}: expected the network's dtype {expected}, got {actual}")
