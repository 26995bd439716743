"""Muon for the weights of coupling networks, and AdamW for all other parameters."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.training.coupling_networks import parameter_groups

_MOMENTUM = 0.95
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # those of Muon's author


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for groups with `muon`: their weights take the updates of Muon.

    A weight is a matrix of its rows and all its other axes. An update is the momentum of its
    gradients with the singular values moved to about 1, and as large as one of AdamW. It is that of
    `torch.optim.Muon(momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")`, which takes
    matrices only and cannot skip a step by a flag on the device. (Jordan et al., "Muon", 2024; the
    size of an update is that of Liu et al., arXiv 2502.16982, section 2.2.)

    The state of such a weight has no `exp_avg_sq`.

    Args:
        groups: groups of parameters as AdamW takes them, each with "muon", a bool.

    Attributes:
        found_inf: 1 on the device to skip the next step, else 0, as fused optimizers take it.
    """

    found_inf: Tensor

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for weight in group["params"] if group["muon"] else ():
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
        skips = self.found_inf > 0
        momentum = state["exp_avg"].lerp(gradient, 1 - _MOMENTUM)
        matrix = gradient.lerp(momentum, _MOMENTUM).flatten(1)
        rate = 0.2 * math.sqrt(max(matrix.shape)) * group["lr"]
        update = rate * orthogonal(matrix).view_as(weight)
        update = update + group["lr"] * group["weight_decay"] * weight
        state["step"] += 1 - skips.float()
        state["exp_avg"].copy_(torch.where(skips, state["exp_avg"], momentum))
        weight.sub_(torch.where(skips, 0.0, update))


def moments_of(stage: nn.Module, optimizer: str) -> list[tuple[nn.Parameter, int]]:
    """Return a stage's parameters in the optimizer's order, with the number of moments of each."""
    networks, others = parameter_groups(stage)
    return [(p, 1 if optimizer == "muon" else 2) for p in networks] + [(p, 2) for p in others]


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of this one, and singular values from 0.5 to 1.5.

    It takes five steps of a Newton-Schulz iteration, whose coefficients make small singular values
    grow fast rather than all of them converge to 1.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T
