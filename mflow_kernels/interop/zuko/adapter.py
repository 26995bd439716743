"""The adapter of zuko: autoregressive transforms, and rational-quadratic splines.

zuko's transforms go data -> latent. At each call a lazy transform builds one, and `Mapped` takes
the place of that one. Bases, and the networks of couplings, stay zuko's.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import zuko.nn
import zuko.transforms as zt
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import LazyComposedTransform, LazyInverse, LazyTransform
from zuko.utils import broadcast

from mflow_kernels.interop.adapter import Adapter, PartsOf
from mflow_kernels.interop.autoregressive import Autoregressive
from mflow_kernels.interop.fingerprints import source_fingerprint
from mflow_kernels.interop.linear import constant
from mflow_kernels.interop.masked_networks import Extra, Network, Operations, Planar
from mflow_kernels.interop.orders import inverse_of
from mflow_kernels.interop.parts import Elementwise, Part
from mflow_kernels.interop.splines import SplineMap
from mflow_kernels.interop.subclasses import implementation_of
from mflow_kernels.ops.masked_network import Activation, Add, AddContext, Linear
from mflow_kernels.ops.rational_quadratic import apply_spline, check_numbers
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import Spline

# Releases 1.3 to 1.6, see `interop/fingerprints.py`.
FINGERPRINTS: dict[str, set[str]] = {
    "zuko.flows.autoregressive": {"a3e9a54da22d", "ec78251f6609", "df8dd5876135", "00c36cb4174b"},
    "zuko.flows.coupling": {"4943ee8697d0", "c3039fb697bd", "d5d75986cb53", "21ec813434d5"},
    "zuko.flows.gaussianization": {"323f543f691d", "b50615e023d3", "ce9a34bf6d49"},
    "zuko.flows.spline": {"231f394dcb57", "e4821cb76bf2", "6e6b12fad487"},
    "zuko.lazy": {"f4661826d3cc", "3588eda33835", "9a4302a7dca7"},
    "zuko.nn": {"bea7b0d8d9d1", "30ddca2f1bf3", "237f5ca19bd7"},
    "zuko.transforms": {"174151ff02a4", "18da7f062dd2", "ce08ad3dfbea", "7390b3400b87"},
}

Order = tuple[int, ...] | None


class MaskedMLP(Network):
    """zuko's masked network, which reads the features and the context in one vector."""

    features: int

    def __init__(self, net: nn.Module, features: int, finish: Extra | None) -> None:
        self.features = features
        super().__init__(net, finish)

    def is_known(self) -> bool:
        return type(self.net) is zuko.nn.MaskedMLP

    def call(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.net(torch.cat((x, *context), dim=1))

    def read(self, made: Operations, contexts: int) -> None:
        net: Any = self.net
        layers: list[Any] = list(net)
        for layer in layers:
            if layer is layers[0] and contexts:
                weight, mask = (t[:, : self.features] for t in (layer.weight, layer.mask))
                made.only_reads = False
                made.put(Linear, weight, mask, layer.bias)
                made.put(AddContext, 0)
            elif type(layer) is zuko.nn.Residual:
                start = len(made)
                for inner in layer:
                    _read(made, inner)
                made.put(Add, start)
            else:
                _read(made, layer)

    def contexts(self, *context: Tensor) -> list[Tensor]:
        if not context:
            return []
        net: Any = self.net
        first = net[0]
        return [F.linear(context[0], (first.mask * first.weight)[:, self.features :])]


def _read(made: Operations, layer: nn.Module) -> None:
    if type(layer) is zuko.nn.MaskedLinear:
        made.linear(layer)
    else:
        made.activate(layer)


class Angles:
    """zuko's `CircularShiftTransform` of the data: angles in [-pi, pi), turned by pi."""

    def enter(self, x: Tensor, latent: bool) -> Tensor:
        return x if latent else torch.remainder(x, 2 * math.pi) - math.pi

    leave = enter

    def start(self, made: Operations, x: Tensor) -> None:
        made.put(Activation, "wrap", math.pi)


def _parts(what: str, layer: Any) -> tuple[Part, ...] | str:
    univariate: Any = layer.univariate
    options: dict[str, Any] = {}
    if isinstance(univariate, partial) and not univariate.args:
        univariate, options = univariate.func, univariate.keywords
    transform = _transform(univariate, [tuple(shape) for shape in layer.shapes], options)
    if isinstance(transform, str):
        return transform
    if not isinstance(layer, MaskedAutoregressiveTransform):
        if isinstance(transform, ScaleFunction) or univariate is not zt.MonotonicRQSTransform:
            return "its univariate transformation is not MonotonicRQSTransform"
        net = getattr(layer, "hyper", nn.Identity())
        return (Elementwise(SplineMap(net, transform, 0), what),)
    affine = isinstance(transform, ScaleFunction)
    hyper: Any = layer.hyper
    features = len(hyper[-1].weight) // layer.total
    net = MaskedMLP(hyper, features, Planar(features, 1) if affine else None)
    if net.why and affine:
        return f"{net.why}, so it would not be faster"
    at = Angles() if univariate is CircularRQSTransform else None
    what = "autoregressive affine map" if affine else what
    return (Elementwise(Autoregressive(net, transform, at), what),)


def _transform(
    univariate: Any, shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> Spline | ScaleFunction | str:
    """Our form of a univariate transformation, or why there is none."""
    circular = univariate is CircularRQSTransform
    module = "zuko.flows.spline"
    if circular and source_fingerprint(module) not in FINGERPRINTS[module]:
        return f"the source of {module} is not that of a tested version"
    slope = options.get("slope") or _default(univariate, "slope")
    if univariate is zt.MonotonicAffineTransform and shapes == [(), ()]:
        if options.keys() <= {"slope"} and 0 < slope < 1:
            return ScaleFunction("softsign", clamp=-math.log(slope), order="scale-shift")
        return f"our affine maps do not allow its options {sorted(options)}"
    if univariate is not zt.MonotonicRQSTransform and not circular:
        return "its univariate transformation is not MonotonicRQSTransform"
    bins = shapes[0][0] if shapes and shapes[0] else 0
    allowed = {"slope"} if circular else {"bound", "slope"}
    if not options.keys() <= allowed or shapes != [(bins,), (bins,), (bins - 1,)]:
        return f"our splines do not allow its shapes {shapes} or options {sorted(options)}"
    try:
        bound = math.pi if circular else options.get("bound") or _default(univariate, "bound")
        return Spline(bins, bound, "linear", 0.0, 0.0, slope, 1.0, "exp")
    except (TypeError, ValueError) as error:
        return f"our splines do not allow its {error}"


def _default(univariate: Any, name: str) -> Any:
    found = inspect.signature(univariate).parameters.get(name)
    return (found or inspect.signature(zt.MonotonicRQSTransform).parameters[name]).default


Run = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


class Mapped(Transform):
    """A map of vectors (*, D), in place of zuko's transforms that compute it.

    Args:
        run: returns the image of a state and the log-determinant. The second argument says whether
            it is the inverse that is computed.
        inverted: whether this is the inverse.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, run: Run, inverted: bool = False) -> None:
        super().__init__()
        self.run, self.inverted = run, inverted

    @property
    def inv(self) -> "Mapped":
        return Mapped(self.run, not self.inverted)

    def _call(self, x: Tensor) -> Tensor:
        return self.run(x, self.inverted)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.run(y, not self.inverted)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(x, self.inverted)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(x, self.inverted)[1]


def _vectors(
    x: Tensor, other: Tensor | None, run: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Call `run` with matrices: a state (*, D) and params or a context, whose batches broadcast."""
    if other is None:
        return _vectors(x, x[..., :0], lambda x, _: run(x))
    if x.dim() == 2 and x.shape[:-1] == other.shape[:-1]:
        return run(x, other)
    batch = torch.broadcast_shapes(x.shape[:-1], other.shape[:-1])
    x, other = (t.expand(*batch, -1).reshape(batch.numel(), t.shape[-1]) for t in (x, other))
    y, ladj = run(x, other)
    return y.view(*batch, -1), ladj.view(batch)


def _layer_of(module: nn.Module) -> Any:
    (part,) = implementation_of(module).parts
    return part.layer


def _splines(
    layer: Any, params: Callable[[Tensor], Tensor], kept: int = 0, order: Order = None
) -> Mapped:
    """Splines of all features but the first `kept`.

    Args:
        params: maps the first `kept` features to (*, (D - kept) * numbers).
        order: the features in the order of the operator; None if they are in order.
    """
    spline: Spline = layer.spline

    def run(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if order is not None:
            x = x.index_select(-1, constant(order, x.device))

        def of(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            params = check_numbers(x, params, spline, kept)
            return apply_spline(x, params, spline, kept, inverse)

        y, ladj = _vectors(x, params(x[..., :kept]), of)
        if order is not None:
            y = y.index_select(-1, constant(inverse_of(order), y.device))
        return y, ladj

    return Mapped(run)


def _autoregressive(self: Any, c: Tensor | None = None) -> Mapped:
    layer: Autoregressive = _layer_of(self)
    return Mapped(lambda x, inverse: _vectors(x, c, layer.inverse if inverse else layer.forward))


def _params(layer: Any, c: Tensor | None, x: Tensor) -> Tensor:
    if c is not None:
        x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
    params: Tensor = layer.hyper(x)
    return params


def _coupling(self: Any, c: Tensor | None = None) -> Mapped:
    kept, order = _kept_first(tuple(self.mask.tolist()))  # a checkpoint may bring another mask
    return _splines(_layer_of(self), partial(_params, self, c), kept, order)


@cache
def _kept_first(mask: tuple[bool, ...]) -> tuple[int, Order]:
    """Return the number of unchanged features, and the order that puts them first; None for the
    order that they have already."""
    order = sorted(range(len(mask)), key=lambda i: not mask[i])
    return sum(mask), None if order == list(range(len(mask))) else tuple(order)


def _elementwise(self: Any, c: Tensor | None = None) -> Mapped:
    params = torch.cat(list(self.phi), dim=-1).flatten() if c is None else self.hyper(c)
    return _splines(_layer_of(self), lambda _: params)


_WHAT = {
    MaskedAutoregressiveTransform: "autoregressive spline",
    GeneralCouplingTransform: "spline coupling",
    ElementWiseTransform: "elementwise spline",
}
_LAYERS: dict[type, PartsOf] = {cls: partial(_parts, what) for cls, what in _WHAT.items()}
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "autoregressive spline": {"forward": _autoregressive},
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
