"""Memory layouts of flow states.

A kernel sees a flow state (N, C, *spatial) as N samples of C channels by P pixels with one stride
each, so that contiguous and channels_last tensors and views of their halves need no copy.
"""

import math

import torch
from torch import Tensor

from mflow_kernels.ops.checks import STATE_DTYPES, check_state


def pixels(x: Tensor) -> int:
    """P, the number of pixels of a sample: 1 for (N, C)."""
    return math.prod(x.shape[2:])


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The halves x_a, with C // 2 channels, and x_b of a state, as views."""
    c_a = x.shape[1] // 2
    return x[:, :c_a], x[:, c_a:]


def strides(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int, int]:
    """Steps, in elements, to the next sample, channel and pixel of a tensor that `dense_pixels`
    returned, from its shape and strides."""
    sides = zip(shape[:1:-1], stride[:1:-1], strict=True)
    return stride[0], stride[1], next((step for length, step in sides if length > 1), 1)


def dense_pixels(x: Tensor) -> Tensor:
    """`x` itself if one stride reaches all its pixels in order, else a contiguous copy."""
    if x.dim() == 4:  # the usual case, decided without a loop
        _, _, height, width = x.shape
        *_, down, right = x.stride()
        return x if height == 1 or width == 1 or down == width * right else x.contiguous()
    size = 1
    for length, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if length == 1:
            continue
        if size == 1:
            step = stride
        if stride != step * size:
            return x.contiguous()
        size *= length
    return x


def flow_state(name: str, value: object) -> Tensor:
    """Return `value` as a flow state for kernels, copied only if its pixels need several strides.

    Call this before the operator. The operator's fake derives the output's layout from its input.
    """
    usual = type(value) is Tensor and value.dim() == 4 and value.dtype in STATE_DTYPES
    x = dense_pixels(value if usual and 0 not in value.shape else check_state(name, value))
    if x.numel() >= 2**31 and x.device.type != "cpu":  # most states need no exact check
        check_span(name, x.shape, x.stride())
    return x


def check_span(name: str, shape: torch.Size, stride: tuple[int, ...]) -> None:
    """Raise ValueError if an offset within a sample does not fit the 32 bits that kernels use."""
    _, c, p = strides(shape, stride)
    span = (shape[1] - 1) * c + (shape[2:].numel() - 1) * p + 1
    if span > 2**31:
        raise ValueError(
            f"{name}: expected samples that span at most 2^31 elements, got one of shape "
            f"{tuple(shape[1:])} that spans {span}"
        )


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """`y` with the strides of `torch.empty_like(x)`, which the operator's fake promises."""
    if y.stride() == x.stride() or y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x, dtype=y.dtype, device=y.device).copy_(y)


def channels_first(x: Tensor) -> bool:
    """Whether neighbours in memory are pixels of one channel rather than channels of one pixel."""
    return pixels(x) > 1 and strides(x.shape, x.stride())[2] == 1


def is_channels_last(x: Tensor) -> bool:
    """Whether the strides of a state (N, C, *spatial) are in channels_last order.

    With one channel or one pixel, the strides alone decide, as in torch's convolutions.
    `Tensor.is_contiguous` would accept such a state in either order.
    """
    return x.dim() > 2 and 0 < x.stride(1) * x.shape[1] <= x.stride(-1)


def net_input(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An empty tensor for the network input y_a: dense, with y's order of axes.

    Without a dtype its shape is (0,).
    """
    if dtype is None:
        return y.new_empty(0)
    if y.is_contiguous():
        return y.new_empty((y.shape[0], y.shape[1] // 2, *y.shape[2:]), dtype=dtype)
    return torch.empty_like(y[:, : y.shape[1] // 2], dtype=dtype)


def cut_net_input(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`net_input`, filled from y."""
    net = net_input(y, dtype)
    return net if dtype is None else net.copy_(y[:, : net.shape[1]])
