r"""The scale functions of affine couplings: from a network's raw output to s > 0.

    sigmoid          s = sigmoid(raw + offset) + eps              Glow's (arXiv 1807.03039)
    double-sigmoid   s = 2 sigmoid(raw)                           Jet's (arXiv 2412.15129)
    softplus         log s = min(log(softplus(raw) + eps), clamp) nflows' general activation
    exp              s = exp(raw)                                 RealNVP without its tanh
    tanh             log s = clamp * tanh(raw / clamp)            |log s| < clamp
    atan             log s = clamp * 0.636 * atan(raw / clamp)    |log s| < clamp, FrEIA's
    softsign         log s = raw / (1 + |raw / clamp|)            |log s| < clamp, zuko's

log s and its derivative never overflow, and no logarithm is taken of a number that has underflowed.
For example, log sigmoid(-120) is -120.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops.checks import check_choice
from mflow_kernels.ops.compiler import tl, triton

Kind = Literal["sigmoid", "double-sigmoid", "softplus", "exp", "tanh", "atan", "softsign"]
Order = Literal["shift-scale", "scale-shift"]

ATAN = 0.636  # FrEIA's rounding of 2 / pi, so that its couplings are reproduced exactly


@dataclass(frozen=True)
class ScaleFunction:
    """The function from params to a scale, and whether the shift comes before or after scaling.

    Attributes:
        kind: "sigmoid", "double-sigmoid", "softplus", "exp", "tanh", "atan" or "softsign".
        offset: added to raw by "sigmoid".
        eps: floor of s with "sigmoid" and "softplus", >= 0.
        clamp: bound of |log s| with "tanh", "atan" and "softsign", and of log s with "softplus",
            > 0. With a clamp of 2, samples of a deep flow can overflow float32; with 1, none was
            seen to (docs/results.md).
        order: "shift-scale" y = s * (x + shift), or "scale-shift" y = s * x + shift.
    """

    kind: Kind = "tanh"
    offset: float = 2.0
    eps: float = 0.0
    clamp: float = 1.0
    order: Order = "shift-scale"

    def __post_init__(self) -> None:
        check_choice("scale.kind", self.kind, get_args(Kind))
        check_choice("scale.order", self.order, get_args(Order))
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"scale.eps: expected a finite number >= 0, got {self.eps}")
        if not 0 < self.clamp < float("inf"):
            raise ValueError(f"scale.clamp: expected a finite number > 0, got {self.clamp}")
        if not abs(self.offset) < float("inf"):
            raise ValueError(f"scale.offset: expected a finite number, got {self.offset}")

    @property
    def args(self) -> tuple[str, float, float, float, str]:
        """The fields in order, for the signature of an operator."""
        return self.kind, self.offset, self.eps, self.clamp, self.order

    @property
    def identity(self) -> float:
        """The raw output at which s = 1, up to rounding.

        Raises:
            ValueError: s is above 1 for every raw output.
        """
        if self.kind not in ("sigmoid", "softplus"):
            return 0.0
        if self.eps >= 1:
            raise ValueError(f"scale.eps: expected less than 1 for a mask, got {self.eps}")
        if self.kind == "softplus":
            return math.log(math.expm1(1 - self.eps))
        # Without eps, any number whose sigmoid rounds to 1.
        return (math.log((1 - self.eps) / self.eps) if self.eps else 1e3) - self.offset

    @property
    def shifts_first(self) -> bool:
        return {"shift-scale": True, "scale-shift": False}[self.order]

    @staticmethod
    def of(scale: "ScaleFunction | Kind") -> "ScaleFunction":
        """The default function of a kind, or the given one."""
        if isinstance(scale, ScaleFunction):
            return scale
        check_choice("scale", scale, tuple(_DEFAULTS))
        return _DEFAULTS[scale]


@cache
def scale_of(kind: Kind, offset: float, eps: float, clamp: float, order: Order) -> ScaleFunction:
    """The `ScaleFunction` with these `args`."""
    return ScaleFunction(kind, offset, eps, clamp, order)


_DEFAULTS = {kind: ScaleFunction(kind) for kind in get_args(Kind)}


def _sigmoid_log_s(raw: Tensor, scale: ScaleFunction) -> Tensor:
    if scale.eps == 0:
        return F.logsigmoid(raw + scale.offset)
    return (torch.sigmoid(raw + scale.offset) + scale.eps).log()


def _double_sigmoid_log_s(raw: Tensor, _: ScaleFunction) -> Tensor:
    # log 2 - softplus(-raw) would cancel near 0, where networks start.
    negative = raw < 0
    below = torch.where(negative, raw, 0)
    return below - (torch.where(negative, raw, -raw).expm1() / 2).log1p()


LOW = -40.0  # softplus(raw) is e^raw below, to the precision of float64


def _softplus_log_s(raw: Tensor, scale: ScaleFunction) -> Tensor:
    log_s = (F.softplus(raw.clamp(min=LOW), threshold=-LOW) + scale.eps).log()
    if scale.eps == 0:
        log_s = torch.where(raw < LOW, raw, log_s)
    return log_s.clamp(max=scale.clamp)


# log s from raw, in plain torch. A new scale function: its name in `Kind`, its formula here, its
# branch in `log_scale` below, and its row in csrc/coupling/scale.h.
FORMULAS: dict[Kind, Callable[[Tensor, ScaleFunction], Tensor]] = {
    "sigmoid": _sigmoid_log_s,
    "double-sigmoid": _double_sigmoid_log_s,
    "softplus": _softplus_log_s,
    "exp": lambda raw, scale: raw,
    "tanh": lambda raw, scale: (raw / scale.clamp).tanh() * scale.clamp,
    "atan": lambda raw, scale: (raw / scale.clamp).atan() * (scale.clamp * ATAN),
    "softsign": lambda raw, scale: raw / (1 + raw.abs() / scale.clamp),
}


def log_scale_ref(raw: Tensor, scale: ScaleFunction) -> Tensor:
    """log s."""
    return FORMULAS[scale.kind](raw, scale)


@triton.jit
def _atan(x):
    # Use 1 / x above 1. Two halvings, atan(a) = 2 atan(a / (1 + sqrt(1 + a^2))), then bring the
    # argument below 0.2, where twelve terms of the series reach the precision of float64.
    a = tl.abs(x)
    a = tl.where(a > 1, 1 / tl.maximum(a, 1), a)
    a = a / (1 + tl.sqrt(1 + a * a))
    a = a / (1 + tl.sqrt(1 + a * a))
    q = -a * a
    series = tl.full(a.shape, 0.0, a.dtype)
    for i in tl.static_range(12):
        series = series * q + 1.0 / (23 - 2 * i)
    r = 4 * a * series
    r = tl.where(tl.abs(x) > 1, 1.5707963267948966 - r, r)
    return tl.where(x < 0, -r, r)


@triton.jit
def _tanh_of_positive(x, e):
    """tanh x = -m / (2 + m) with m = e^-2x - 1, from x >= 0 and e = e^-2x.

    Networks start near x = 0, where e - 1 would cancel. There m is summed as the series of e^r - 1,
    to the dtype's precision.
    """
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 10
    r = tl.maximum(-2 * x, -1)
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(TERMS):
        series = 1 + series * r * (1.0 / (TERMS + 1 - i))
    m = tl.where(x < 0.5, r * series, e - 1)
    return -m / (2 + m)


@triton.jit
def _log1p_ratio(x):
    """log(1 + x) / x for 0 <= x <= 1, as the series of 2 atanh(t) with t = x / (2 + x) <= 1/3."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    t = x / (2 + x)
    series = tl.full(x.shape, 0.0, x.dtype)
    for i in tl.static_range(TERMS):
        series = series * (t * t) + 2.0 / (2 * (TERMS - i) - 1)
    return series / (2 + x)


