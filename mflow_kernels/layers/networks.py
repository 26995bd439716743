"""The coupling network that layers make where none is given."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_channels, check_count, check_device
from mflow_kernels.ops.coupling_network import coupling_network, prefers_fused, supports
from mflow_kernels.ops.launch import autocasts, transformed, uses_triton


def coupling_net(in_channels: int, out_channels: int, width: int, spatial_dims: int) -> nn.Module:
    """Glow's network: 3x3, 1x1 and 3x3 convolutions with ReLU between, the last one zero at first.

    From (N, in_channels, *spatial) to (N, out_channels, *spatial); with no spatial axis, three
    linear layers.

    Raises:
        TypeError, ValueError: a width below 1, spatial_dims outside 0 to 3.
    """
    check_count("width", width, 1)
    check_count("spatial_dims", spatial_dims, 0, 3)
    layers: list[nn.Module]
    if spatial_dims == 0:
        layers = [nn.Linear(in_channels, width), nn.Linear(width, width)]
        last: nn.Module = nn.Linear(width, out_channels)
    else:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
        pointwise = PointwiseConv2d(width) if spatial_dims == 2 else conv(width, width, 1)
        layers = [conv(in_channels, width, 3, padding=1), pointwise]
        last = conv(width, out_channels, 3, padding=1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return CouplingNetwork(layers[0], nn.ReLU(inplace=True), layers[1], nn.ReLU(inplace=True), last)


class CouplingNetwork(nn.Sequential):
    """Glow's network as `coupling_net` builds it: a chain of torch's layers, computed on a GPU by
    the fused operator `ops.coupling_network` where that fits and is faster."""

    def forward(self, x: Tensor) -> Tensor:
        params = fused_params(list(self), x)
        return super().forward(x) if params is None else params


def fused_params(
    layers: Sequence[nn.Module], x: Tensor, last: tuple[Tensor, Tensor | None] | None = None
) -> Tensor | None:
    """What a chain of layers gives for x, by `ops.coupling_network`; None where that does not fit
    the layers or x, or is slower.

    Args:
        last: weight and bias in place of those of the last layer.
    """
    if not uses_triton(x) or not is_glow_network(layers):
        return None
    products: Sequence[Any] = layers[::2]
    first, second, third = products
    weight, bias = (third.weight, third.bias) if last is None else last
    parameters = [first.weight, first.bias, second.weight, second.bias, weight, bias]
    if any(p is None for p in parameters):
        return None
    if autocasts(x.device):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not supports(x, first.weight, weight) or not prefers_fused(x, parameters):
        return None
    return coupling_network(x, *parameters)


def is_glow_network(layers: Sequence[nn.Module]) -> bool:
    """Whether layers are 3x3, 1x1 and 3x3 convolutions, or three linear layers, with ReLU between
    and without hooks, which would not be called."""
    if len(layers) != 5 or has_hooks(*layers) or not all(map(_is_relu, layers[1::2])):
        return False
    products = layers[::2]
    if all(type(layer) is nn.Linear for layer in products):
        return True
    return all(map(_is_same_convolution, products, (3, 1, 3)))


def _is_relu(layer: Any) -> bool:
    return type(layer) is nn.ReLU or (type(layer) is nn.LeakyReLU and layer.negative_slope == 0.0)


def _is_same_convolution(layer: Any, side: int) -> bool:
    """Whether it is a plain convolution of so many pixels a side that keeps the images' size."""
    return (
        type(layer) in (nn.Conv2d, PointwiseConv2d)
        and layer.kernel_size == (side, side)
        and layer.padding == (side // 2, side // 2)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody listens to calls of these modules, which a fused run would not make."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


# The spatial axes that layers of torch's take.
SPATIAL = {nn.Linear: (), nn.Conv1d: ("L",), nn.Conv2d: ("H", "W"), nn.Conv3d: ("D", "H", "W")}

# Chains whose first layer sees the state as it is.
CHAINS = (nn.Sequential, CouplingNetwork)


def check_takes(net: nn.Module, name: str, x: Tensor, channels: int) -> None:
    """Raise unless the state x has so many channels and `net` takes it, as far as that shows.

    It shows where the network starts with one of torch's own layers, as the default one does: then
    a wrong number of spatial axes, dtype (outside autocast) or device is told too.

    Raises:
        TypeError, ValueError: naming the argument `name`.
    """
    first: Any = next(iter(net._modules.values()), net) if type(net) in CHAINS else net
    spatial = SPATIAL.get(type(first))  # none of a subclass, which may cast and reshape
    check_channels(name, x, channels, spatial)
    if spatial is None:
        return
    weight = first.weight
    check_device(name, x, weight)
    if x.dtype != weight.dtype and not autocasts(x.device):
        expected, came = (str(t.dtype).removeprefix("torch.") for t in (weight, x))
        raise TypeError(f"{name}: expected the network's dtype {expected}, got {came}")


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of (N, width, H, W), faster on a CPU for batches of fewer than 16 images in
    channels_last and float32.

    torch makes a matrix product of those, at half the speed of oneDNN's convolution; but rows of
    pixels are images as good as any.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_better_cut(x):
            return _Cut.apply(x, self.weight, self.bias)
        return super().forward(x)

    def _is_better_cut(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.dim() == 4
            and len(x) < IMAGES
            and len(x) * x.shape[2] % IMAGES == 0
            and x.numel() * self.out_channels >= WORTH_CUTTING
            and x.is_contiguous(memory_format=torch.channels_last)
            and type(x) is Tensor
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not transformed()
        )


IMAGES = 16  # from which torch.conv2d asks oneDNN for 1x1 convolutions on one thread
WORTH_CUTTING = 4_000_000  # multiplications


def _cut(x: Tensor) -> Tensor:
    """The pixels of x, in channels_last, as those of 16 images."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(IMAGES, n * h // IMAGES, w, c).permute(0, 3, 1, 2)


class _Cut(torch.autograd.Function):
    """`F.conv2d` by `_cut`; its backward is of operators that autograd goes on through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = F.conv2d(_cut(x), weight, bias).contiguous(memory_format=torch.channels_last)
        n, _, h, w = x.shape
        c = len(weight)
        # Not a view, which a ReLU in place would make autograd copy.
        shape, strides = (n, c, h, w), (h * w * c, 1, w * c, c)
        return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), shape, strides)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = _cut(dy.contiguous(memory_format=torch.channels_last))
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy, _cut(x), weight, [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            list(ctx.needs_input_grad),
        )  # fmt: skip
        if dx is not None:
            n, c, h, w = x.shape
            dx = dx.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)
        return dx, dweight, dbias
