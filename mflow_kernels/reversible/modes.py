"""The autocast that a second run of a module repeats."""

from typing import Any

import torch

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
