"""The adapter of zuko: the rational-quadratic splines of its lazy transforms.

zuko's transforms go data -> latent. At each call a lazy transform builds one from the params of all
features, which its network returns; `Splines` takes the place of that one. Networks, bases, and the
passes of an autoregressive inverse stay those of zuko.
"""

import inspect
from collections.abc import Callable
from functools import partial
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

from mflow_kernels.interop.adapter import Adapter
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


def _parts(layer: Any) -> tuple[Part, ...] | str:
    univariate, shapes = layer.univariate, [tuple(shape) for shape in layer.shapes]
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
    net = getattr(layer, "hyper", None) or nn.Identity()
    return (Elementwise(AutoregressiveSplines(net, spline), _WHAT[type(layer)]),)


class Splines(Transform):
    """`DependentTransform(MonotonicRQSTransform(...), 1)` as one operator.

    Args:
        phi: (*, D * numbers), the params of D features; x is (*, D), and batches broadcast.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, phi: Tensor, spline: Spline) -> None:
        super().__init__()
        self.phi, self.spline = phi, spline

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        batch = torch.broadcast_shapes(x.shape[:-1], self.phi.shape[:-1])
        x, phi = (t.expand(*batch, -1).reshape(-1, t.shape[-1]) for t in (x, self.phi))
        y, ladj = apply_spline(x, check_numbers(x, phi, self.spline, 0), self.spline, 0, inverse)
        return y.view(*batch, -1), ladj.view(batch)

    def _call(self, x: Tensor) -> Tensor:
        return self._run(x, False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._run(y, True)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, False)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(x, False)[1]


def _splines(self: Any, phi: Tensor) -> Splines:
    part: Any = implementation_of(self).parts[0]
    return Splines(phi, part.layer.spline)


def _meta(self: Any, c: Tensor | None, x: Tensor) -> Splines:
    if c is not None:
        x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
    return _splines(self, self.hyper(x))


def _elementwise(self: Any, c: Tensor | None = None) -> Splines:
    if c is None:
        return _splines(self, torch.cat(list(self.phi), dim=-1).flatten())
    return _splines(self, self.hyper(c))


_WHAT = {
    MaskedAutoregressiveTransform: "autoregressive spline",
    GeneralCouplingTransform: "spline coupling",
    ElementWiseTransform: "elementwise spline",
}
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "meta": {"meta": _meta},
    "elementwise": {"forward": _elementwise},
}


class ZukoAdapter(Adapter):
    folder = "zuko"
    layers = dict.fromkeys(_WHAT, _parts)
    containers = ()
    methods = METHODS
    fingerprints = FINGERPRINTS
    functions = dict.fromkeys(_WHAT, "zuko.transforms")

    def is_layer(self, module: nn.Module) -> bool:
        containers = (LazyComposedTransform, LazyInverse)
        return isinstance(module, LazyTransform) and not isinstance(module, containers)

    def kind_of(self, cls: type) -> str:
        return "elementwise" if cls is ElementWiseTransform else "meta"


ADAPTER = ZukoAdapter()
