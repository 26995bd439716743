"""The adapter of zuko: the rational-quadratic splines of its lazy transforms.

zuko's transforms go data -> latent. At each call a lazy transform builds one, and `Splines` takes
the place of that one. Networks, bases, and the passes of an autoregressive inverse stay zuko's.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import zuko.transforms as zt
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.lazy import LazyComposedTransform, LazyInverse, LazyTransform
from zuko.utils import broadcast

from mflow_kernels.interop.adapter import Adapter, PartsOf
from mflow_kernels.interop.linear import constant, inverse_of
from mflow_kernels.interop.parts import Elementwise, Part
from mflow_kernels.interop.splines import AutoregressiveSplines
from mflow_kernels.interop.subclasses import implementation_of
from mflow_kernels.ops.rational_quadratic import apply_spline, check_numbers
from mflow_kernels.ops.spline import Spline

# Releases 1.3 to 1.6, see `interop/fingerprints.py`.
FINGERPRINTS: dict[str, set[str]] = {
    "zuko.flows.autoregressive": {"a3e9a54da22d", "ec78251f6609", "df8dd5876135", "00c36cb4174b"},
    "zuko.flows.coupling": {"4943ee8697d0", "c3039fb697bd", "d5d75986cb53", "21ec813434d5"},
    "zuko.flows.gaussianization": {"323f543f691d", "b50615e023d3", "ce9a34bf6d49"},
    "zuko.lazy": {"f4661826d3cc", "3588eda33835", "9a4302a7dca7"},
    "zuko.transforms": {"174151ff02a4", "18da7f062dd2", "ce08ad3dfbea", "7390b3400b87"},
}

_DEFAULTS = inspect.signature(zt.MonotonicRQSTransform).parameters


def _parts(what: str, layer: Any) -> tuple[Part, ...] | str:
    univariate: Any = layer.univariate
    shapes = [tuple(shape) for shape in layer.shapes]
    options: dict[str, Any] = {}
    if isinstance(univariate, partial) and not univariate.args:
        univariate, options = univariate.func, univariate.keywords
    if univariate is not zt.MonotonicRQSTransform:
        return "its univariate transformation is not MonotonicRQSTransform"
    bins = shapes[0][0] if shapes and shapes[0] else 0
    if not options.keys() <= {"bound", "slope"} or shapes != [(bins,), (bins,), (bins - 1,)]:
        return f"our splines do not allow its shapes {shapes} or options {sorted(options)}"
    try:
        bound, slope = (options.get(name, _DEFAULTS[name].default) for name in ("bound", "slope"))
        spline = Spline(bins, bound, "linear", 0.0, 0.0, slope, 1.0, "exp")
    except (TypeError, ValueError) as error:
        return f"our splines do not allow its {error}"
    net = getattr(layer, "hyper", nn.Identity())
    return (Elementwise(AutoregressiveSplines(net, spline), what),)


class Splines(Transform):
    """`MonotonicRQSTransform` of all features but the first `kept`, as one operator.

    It takes the place of zuko's `DependentTransform` and of its `CouplingTransform`. States are
    (*, D); their batch and that of the params broadcast.

    Args:
        params: maps the first `kept` features to (*, (D - kept) * numbers).
        order: the features in the order of the operator; None if they are in order.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        spline: Spline,
        params: Callable[[Tensor], Tensor],
        kept: int = 0,
        order: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.spline, self.params, self.kept, self.order = spline, params, kept, order

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.order is not None:
            x = x.index_select(-1, constant(self.order, x.device))
        phi = self.params(x[..., : self.kept])
        batch = None
        if x.shape[:-1] != phi.shape[:-1] or x.dim() != 2:
            batch = torch.broadcast_shapes(x.shape[:-1], phi.shape[:-1])
            x, phi = (t.expand(*batch, -1).reshape(-1, t.shape[-1]) for t in (x, phi))
        phi = check_numbers(x, phi, self.spline, self.kept)
        y, ladj = apply_spline(x, phi, self.spline, self.kept, inverse)
        if self.order is not None:
            y = y.index_select(-1, constant(inverse_of(self.order), y.device))
        return (y, ladj) if batch is None else (y.view(*batch, -1), ladj.view(batch))

    def _call(self, x: Tensor) -> Tensor:
        return self._run(x, False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._run(y, True)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, False)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(x, False)[1]


def _spline_of(layer: nn.Module) -> Spline:
    (part,) = implementation_of(layer).parts
    spline: Spline = part.layer.spline
    return spline


def _params(layer: Any, c: Tensor | None, x: Tensor) -> Tensor:
    if c is not None:
        x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
    params: Tensor = layer.hyper(x)
    return params


def _given(params: Tensor, _: Tensor) -> Tensor:
    return params


def _autoregressive(self: Any, c: Tensor | None, x: Tensor) -> Splines:
    return Splines(_spline_of(self), partial(_given, _params(self, c, x)))


def _coupling(self: Any, c: Tensor | None = None) -> Splines:
    kept, order = _kept_first(tuple(self.mask.tolist()))  # a checkpoint may bring another mask
    return Splines(_spline_of(self), partial(_params, self, c), kept, order)


@cache
def _kept_first(mask: tuple[bool, ...]) -> tuple[int, tuple[int, ...] | None]:
    """Return the number of unchanged features, and the order that puts them first; None for the
    order that they have already."""
    order = sorted(range(len(mask)), key=lambda i: not mask[i])
    return sum(mask), None if order == list(range(len(mask))) else tuple(order)


def _elementwise(self: Any, c: Tensor | None = None) -> Splines:
    params = torch.cat(list(self.phi), dim=-1).flatten() if c is None else self.hyper(c)
    return Splines(_spline_of(self), partial(_given, params))


_WHAT = {
    MaskedAutoregressiveTransform: "autoregressive spline",
    GeneralCouplingTransform: "spline coupling",
    ElementWiseTransform: "elementwise spline",
}
_LAYERS: dict[type, PartsOf] = {cls: partial(_parts, what) for cls, what in _WHAT.items()}
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "autoregressive spline": {"meta": _autoregressive},
    "spline coupling": {"forward": _coupling},
    "elementwise spline": {"forward": _elementwise},
}


class ZukoAdapter(Adapter):
    folder = "zuko"
    layers = _LAYERS
    containers = ()
    methods = METHODS
    kinds = _WHAT
    fingerprints = FINGERPRINTS
    functions = dict.fromkeys(_WHAT, "zuko.transforms")

    def is_layer(self, module: nn.Module) -> bool:
        containers = (LazyComposedTransform, LazyInverse)
        return isinstance(module, LazyTransform) and not isinstance(module, containers)


ADAPTER = ZukoAdapter()
