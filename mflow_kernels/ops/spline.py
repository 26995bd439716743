r"""Monotone rational-quadratic splines: what defines one, and the formula in plain torch.

Durkan et al., Neural Spline Flows, NeurIPS 2019 (arXiv 1906.04032), section 3.1. A spline maps an
interval [low, high] to itself. K bins cut it, with widths and heights that are softmax values of
raw numbers, stretched to the interval. In a bin of width w and height h that begins at (x0, y0),
with the slopes d0 and d1 at its ends, and

    delta = h / w,  t = (x - x0) / w,  s = 1 - t,  q = t s
    below = delta (t^2 + s^2) + (d0 + d1) q,     slant = d1 t^2 + 2 delta q + d0 s^2
    y = y0 + h (delta t^2 + d0 q) / below,       dy/dx = slant (delta / below)^2

All sums have positive terms, so they lose no digits. With u = (y - y0) / h and v = 1 - u, so does
the inverse:

    tilt = d0 v - d1 u,  root = sqrt(tilt^2 + 4 delta^2 u v)
    t = 2 delta u / (2 delta u + root + tilt)                if tilt >= 0
    t = (root - tilt) / (root - tilt + 2 delta v)            otherwise

Widths and heights are used as they come from the softmax, and not as differences of knots: the
difference of two numbers of the size of the interval has few correct digits if a bin is small.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops.checks import check_choice, check_count
from mflow_kernels.ops.precision import accumulator

Kind = Literal["softplus", "exp"]
Tails = Literal["linear", "circular"]
MAX_BINS = 64


class SplineOptions(TypedDict, total=False):
    """The fields of `Spline` after bins and bound, as keywords of the operators."""

    tails: Tails | None
    min_width: float
    min_height: float
    min_slope: float
    temperature: float
    kind: Kind


@dataclass(frozen=True)
class Spline:
    """The constants of rational-quadratic splines. Each element has `numbers` raw numbers.

    Attributes:
        bins: K, 2 to 64.
        bound: the interval [-bound, bound], or (low, high).
        tails: "linear": outside the interval the spline is the identity, and its slope at both ends
            is 1. An element has K raw widths, K raw heights and the K - 1 raw slopes at the inner
            knots, 3 K - 1 numbers in this order. "circular", for angles: the identity outside too,
            but one learned slope, the first of K, serves both ends, 3 K numbers (arXiv 2002.02428).
            None: the slopes at the ends are learned, 3 K + 1 numbers, and an element outside the
            interval becomes NaN. (To raise an error, the host would have to wait for the device.)
        min_width, min_height: the least width and height of a bin, as shares of the interval.
        min_slope: the least slope at a knot.
        temperature: divides raw widths and heights. nflows divides them by the square root of its
            network's number of hidden features.
        kind: "softplus", as in the paper, nflows and normflows: a slope is min_slope +
            softplus(raw). "exp", as in zuko: raw slopes r are softly limited to +-m with
            m = -log min_slope, r / (1 + |r| / m), and raw widths and heights to +-m / 2; a slope is
            the exponential. zuko has min_width = min_height = 0.

    Raises:
        TypeError, ValueError: naming the attribute.
    """

    bins: int
    bound: float | tuple[float, float]
    tails: Tails | None = "linear"
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_slope: float = 1e-3
    temperature: float = 1.0
    kind: Kind = "softplus"

    def __post_init__(self) -> None:
        check_count("bins", self.bins, 2, MAX_BINS)
        check_choice("kind", self.kind, ("softplus", "exp"))
        if self.tails not in ("linear", "circular", None):
            raise ValueError(f"tails: expected 'linear', 'circular' or None, got {self.tails!r}")
        pair = self.bound if isinstance(self.bound, tuple) else (0.0, self.bound)
        if len(pair) != 2:
            raise ValueError(f"bound: expected a number or (low, high), got {self.bound}")
        for name, number in (
            *(("bound", value) for value in pair),
            *((n, getattr(self, n)) for n in ("min_width", "min_height")),
            ("min_slope", self.min_slope),
            ("temperature", self.temperature),
        ):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
        if not -math.inf < pair[0] < pair[1] < math.inf:
            wanted = "low < high" if isinstance(self.bound, tuple) else "a positive number"
            raise ValueError(f"bound: expected {wanted}, got {self.bound}")
        for name in ("min_width", "min_height"):
            if not 0 <= getattr(self, name) * self.bins < 1:
                raise ValueError(
                    f"{name}: expected a number from 0 to 1 / bins = {1 / self.bins:g}, "
                    f"got {getattr(self, name)}"
                )
        if not 0 < self.min_slope < 1:
            raise ValueError(f"min_slope: expected between 0 and 1, got {self.min_slope}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    @property
    def low(self) -> float:
        return self.bound[0] if isinstance(self.bound, tuple) else -self.bound

    @property
    def high(self) -> float:
        return self.bound[1] if isinstance(self.bound, tuple) else self.bound

    @property
    def numbers(self) -> int:
        """Raw numbers of an element."""
        return 3 * self.bins + {"linear": -1, "circular": 0, None: 1}[self.tails]

    @property
    def limit(self) -> float:
        """m of the kind "exp"; infinite otherwise."""
        return -math.log(self.min_slope) if self.kind == "exp" else math.inf

    @property
    def args(self) -> tuple[int, str, str, list[float]]:
        """The fields in order, for the signature of an operator."""
        sizes = [self.low, self.high, self.min_width, self.min_height]
        return (
            self.bins,
            self.tails or "none",
            self.kind,
            [*sizes, self.min_slope, self.temperature],
        )

    @property
    def identity(self) -> float:
        """The raw number that makes the identity if all raw numbers equal it.

        It gives all knots a slope of 1, and all bins one size.
        """
        return math.log(math.expm1(1 - self.min_slope)) if self.kind == "softplus" else 0.0


def make_spline(bins: int, bound: float | tuple[float, float], options: SplineOptions) -> Spline:
    """`Spline`, made once for the same arguments. Compilers do not see caches."""
    if torch.compiler.is_compiling():
        return Spline(bins, bound, **options)
    return _cached(bins, bound, *options.items())


@lru_cache(maxsize=None, typed=True)  # 8.0 is not a number of bins
def _cached(bins: int, bound: float | tuple[float, float], *options: tuple[str, Any]) -> Spline:
    return Spline(bins, bound, **dict(options))


@cache
def _spline_of(bins: int, tails: Any, kind: Any, numbers: tuple[float, ...]) -> Spline:
    low, high, min_width, min_height, min_slope, temperature = numbers
    ends = None if tails == "none" else tails
    sizes = min_width, min_height
    return Spline(bins, (low, high), ends, *sizes, min_slope, temperature, kind)


def spline_of(bins: int, tails: str, kind: str, numbers: list[float]) -> Spline:
    """The `Spline` with these `args`."""
    return _spline_of(bins, tails, kind, tuple(numbers))


def bins_ref(params: Tensor, spline: Spline) -> tuple[Tensor, Tensor, Tensor]:
    """Widths, heights (N, C, *spatial, K) and slopes (N, C, *spatial, K + 1) from raw numbers."""
    raw = params.unflatten(1, (-1, spline.numbers)).movedim(2, -1)
    raw_sizes, raw_slopes = raw.split((2 * spline.bins, spline.numbers - 2 * spline.bins), -1)
    sizes = raw_sizes.unflatten(-1, (2, spline.bins)) / spline.temperature
    sizes = (sizes / (1 + sizes.abs() * (2 / spline.limit))).softmax(-1)
    widths, heights = (
        (spline.high - spline.low) * (least + (1 - least * spline.bins) * part)
        for least, part in zip((spline.min_width, spline.min_height), sizes.unbind(-2), strict=True)
    )
    if spline.kind == "exp":
        slopes = (raw_slopes / (1 + raw_slopes.abs() / spline.limit)).exp()
    else:
        # Above the threshold, which is 20 by default, torch returns its argument.
        slopes = spline.min_slope + F.softplus(raw_slopes, threshold=50)
    if spline.tails == "linear":
        slopes = F.pad(slopes, (1, 1), value=1.0)
    elif spline.tails == "circular":
        slopes = torch.cat([slopes, slopes[..., :1]], -1)
    return widths, heights, slopes


def spline_ref(x: Tensor, params: Tensor, spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    """y and log |dy/dx|, elementwise, from x (N, C, *spatial), in the accumulator's dtype."""
    x = x.to(accumulator(x.dtype))
    widths, heights, slopes = bins_ref(params.to(x.dtype), spline)
    inside = (x >= spline.low) & (x <= spline.high)
    position = torch.where(inside, x, spline.low) - spline.low
    knots_x, knots_y = (F.pad(part.cumsum(-1)[..., :-1], (1, 0)) for part in (widths, heights))
    searched = (knots_y if inverse else knots_x)[..., 1:]
    index = (position.unsqueeze(-1) >= searched).sum(-1, keepdim=True)
    x0, y0, w, h, d0 = (
        part.gather(-1, index).squeeze(-1)
        for part in (knots_x, knots_y, widths, heights, slopes[..., :-1])
    )
    d1 = slopes[..., 1:].gather(-1, index).squeeze(-1)
    delta = h / w
    t = (position - (y0 if inverse else x0)) / (h if inverse else w)
    # Knots are rounded, so t may be outside [0, 1] by a rounding error. The gradient stays.
    t = t + (t.clamp(0, 1) - t).detach()
    if inverse:
        u, v = t, 1 - t
        tilt = d0 * v - d1 * u
        root = (tilt.square() + 4 * delta.square() * u * v).sqrt()
        rising = 2 * delta * u / (2 * delta * u + root + tilt)
        falling = (root - tilt) / (root - tilt + 2 * delta * v)
        t = torch.where(tilt < 0, falling, rising)
    s = 1 - t
    q = t * s
    below = delta * (t * t + s * s) + (d0 + d1) * q
    slant = d1 * t * t + 2 * delta * q + d0 * s * s
    y = x0 + w * t if inverse else y0 + h * (delta * t * t + d0 * q) / below
    log_slope = slant.log() + 2 * (delta / below).log()
    outside = 0.0 if spline.tails else math.nan
    return (
        torch.where(inside, spline.low + y, x + outside),
        torch.where(inside, -log_slope if inverse else log_slope, outside),
    )
