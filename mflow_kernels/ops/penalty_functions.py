"""Penalty functions rho(e) of the masked penalty: values, slopes and normalizers, in plain torch.

The kernels have their own copy of values and slopes, in csrc/masked_penalty/masked_penalty.h.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from mflow_kernels.ops.checks import check_choice, check_tensor
from mflow_kernels.ops.precision import accumulator

Rho = Literal["l2", "l1", "huber"]
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class _PenaltyFunction:
    """rho(e) and rho'(e), elementwise, and log of the integral of exp(-w rho(e)) over e."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]
    log_normalizer: Callable[[Tensor, float], Tensor]


def _huber(e: Tensor, delta: float) -> Tensor:
    inside = e.abs().clamp(max=delta)
    return inside * (e.abs() - inside / 2)


def _huber_log_normalizer(w: Tensor, delta: float) -> Tensor:
    # Both parts are logarithms, so that neither a tiny nor a huge weight overflows.
    knee = delta * (w / 2).sqrt()
    body = HALF_LOG_2PI - 0.5 * w.log() + torch.erf(knee).log()
    tails = math.log(2 / delta) - w.log() - knee.square()
    return torch.where(w > 0, torch.logaddexp(body, tails), math.inf)


# A new function: its name in `Rho`, a row here, and one in csrc/masked_penalty/masked_penalty.h.
_PENALTY_FUNCTIONS = {
    "l2": _PenaltyFunction(
        value=lambda e, delta: e.square() / 2,
        slope=lambda e, delta: e,
        log_normalizer=lambda w, delta: HALF_LOG_2PI - 0.5 * w.log(),
    ),
    "l1": _PenaltyFunction(
        value=lambda e, delta: e.abs(),
        slope=lambda e, delta: e.sign(),
        log_normalizer=lambda w, delta: math.log(2) - w.log(),
    ),
    "huber": _PenaltyFunction(
        value=_huber,
        slope=lambda e, delta: e.clamp(-delta, delta),
        log_normalizer=_huber_log_normalizer,
    ),
}
RHOS = tuple(_PENALTY_FUNCTIONS)


def penalty_function(rho: str) -> _PenaltyFunction:
    check_choice("rho", rho, RHOS)
    return _PENALTY_FUNCTIONS[rho]


def check_rho(rho: str, delta: float) -> None:
    check_choice("rho", rho, RHOS)
    if isinstance(delta, bool) or not isinstance(delta, (int, float)):
        raise TypeError(f"delta: expected a number, got {type(delta).__name__}")
    if not (0 < delta < math.inf):
        raise ValueError(f"delta: expected a finite number above 0, got {delta}")


@torch.compiler.assume_constant_result  # torch 2.9 cannot trace `float` of a tensor
def _log_normalizer_of_number(rho: Rho, weight: float, delta: float) -> float:
    return float(penalty_log_normalizer(rho, torch.tensor(weight, dtype=torch.float64), delta))


@overload
def penalty_log_normalizer(rho: Rho, weight: float, delta: float = 1.0) -> float: ...
@overload
def penalty_log_normalizer(rho: Rho, weight: Tensor, delta: float = 1.0) -> Tensor: ...
def penalty_log_normalizer(rho: Rho, weight: Tensor | float, delta: float = 1.0) -> Tensor | float:
    """log of the integral of exp(-weight rho(e)) over e, which normalizes the penalty to a density.

        l2     log sqrt(2 pi / w)
        l1     log (2 / w)
        huber  log (sqrt(2 pi / w) erf(delta sqrt(w / 2)) + 2 / (w delta) exp(-w delta^2 / 2))

    Args:
        rho: "l2", "l1" or "huber".
        weight: w, a number above 0 or a tensor of such numbers. A tensor may contain 0, for which
            no density exists; the result there is infinite.
        delta: the threshold of huber, in units of e.

    Returns:
        A number, or a tensor with the shape and dtype of weight (float32 for 16-bit dtypes).
    """
    check_rho(rho, delta)
    if not isinstance(weight, Tensor):
        if not (0 < weight < math.inf):
            raise ValueError(f"weight: expected a finite number above 0, got {weight}")
        return _log_normalizer_of_number(rho, weight, delta)
    w = check_tensor("weight", weight).to(accumulator(weight.dtype))
    return penalty_function(rho).log_normalizer(w, delta)
