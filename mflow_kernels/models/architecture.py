"""A model's architecture as plain data, and a model from such data.

The description of an object is a dictionary with the name of its class and the arguments of its
constructor, which may be descriptions too. `KINDS` has one row for each class that can be
described; a class without a row is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mflow_kernels.layers import (
    ActNorm,
    AffineCoupling,
    FlowStep,
    InvertibleConv1x1,
    MaskedAutoregressive,
    Permutation,
    PixelPairs,
    ReversibleChain,
    SplineCoupling,
    Split,
    Squeeze,
    Unsqueeze,
)
from mflow_kernels.layers.networks import CouplingNetwork, coupling_net, has_hooks
from mflow_kernels.models.glow import Glow, VectorFlow
from mflow_kernels.models.hierarchy import HierarchicalFlow
from mflow_kernels.models.jet import Jet
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.mixture import GaussianMixture
from mflow_kernels.models.objectives import ManifoldObjective
from mflow_kernels.models.penalty_weight import ErrorBound, WeightSchedule
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import Spline

Read = Callable[[Any], Any]


class Kind(NamedTuple):
    """A class that can be described.

    Attributes:
        type: the class.
        make: builds an object from the arguments.
        arguments: how to read each argument from an object.
    """

    type: type
    make: Callable[..., Any]
    arguments: Mapping[str, Read]


def _kind(
    cls: type, names: str = "", make: Callable[..., Any] | None = None, /, **others: str | Read
) -> Kind:
    """A row of `KINDS`.

    Args:
        names: the arguments that are attributes of the same name.
        others: how to read the others; a string names an attribute, with dots for attributes of
            attributes.
    """
    reads = dict(zip(names.split(), names.split(), strict=True)) | others
    how = {n: attrgetter(a) if isinstance(a, str) else a for n, a in reads.items()}
    return Kind(cls, make or cls, how)


def _context_channels(flow: Glow | VectorFlow) -> int:
    if flow.context_channels is None:
        raise TypeError("network: expected built-in networks, got some of your own")
    return flow.context_channels


def _layer(net: Any, name: str) -> Any:
    """The layer of this name in a network that `coupling_net` built."""
    found = net._modules.get(name)
    if len(net) != 5 or not isinstance(getattr(found, "weight", None), Tensor):
        raise TypeError("net: expected the layers that coupling_net builds")
    return found


def _manifold_flow(
    flow: Any, manifold_dim: int, objective: ManifoldObjective, prior: GaussianMixture | None = None
) -> ManifoldFlow:
    if type(manifold_dim) is int and manifold_dim == 0:
        none = torch.zeros((), dtype=torch.bool, device="cpu")
        mask = tuple(none.expand(shape) for shape in flow.latent_shapes)
        return ManifoldFlow(flow, mask=mask, objective=objective)
    return ManifoldFlow(flow, manifold_dim, objective=objective, prior=prior)


_STORED = {name: f"chain.{name}" for name in ("reversible", "checkpoint_every")}
_FLOW: dict[str, Any] = {"context_channels": _context_channels, **_STORED}


def _spline(bound: float | list[float], **options: Any) -> Spline:
    return Spline(bound=tuple(bound) if isinstance(bound, list) else bound, **options)  # type: ignore[arg-type]


def _masked_autoregressive(
    features: int, transform: ScaleFunction | Spline, **options: Any
) -> MaskedAutoregressive:
    if isinstance(transform, Spline):
        fields = {f.name: getattr(transform, f.name) for f in dataclasses.fields(Spline)}
        return MaskedAutoregressive(features, "spline", **fields, **options)
    return MaskedAutoregressive(features, scale=transform, **options)


def _spline_coupling(
    channels: int, net: Any, bound: float | list[float], **options: Any
) -> SplineCoupling:
    interval = tuple(bound) if isinstance(bound, list) else bound
    return SplineCoupling(channels, net, bound=interval, **options)  # type: ignore[arg-type]


def _of_prior(name: str, default: Any) -> Read:
    """An attribute of a split's coupling, if it has one."""
    return lambda split: default if split.coupling is None else getattr(split.coupling, name)


