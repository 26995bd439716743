"""The dtype of an operator's arithmetic, which autocast must not change."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.compiler import tl
from mflow_kernels.ops.launch import is_walked

TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and log-determinants of a state of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    kind = autocast_kind(device)
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_kind(device: torch.device) -> str:
    """The type of device whose autocast applies to tensors on `device`. The meta device has none,
    and the CPU's in a walk."""
    return "cpu" if device.type == "meta" and is_walked() else device.type


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x has as an input of a network: autocast's if it is on, or its own.

    Autocast does not cast float64.
    """
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(autocast_kind(x.device))


def without_autocast(on: Tensor | torch.device) -> AbstractContextManager[Any]:
    """A context that turns autocast off, so that products of states keep their precision."""
    device = on if isinstance(on, torch.device) else on.device
    if not autocasts(device):
        return nullcontext()
    return torch.autocast(autocast_kind(device), enabled=False)