@triton.jit
def log_scale(raw, SCALE: tl.constexpr):
    """(log s, d log s / d raw), elementwise in raw's dtype."""
    if SCALE.kind == "sigmoid":
        r = raw + SCALE.offset
        e = tl.exp(-tl.abs(r))
        if SCALE.eps == 0:
            log_s = tl.minimum(r, 0.0) - tl.log(1 + e)
            slope = tl.where(r < 0, 1.0, e) / (1 + e)
        else:
            sigmoid = tl.where(r < 0, e, 1.0) / (1 + e)
            log_s = tl.log(sigmoid + SCALE.eps)
            slope = e / ((1 + e) * (1 + e)) / (sigmoid + SCALE.eps)
    elif SCALE.kind == "double-sigmoid":
        e = tl.exp(-tl.abs(raw))
        tanh = _tanh_of_positive(tl.abs(raw) / 2, e)
        log_s = tl.minimum(raw, 0.0) + tanh * _log1p_ratio(tanh)  # 1 + tanh = 2 sigmoid(|raw|)
        slope = tl.where(raw < 0, 1.0, e) / (1 + e)
    elif SCALE.kind == "softplus":
        e = tl.exp(-tl.abs(raw))
        ratio = _log1p_ratio(e)
        if SCALE.eps == 0:  # softplus(raw) = e^raw * ratio below 0, where e^raw may underflow
            rest = tl.where(raw < 0, ratio, raw + e * ratio)
            log_s = tl.minimum(raw, 0.0) + tl.log(rest)
            slope = 1 / ((1 + e) * rest)
        else:
            s = tl.maximum(raw, 0.0) + e * ratio + SCALE.eps
            log_s = tl.log(s)
            slope = tl.where(raw < 0, e, 1.0) / ((1 + e) * s)
        slope = tl.where(log_s > SCALE.clamp, 0.0, slope)
        log_s = tl.where(log_s > SCALE.clamp, SCALE.clamp, log_s)
    elif SCALE.kind == "exp":
        log_s = raw
        slope = tl.full(raw.shape, 1.0, raw.dtype)
    elif SCALE.kind == "tanh":
        r = tl.abs(raw) / SCALE.clamp
        e = tl.exp(-2 * r)
        tanh = _tanh_of_positive(r, e)
        log_s = SCALE.clamp * tl.where(raw < 0, -tanh, tanh)
        slope = 4 * e / ((1 + e) * (1 + e))
    elif SCALE.kind == "softsign":
        limited = 1 + tl.abs(raw) / SCALE.clamp
        log_s = raw / limited
        slope = 1 / limited / limited
    else:
        tl.static_assert(SCALE.kind == "atan", "log_scale: unknown scale function")
        FACTOR: tl.constexpr = 0.636  # ATAN, a plain float, which kernels cannot read
        r = raw / SCALE.clamp
        log_s = (SCALE.clamp * FACTOR) * _atan(r)
        slope = FACTOR / (1 + r * r)
    return log_s, slope