KINDS = {
    kind.type.__name__: kind
    for kind in (
        _kind(Glow, "levels steps width coupling bins scale", image_shape="input_shape", **_FLOW),
        _kind(
            VectorFlow,
            "steps width coupling bins scale autoregressive",
            dim=lambda flow: flow.input_shape[0],
            **_FLOW,
        ),
        # The state dict has the orders of the channels, so the seed is not needed.
        _kind(
            Jet,
            "patch couplings depth width heads scale context_channels",
            image_shape="input_shape",
            **_STORED,
        ),
        _kind(ReversibleChain, "layers reversible checkpoint_every input_shape masked"),
        _kind(ManifoldFlow, "flow manifold_dim objective prior", _manifold_flow),
        _kind(GaussianMixture, "dim components"),
        _kind(HierarchicalFlow, "stages"),
        _kind(ActNorm, channels=lambda layer: len(layer.bias)),
        _kind(InvertibleConv1x1, "channels n_split"),
        _kind(AffineCoupling, "channels net scale"),
        _kind(
            SplineCoupling,
            "channels net",
            _spline_coupling,
            **{field.name: f"spline.{field.name}" for field in dataclasses.fields(Spline)},
        ),
        _kind(
            MaskedAutoregressive,
            "transform",
            _masked_autoregressive,
            features="channels",
            order="order",
            **{name: f"net.{name}" for name in ("width", "depth", "residual", "activation")},
            context_channels="net.context_channels",
        ),
        _kind(
            FlowStep,
            "channels",
            net="coupling.net",
            coupling=lambda step: "spline" if hasattr(step.coupling, "spline") else "affine",
            bins=lambda step: step.coupling.spline.bins if hasattr(step.coupling, "spline") else 8,
            scale=lambda step: getattr(step.coupling, "scale", "tanh"),
        ),
        _kind(
            Split,
            "channels kept",
            net=_of_prior("net", None),
            scale=_of_prior("scale", "tanh"),
            prior=lambda split: split.coupling is not None,
        ),
        _kind(Squeeze),
        _kind(Unsqueeze),
        _kind(PixelPairs, "by inverted"),
        _kind(Permutation, "axis", index=lambda layer: layer.index.tolist()),
        _kind(
            CouplingNetwork,
            "context_channels",
            coupling_net,
            in_channels=lambda net: _layer(net, "0").weight.shape[1] - net.context_channels,
            out_channels=lambda net: len(_layer(net, "4").weight),
            width=lambda net: len(_layer(net, "0").weight),
            spatial_dims=lambda net: _layer(net, "0").weight.dim() - 2,
        ),
        _kind(ManifoldObjective, "domain rho weight delta sigma"),
        _kind(WeightSchedule, "start end steps"),
        _kind(ErrorBound, "error start"),
        _kind(ScaleFunction, "kind offset eps clamp order"),
        _kind(Spline, " ".join(field.name for field in dataclasses.fields(Spline)), _spline),
    )
}
# Arguments that the files of earlier versions lack, with the values that these versions used.
_ADDED_LATER: dict[str, dict[str, Any]] = {
    "ManifoldFlow": {"prior": None},
    "VectorFlow": {"autoregressive": False},
    "ReversibleChain": {"masked": False},
    "InvertibleConv1x1": {"n_split": None},
}
# The arguments whose product is the number of a flow's steps or blocks.
_DEPTHS = {
    "Glow": ("steps", "levels"), "VectorFlow": ("steps",), "Jet": ("couplings", "depth"),
}  # fmt: skip
_MODELS = ("Glow", "Jet", "VectorFlow", "ReversibleChain", "ManifoldFlow", "HierarchicalFlow")
# Attributes that do not change what a model computes, or that are stored beside the architecture.
_STATE = frozenset(["training", "drift", "was_set", "actnorms_checked", "images_checked"])
_STATE |= {"n_bits", "crop", "class_names"}
_PLAIN = (bool, int, float, str, tuple, type(None), ScaleFunction, Spline)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the description of a model, from which `build` builds one that computes the same.

    Raises:
        TypeError: a part of the model is not one that its constructor builds: a class without a
            row in `KINDS`, a network of the caller, a replaced activation, a hook, tensors that
            two layers share, or a map of weights. The message names the part.
    """
    if type(model).__name__ not in _MODELS:
        expected = ", ".join(_MODELS)
        raise _refusal(f"model: expected one of {expected}, got {type(model).__name__}")
    description = _describe(model, "")
    _check_untied(model)
    rebuilt = build_empty(description, dtype_of(model))
    _check_same(model, rebuilt)
    return description


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's numbers, its parameters and buffers."""
    dtypes = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    if len(dtypes) != 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "none"
        raise _refusal(f"model: expected numbers of one dtype, got {names}")
    return dtypes.pop()


def build(description: Any) -> Any:
    """Build the object of a description, with new random weights.

    Raises:
        ValueError, TypeError: the description lacks an argument or has an unknown one, or a
            constructor does not accept a value.
    """
    if isinstance(description, list):
        return [build(value) for value in description]
    if not isinstance(description, Mapping):
        return description
    name = description.get("class")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"class: expected one of {', '.join(KINDS)}, got {name!r}")
    arguments = {n: value for n, value in description.items() if n != "class"}
    arguments = _ADDED_LATER.get(name, {}) | arguments  # type: ignore[arg-type]
    if arguments.keys() != kind.arguments.keys():
        expected, actual = (", ".join(sorted(names)) for names in (kind.arguments, arguments))
        raise ValueError(f"{name}: expected the arguments {expected}, got {actual}")
    return kind.make(**{n: build(value) for n, value in arguments.items()})


