"""Argument checks of the operators. They run before any kernel; each error names the argument, the
expected value and the given one."""

from numbers import Integral

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...] = STATE_DTYPES
) -> Tensor:
    """Return `value`. Raise TypeError unless it is a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        actual = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {names}, got {actual}")
    return value


def check_state(name: str, value: object) -> Tensor:
    """Return `value` as a flow state (N, C, *spatial), or raise TypeError or ValueError.

    It must be floating point and have at least two axes. Only N may be 0.
    """
    x = check_tensor(name, value)
    if x.dim() < 2:
        raise ValueError(f"{name}: expected shape (N, C, *spatial), got {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected no empty channel or spatial axis, got {tuple(x.shape)}")
    return x


def check_channels(
    name: str, x: Tensor, channels: int, spatial: tuple[str, ...] | None = None
) -> None:
    """Raise ValueError unless x is (N, channels, *spatial), with the axes that `spatial` names.

    If `spatial` is None, any number of spatial axes will do.
    """
    if x.shape[1] != channels or (spatial is not None and x.dim() != 2 + len(spatial)):
        axes = ", ".join(("N", str(channels), *(("*spatial",) if spatial is None else spatial)))
        raise ValueError(f"{name}: expected shape ({axes}), got {tuple(x.shape)}")


def check_state_for(name: str, value: object, of_channels: Tensor) -> None:
    """Check the channels and device of a state against a layer's parameter `of_channels` (C,)."""
    x = check_state(name, value)
    check_channels(name, x, of_channels.shape[0])
    check_device(name, x, of_channels)


def check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")


def check_broadcast(name: str, value: Tensor, onto: tuple[int, ...]) -> None:
    shape = tuple(value.shape)
    new_axes = len(onto) - len(shape)
    if new_axes < 0 or any(n not in (1, onto[new_axes + i]) for i, n in enumerate(shape)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {onto}, got {shape}")


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    """TypeError unless `value` is a whole number, ValueError unless it is in least..most."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    number = int(value)
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {wanted}, got {number}")
