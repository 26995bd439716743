"""The condition of a flow's 1x1 convolutions: it is logged, bounded, and infinite at divergence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mflow_kernels.layers import FlowStep, InvertibleConv1x1
from mflow_kernels.layers.conv1x1 import condition_number
from mflow_kernels.layers.folding import ActNormConv


@torch.no_grad()
def largest_conditions(model: nn.Module) -> dict[str, Tensor]:
    """Return the largest condition numbers in a model, by their names in the metrics.

    `condition` is that of W, which --max-condition bounds. `folded_condition` is that of W with
    actnorm's scale folded in, which the flow inverts. A model without steps of flow has none.
    """
    steps = _steps(model)
    if not steps:
        return {}
    folded = [condition_number(_folded(step, torch.float64)) for step in steps]
    conditions = [step.conv.condition_number() for step in steps]
    values = {"condition": conditions, "folded_condition": folded}
    return {name: torch.stack(found).max().float() for name, found in values.items()}


def bound_conditions(model: nn.Module, average: nn.Module, limit: float) -> None:
    """Bound the condition of a model's 1x1 convolutions. Copy those that change to its average."""
    for module, its_average in zip(model.modules(), average.modules(), strict=True):
        if isinstance(module, InvertibleConv1x1) and module.bound_condition_(limit):
            # Its new factors have another permutation, so the old average cannot be kept.
            its_average.load_state_dict(module.state_dict())


@contextmanager
def singular_means_divergence(model: nn.Module) -> Iterator[None]:
    """Report a 1x1 convolution that has no inverse as divergence.

    Its ValueError becomes a FloatingPointError. Other ValueErrors pass through.
    """
    try:
        yield
    except ValueError as error:
        with torch.no_grad():
            inverses = [_folded(step, torch.float32, inverted=True) for step in _steps(model)]
        if all(inverse.isfinite().all() for inverse in inverses):
            raise
        raise FloatingPointError(
            f"training diverged ({error}); a lower --learning-rate may help"
        ) from None


def _folded(step: FlowStep, dtype: torch.dtype, *, inverted: bool = False) -> Tensor:
    """The folded matrix of a step, or its inverse, (C, C)."""
    return ActNormConv.fold([step.linear], [""], dtype, inverted=inverted, check=False).weight[0]


def _steps(model: nn.Module) -> list[FlowStep]:
    return [module for module in model.modules() if type(module) is FlowStep]