def build_empty(description: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model on the device "meta": its tensors have shapes, and use no memory.

    The caller's default device and dtype, and the global generator, play no part.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("meta"):
            model = build(description)
    finally:
        torch.set_default_dtype(before)
    if type(model).__name__ not in _MODELS:
        raise ValueError(f"class: expected one of {', '.join(_MODELS)}")
    return model.to(dtype)


def check_size(description: Any, tensors: int, numbers: int) -> None:
    """Refuse a description whose model would take hours or much memory to build.

    Args:
        tensors: number of tensors that were stored with it; each step of flow has some.
        numbers: number of their elements; a manifold flow has a mask of its data's dimensions.
    """
    depth = 0
    found = [description]
    while found:
        node = found.pop()
        if isinstance(node, list):
            found += node
        if not isinstance(node, Mapping):
            continue
        found += node.values()
        counted = _DEPTHS.get(str(node.get("class")), ())
        if counted:
            counts = [node.get(name, 1) for name in counted]
            depth += math.prod(c for c in counts if isinstance(c, int))
        flow = node.get("flow")
        if node.get("class") == "ManifoldFlow" and isinstance(flow, Mapping):
            shape = flow.get("image_shape") or flow.get("input_shape") or [flow.get("dim")]
            sides = shape if isinstance(shape, list) else [shape]
            if math.prod(side for side in sides if isinstance(side, int)) > numbers:
                raise ValueError("expected no more dimensions than the weights have numbers")
    if depth > tensors:
        raise ValueError("expected no more steps than there are tensors")


def _describe(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if any(isinstance(v, Tensor) for v in (value if isinstance(value, tuple) else (value,))):
        raise _refusal(f"{path}: expected a weight that is no map")
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [_describe(each, f"{path}[{i}]") for i, each in enumerate(value)]
    name = type(value).__name__
    kind = KINDS.get(name)
    if kind is None or kind.type is not type(value):
        module = isinstance(value, nn.Module)
        expected = "a network that coupling_net builds" if path.endswith("net") else None
        expected = expected or ("a class of mflow_kernels" if module else "plain data")
        raise _refusal(f"{path}: expected {expected}, got {name}")
    description = {"class": name}
    for argument, read in kind.arguments.items():
        try:
            found = read(value)
        except TypeError as error:
            raise _refusal(f"{path}.{error}".lstrip(".")) from None
        description[argument] = _describe(found, f"{path}.{argument}".lstrip("."))
    return description


def _check_untied(model: nn.Module) -> None:
    """Raise TypeError if two names of the model's state stand for the same memory."""
    names: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        first = names.setdefault(tensor.data_ptr(), name)
        if first != name and tensor.numel():
            raise _refusal(f"{name}: expected a tensor of its own, but it is that of {first}")


def _check_same(model: nn.Module, rebuilt: nn.Module) -> None:
    """Raise TypeError unless both models have the same modules with the same plain attributes."""
    own, expected = dict(model.named_modules()), dict(rebuilt.named_modules())
    for name in {**expected, **own}:
        module, wanted = own.get(name), expected.get(name)
        kinds = [type(m).__name__ if m is not None else "nothing" for m in (wanted, module)]
        if module is None or wanted is None or type(module) is not type(wanted):
            raise _refusal(f"{name}: expected {kinds[0]}, got {kinds[1]}")
        path = name or kinds[0]
        if has_hooks(module):
            raise _refusal(f"{path}: expected no hooks")
        if "forward" in vars(module):
            raise _refusal(f"{path}: expected the forward of {kinds[0]}, got another")
        for attribute, value in vars(wanted).items():
            if attribute.startswith("_") or attribute in _STATE or not isinstance(value, _PLAIN):
                continue
            actual = getattr(module, attribute, None)
            if actual != value:
                raise _refusal(f"{path}.{attribute}: expected {value}, got {actual}")
    tensors, stored = rebuilt.state_dict(), model.state_dict()
    for name in {**tensors, **stored}:
        shapes = [
            (tuple(s[name].shape), s[name].dtype) if name in s else None for s in (tensors, stored)
        ]
        if shapes[0] != shapes[1]:
            raise _refusal(f"{name}: expected {shapes[0]}, got {shapes[1]}")


def _refusal(message: str) -> TypeError:
    return TypeError(f"{message}; save the state_dict of other models")
