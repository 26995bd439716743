"""Fingerprints of tensors, by which two runs of a module are compared without storing the first."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops.precision import without_autocast

_ROWS = 16  # projections in a fingerprint
# A larger relative difference is not rounding: bfloat16 rounds to 0.004, and dropping one number in
# a thousand makes a difference of 0.045.
ROUNDING = 0.03


@torch.no_grad()
def fingerprint(t: Tensor) -> Tensor:
    """(17,) float32: the projections of 16 parts of t onto a fixed vector, and the norm of t."""
    with without_autocast(t):
        flat = t.reshape(-1).float()
        if flat.numel() % _ROWS:
            flat = F.pad(flat, (0, -flat.numel() % _ROWS))
        rows = flat.view(_ROWS, -1)
        wave = torch.arange(rows.shape[1], dtype=torch.float32, device=t.device).cos_()
        return torch.cat([rows @ wave, flat.norm()[None]])


def difference(first: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
    """The largest relative difference of two lists of tensors, estimated from their fingerprints.

    Each difference is divided by the norm of its tensor, or by a third of the largest norm in the
    list if that is larger.

    Returns:
        A scalar. It is inf if the lists differ in length. It is 0 if the network's inputs, the
        first tensors, differ by more than rounding: the rebuilt state is then at fault, not the
        network.
    """
    device = first[0].device
    if len(first) != len(again):
        return torch.full((), math.inf, device=device)
    a, b = (torch.stack([p.to(device) for p in fingerprints]) for fingerprints in (first, again))
    norm = torch.maximum(a[:, -1], b[:, -1])
    # If nearly all units of a layer are off, its norm is small, and rounding can switch units.
    scale = torch.maximum(norm, norm.max() / 3)
    # The mean of cos^2 is 1/2, so a projection has half of the difference's squared norm.
    distance = math.sqrt(2) * (a - b)[:, :-1].norm(dim=1) / scale
    distance = distance.nan_to_num(0.0)  # both zero, or diverged
    return torch.where(distance[0] > ROUNDING / 4, 0.0, distance.max())
