"""Penalty functions rho(e) of the masked penalty, and the densities exp(-w rho(e)) / Z they define.

    l2     e^2 / 2                                                   normal, variance 1 / w
    l1     |e|                                                       Laplace, scale 1 / w
    huber  e^2 / 2 where |e| <= delta, delta (|e| - delta / 2) beyond

All is plain torch. The kernels have their own copy of values, and their slopes, in
csrc/masked_penalty/masked_penalty.h.
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
HUBER_ITERATIONS = 12  # each divides the relative error of w by 4 or more, to below 1e-7
Generator = torch.Generator | None


@dataclass(frozen=True)
class PenaltyFunction:
    """One rho. The last argument of each function but `draw` is delta.

    Attributes:
        value: rho(e), elementwise.
        log_normalizer: log Z, the log of the integral of exp(-w rho(e)) over e, elementwise in w.
        fitted_weight: the w > 0 for which errors with a given mean of rho(e) > 0, a scalar, are
            most likely. It solves mean + d log Z / dw = 0.
        draw: an error drawn from the density for each w > 0, given w, delta and a generator.
    """

    value: Callable[[Tensor, float], Tensor]
    log_normalizer: Callable[[Tensor, float], Tensor]
    fitted_weight: Callable[[Tensor, float], Tensor]
    draw: Callable[[Tensor, float, Generator], Tensor]


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _exponential(rate: Tensor, generator: Generator) -> Tensor:
    return -torch.log1p(-_uniform(rate, generator)) / rate


def _with_random_sign(size: Tensor, generator: Generator) -> Tensor:
    return torch.where(_uniform(size, generator) < 0.5, -size, size)


def _draw_l2(w: Tensor, delta: float, generator: Generator) -> Tensor:
    normal = torch.randn(w.shape, generator=generator, dtype=w.dtype, device=w.device)
    return normal * w.rsqrt()


def _draw_l1(w: Tensor, delta: float, generator: Generator) -> Tensor:
    return _with_random_sign(_exponential(w, generator), generator)


def _huber(e: Tensor, delta: float) -> Tensor:
    inside = e.abs().clamp(max=delta)
    return inside * (e.abs() - inside / 2)


def _huber_log_normalizer(w: Tensor, delta: float) -> Tensor:
    # Both parts are logarithms, so that neither a tiny nor a huge weight overflows.
    knee = delta * (w / 2).sqrt()
    body = HALF_LOG_2PI - 0.5 * w.log() + torch.erf(knee).log()
    tails = math.log(2 / delta) - w.log() - knee.square()
    return torch.where(w > 0, torch.logaddexp(body, tails), math.inf)


def _huber_tail(w: Tensor, delta: float) -> Tensor:
    """Return t = 1 / (1 + sqrt(pi) a exp(a^2) erf(a)), the probability of |e| > delta.

    Here a = delta sqrt(w / 2).
    """
    a = delta * (w / 2).sqrt()
    return 1 / (1 + math.sqrt(math.pi) * a * a.square().exp() * a.erf())


def _huber_fitted_weight(mean: Tensor, delta: float) -> Tensor:
    """Solve w = (1 + t) / (2 mean), with t of `_huber_tail`, by iteration."""
    w = 1 / (2 * mean)
    for _ in range(HUBER_ITERATIONS):
        w = (1 + _huber_tail(w, delta)) / (2 * mean)
    return w


def _draw_huber(w: Tensor, delta: float, generator: Generator) -> Tensor:
    """Within delta, e is normal. Beyond it, |e| - delta is exponential with rate w delta."""
    erf_at_delta = (delta * (w / 2).sqrt()).erf()
    inside = (_uniform(w, generator) * erf_at_delta).erfinv() * (2 / w).sqrt()
    outside = delta + _exponential(w * delta, generator)
    size = torch.where(_uniform(w, generator) < _huber_tail(w, delta), outside, inside)
    return _with_random_sign(size, generator)


# A new function: its name in `Rho`, a row here, and one in csrc/masked_penalty/masked_penalty.h.
_PENALTY_FUNCTIONS = {
    "l2": PenaltyFunction(
        value=lambda e, delta: e.square() / 2,
        log_normalizer=lambda w, delta: HALF_LOG_2PI - 0.5 * w.log(),
        fitted_weight=lambda mean, delta: 1 / (2 * mean),
        draw=_draw_l2,
    ),
    "l1": PenaltyFunction(
        value=lambda e, delta: e.abs(),
        log_normalizer=lambda w, delta: math.log(2) - w.log(),
        fitted_weight=lambda mean, delta: 1 / mean,
        draw=_draw_l1,
    ),
    "huber": PenaltyFunction(
        value=_huber,
        log_normalizer=_huber_log_normalizer,
        fitted_weight=_huber_fitted_weight,
        draw=_draw_huber,
    ),
}
RHOS = tuple(_PENALTY_FUNCTIONS)


def penalty_function(rho: str) -> PenaltyFunction:
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
        rho: name of a penalty function (`ops/penalty_functions.py`), such as "l2".
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
