"""The running average of a model's weights, which samples and evaluations use."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(nn.Module):
    """The exponential moving average of a model's parameters. Buffers are copied, not averaged.

    Lightning's WeightAveraging does not fit here: it copies the data set with the module,
    synchronizes with the device in every step, averages permutations, and cannot restart the
    average of a stage when that stage begins.

    Args:
        model: model to copy.
        decay: weight of the old average in an update. After t updates it is at most
            (1 + t) / (10 + t), so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, parts: Iterable[tuple[nn.Module, nn.Module]], step: int) -> None:
        """Update the averages for pairs (trained, averaged), after `step` earlier updates."""
        decay = min(self._decay, (1 + step) / (10 + step)) if self._decay else 0.0
        trained: list[Tensor] = []
        averaged: list[Tensor] = []
        for module, average in parts:
            trained += module.parameters()
            averaged += average.parameters()
        get_ema_multi_avg_fn(decay)(averaged, trained, step)

    def train(self, mode: bool = True) -> "WeightAverage":
        """Stay in evaluation mode: in training mode, objectives would track the variance."""
        return self


@torch.no_grad()
def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy buffers between modules of the same structure."""
    for old, new in zip(source.buffers(), target.buffers(), strict=True):
        new.copy_(old)
