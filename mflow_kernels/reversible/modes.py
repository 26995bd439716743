"""The modes that a second run of a module repeats: autocast, and the state of random generators."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.launch import capturing
from mflow_kernels.ops.precision import autocasts


def autocast_state(device: torch.device) -> dict[str, Any]:
    """Arguments of a `torch.autocast` like the active one, but without its cache of cast weights.

    The backward pass must not use a weight that the forward pass cast without gradients.
    """
    kind = "cpu" if device.type == "meta" else device.type  # torch.autocast does not know "meta"
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": autocasts(device),
        "cache_enabled": False,
    }


# The state of the CPU generator, and index, seed and offset of the CUDA device's generator.
RandomState = tuple[Tensor, tuple[int, int, int] | None]


def random_state(device: torch.device) -> RandomState:
    """The state of the default generators that a network on `device` may draw from."""
    cuda = None
    if device.type == "cuda" and not capturing(device):
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        cuda = index, generator.initial_seed(), generator.get_offset()
    return torch.get_rng_state(), cuda


def same_random_state(a: RandomState, b: RandomState) -> bool:
    return a[1] == b[1] and torch.equal(a[0], b[0])


@contextmanager
def random_state_of(state: RandomState | None) -> Iterator[None]:
    """Draw from `state` inside the context, and restore the generators afterwards."""
    if state is None:
        yield
        return
    cpu, cuda = state
    with torch.random.fork_rng([] if cuda is None else [cuda[0]]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            index, seed, offset = cuda
            generator = torch.cuda.default_generators[index]
            generator.manual_seed(seed)
            generator.set_offset(offset)
        yield
