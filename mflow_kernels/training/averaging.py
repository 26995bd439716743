"""A running average of a model's weights: what samples and evaluations are made from."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class WeightAverage(nn.Module):
    """The exponential moving average of a model's parameters; its buffers are the model's.

    Lightning's WeightAveraging copies the data set with the module, looks at the device at each
    step, and averages permutations; stages that are trained one after another need each its own
    start too.

    Args:
        model: is copied.
        decay: of the old average in a step, less in the first ones: (1 + t) / (10 + t) after t.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, parts: Iterable[tuple[nn.Module, nn.Module]], step: int) -> None:
        """Average the parameters of pairs (trained, averaged) of modules once more; `step` counts
        those before."""
        decay = min(self._decay, (1 + step) / (10 + step)) if self._decay else 0.0
        trained: list[Tensor] = []
        averaged: list[Tensor] = []
        for one, other in parts:
            trained += one.parameters()
            averaged += other.parameters()
        torch._foreach_lerp_(averaged, trained, 1 - decay)

    def train(self, mode: bool = True) -> "WeightAverage":
        """Stays in evaluation mode: objectives track what they see in training mode."""
        return self


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a module the parameters and buffers of its like."""
    pairs = zip(_tensors(target), _tensors(source), strict=True)
    for to, value in pairs:
        to.copy_(value)


@torch.no_grad()
def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give a module the buffers of its like."""
    for to, value in zip(target.buffers(), source.buffers(), strict=True):
        to.copy_(value)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
