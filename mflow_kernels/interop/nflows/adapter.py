"""The adapter of nflows: the parts of its transforms, and how its composites call our kernels.

nflows' transforms go data -> latent in `forward` and latent -> data in `inverse`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import nflows.transforms as nt
import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.actnorm_initialization import per_channel, standard_deviation
from mflow_kernels.interop.adapter import Adapter, Fuser
from mflow_kernels.interop.linear import (
    Affine,
    DataInit,
    Linear,
    Listed,
    Reorder,
    SameBuffers,
    inverse_of,
    lu_linears,
    one_linear,
)
from mflow_kernels.interop.params import Params
from mflow_kernels.interop.parts import Coupling, Exactly, Part, why_not
from mflow_kernels.interop.report import Left
from mflow_kernels.interop.sequence import FusedSequence, per_sample
from mflow_kernels.interop.splines import autoregressive_parts, coupling_parts
from mflow_kernels.interop.subclasses import (
    FusedContainer,
    FusedLayers,
    accelerate_module,
    implementation_of,
    on_view,
)
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.reversible.rearrangements import SpaceToDepth

# Release 0.14, see `interop/fingerprints.py`.
FINGERPRINTS: dict[str, set[str]] = {
    "nflows.transforms.autoregressive": {"206fab392fd1"},
    "nflows.transforms.base": {"1e7189db9cca"},
    "nflows.transforms.conv": {"d25c64424048"},
    "nflows.transforms.coupling": {"95cdd65ed1f6"},
    "nflows.transforms.linear": {"4eea9c6d8259"},
    "nflows.transforms.lu": {"6461862c2d76"},
    "nflows.transforms.nonlinearities": {"1ae23a507c39"},
    "nflows.transforms.normalization": {"15a59aa508ae"},
    "nflows.transforms.permutations": {"db20ec3d915a"},
    "nflows.transforms.reshape": {"14ee2ee3508a"},
    "nflows.transforms.splines.rational_quadratic": {"d633e48678a3"},
    "nflows.transforms.standard": {"17acd0852a3f"},
}

# Linear transforms, data -> latent.


def _actnorms(modules: Sequence[Any]) -> Affine:
    log_scale = torch.stack([m.log_scale for m in modules])
    return Affine(log_scale.exp(), torch.stack([m.shift for m in modules]), log_scale.sum(1))


def _naive_linears(modules: Sequence[Any]) -> Affine:
    weight = torch.stack([m.weight() for m in modules])
    bias = torch.stack([m.bias for m in modules])
    return Affine(weight, bias, torch.stack([m.logabsdet() for m in modules]))


def _permutations(modules: Sequence[Any]) -> Affine:
    return Affine(torch.stack([m._permutation for m in modules]))


def _pointwise_affines(modules: Sequence[Any]) -> Affine:
    numbers = [t.flatten().double() for m in modules for t in (m._scale, m._shift)]
    scale, shift = torch.stack(torch.broadcast_tensors(*numbers)).unflatten(0, (-1, 2)).unbind(1)
    return Affine(scale, shift, scale.log().sum(1))


def _is_pending(layer: Any) -> bool:
    return layer.training and not bool(layer.initialized)


def _initialize_actnorm(layer: Any, x: Tensor, from_latent: bool) -> None:
    """Initialize an actnorm as nflows does, which never initializes it from samples.

    Unlike in nflows, a constant channel keeps its scale.
    """
    if from_latent:
        return
    std, constant = standard_deviation(x)
    std = torch.where(constant, 1.0, std)
    layer.log_scale.copy_(-std.log())
    layer.shift.copy_(-(per_channel(x) / std[:, None]).mean(1))
    layer.initialized.fill_(True)


# There is no `state` here, because `_is_pending` also depends on the training mode.
_DATA_INIT = DataInit(_is_pending, _initialize_actnorm)

# The parts of each transform.


def _conv(layer: Any) -> tuple[Part, ...]:
    return (Linear(layer.permutation, _permutations, "permutation"), Linear(layer, lu_linears))


def _permute(layer: Any) -> tuple[Part, ...] | str:
    if layer._dim != 1:
        return f"it permutes axis {layer._dim}, not the channels"
    return (Linear(layer, _permutations, "permutation"),)


def _coupling(layer: Any) -> tuple[Part, ...] | str:
    if layer.unconditional_transform is not None:
        return "it also transforms the features that our couplings leave alone"
    unchanged, transformed = layer.identity_features.tolist(), layer.transform_features.tolist()
    n = len(transformed)
    fits = SameBuffers(layer, "identity_features", "transform_features")
    if type(layer) is nt.AdditiveCouplingTransform:
        net = Params(layer.transform_net, None, slice(None), passing="argument")
        scale = ScaleFunction("exp", order="scale-shift")
    else:
        net = Params(layer.transform_net, slice(n, None), slice(0, n), passing="argument")
        scale = ScaleFunction("sigmoid", offset=2.0, eps=1e-3, order="scale-shift")
    coupling = Coupling(net, scale, False, Exactly(len(unchanged)), fits)
    order = (*unchanged, *transformed)
    if order == tuple(range(len(order))):
        return (coupling,)
    return (Reorder(Listed(order)), coupling, Reorder(Listed(inverse_of(order))))


def _pointwise(layer: Any) -> tuple[Part, ...] | str:
    shape = torch.broadcast_shapes(layer._shift.shape, layer._scale.shape)
    if any(n != 1 for n in shape[1:]) or (len(shape) > 1 and shape[0] == 1):
        return f"its scale of shape {tuple(shape)} is not one number a channel"
    # The scale of a vector belongs to the last axis of images.
    fits = _is_vector if len(shape) == 1 and shape[0] > 1 else None
    return (Linear(layer, _pointwise_affines, "scale and shift", fits=fits),)


def _is_vector(x: Tensor) -> bool:
    return x.dim() == 2


def _spline_coupling(layer: Any) -> tuple[Part, ...] | str:
    return coupling_parts(layer, nt.PiecewiseRationalQuadraticCDF)


def _squeeze(layer: Any) -> tuple[Part, ...] | str:
    if layer.factor != 2:
        return f"it squeezes by {layer.factor}, not by 2"
    return (SpaceToDepth(inverted=False),)


def _composite(layer: Any) -> tuple[Part, ...] | str:
    why = "our kernels do not have all of its transforms"
    parts: list[Part] = []
    for child in layer._transforms:
        if type(child) not in LAYERS:
            return why
        own = LAYERS[type(child)](child)
        channels = _channels_of(child)
        if isinstance(own, str) or (channels is not None and why_not(own, channels)):
            return why
        parts += own
    return tuple(parts)


LAYERS: dict[type, Callable[[Any], tuple[Part, ...] | str]] = {
    nt.ActNorm: one_linear(_actnorms, "actnorm", _DATA_INIT),
    nt.LULinear: one_linear(lu_linears),
    nt.NaiveLinear: one_linear(_naive_linears),
    nt.OneByOneConvolution: _conv,
    nt.Permutation: _permute,
    nt.RandomPermutation: _permute,
    nt.ReversePermutation: _permute,
    nt.AffineCouplingTransform: _coupling,
    nt.AdditiveCouplingTransform: _coupling,
    nt.PiecewiseRationalQuadraticCouplingTransform: _spline_coupling,
    nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform: autoregressive_parts,
    nt.PointwiseAffineTransform: _pointwise,
    nt.SqueezeTransform: _squeeze,
    nt.CompositeTransform: _composite,
}


def _channels_of(layer: Any) -> int | None:
    if isinstance(layer, nt.ActNorm):
        return len(layer.shift)
    if isinstance(layer, nt.Permutation):
        return len(layer._permutation)
    if isinstance(layer, nt.CompositeTransform):
        children: list[Any] = list(layer._transforms)
        if any(isinstance(m, nt.SqueezeTransform) for m in children):
            return None
        return next((n for n in map(_channels_of, children) if n is not None), None)
    features = getattr(layer, "features", None)
    return features if isinstance(features, int) else None


# Methods of nflows' composites and transforms.


class FusedTransform(FusedLayers):
    """Transforms of a composite as one transform."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(inputs, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.sequence.supports(x, inverse):
            return _apply(self.sequence, x, context, inverse)
        layers: Any = self.layers
        total = x.new_zeros(len(x))
        for layer in reversed(layers) if inverse else layers:
            x, log_det = (layer.inverse if inverse else layer)(x, context)
            total = total + log_det
        return x, total


def _apply(
    sequence: FusedSequence, x: Tensor, context: Any, inverse: bool
) -> tuple[Tensor, Tensor]:
    x, log_det = sequence(x, () if context is None else (context,), inverse=inverse)
    return x, per_sample(x, log_det)


def _transform_method(name: str, inverse: bool) -> Callable[..., Any]:
    """Return `forward` or `inverse` of a transform.

    The transform's own code runs if our kernels do not support the number of channels.
    """

    def call(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        sequence: FusedSequence = implementation_of(self)
        if not sequence.supports(inputs, inverse):
            own: tuple[Tensor, Tensor] = getattr(super(type(self), self), name)(inputs, context)
            return own
        return _apply(sequence, inputs, context, inverse)

    return call


def _actnorm_forward(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    implementation_of(self).initialize_from(inputs, inverse=False)
    # exp(s) x + b is the inverse of exp(-s) (x - b).
    return ops.actnorm_inverse(inputs, -self.shift, -self.log_scale)


def _actnorm_inverse(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    return ops.actnorm(inputs, -self.shift, -self.log_scale)


METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "transform": {
        "forward": _transform_method("forward", False),
        "inverse": _transform_method("inverse", True),
    },
    "actnorm": {"forward": _actnorm_forward, "inverse": _actnorm_inverse},
    "CompositeTransform": {
        "forward": on_view(nt.CompositeTransform.forward),
        "inverse": on_view(nt.CompositeTransform.inverse),
    },
}


class NflowsAdapter(Adapter):
    folder = "nflows"
    layers = LAYERS
    containers = (nt.CompositeTransform,)
    methods = METHODS
    fingerprints = FINGERPRINTS
    functions = dict.fromkeys(
        (
            nt.PiecewiseRationalQuadraticCouplingTransform,
            nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            nt.PiecewiseRationalQuadraticCDF,
        ),
        "nflows.transforms.splines.rational_quadratic",
    )
    channels_of = staticmethod(_channels_of)

    def is_layer(self, module: nn.Module) -> bool:
        """A composite counts as a layer if our kernels have all of its transforms."""
        if isinstance(module, nt.CompositeTransform):
            return type(module) in LAYERS and not isinstance(_composite(module), str)
        wrappers = (nt.MultiscaleCompositeTransform, nt.InverseTransform)
        return isinstance(module, nt.Transform) and not isinstance(module, wrappers)

    def kind_of(self, cls: type) -> str:
        return "actnorm" if cls is nt.ActNorm else "transform"

    def fuse(self, container: nn.Module, name: str, kind: Any, fuser: Fuser) -> None:
        if type(container) is not kind:
            why = "it is a subclass of CompositeTransform: transforms run one by one"
            fuser.left.append(Left(name, type(container).__name__, why))
            return
        transforms: Any = container._transforms
        prefix = f"{name}._transforms" if name else "_transforms"
        names = [f"{prefix}.{i}" for i in range(len(transforms))]
        before = len(fuser.replaced)
        fused = nn.ModuleList(
            members[0] if sequence is None else FusedTransform(members, sequence)
            for members, sequence in fuser.fuse_sequences(list(transforms), names)
        )
        if len(fuser.replaced) > before:
            implementation = FusedContainer(container, {"_transforms": fused})
            accelerate_module(container, self.folder, kind.__name__, implementation)

    def notes(self, modules: Sequence[nn.Module]) -> list[str]:
        notes = []
        if any(isinstance(m, nt.ActNorm) for m in modules):
            notes.append(
                "ActNorm keeps the scale of a channel that is constant in its first batch; nflows' "
                "turns to NaN."
            )
        transforms = [m for m in modules if isinstance(m, nt.Transform)]
        if any(getattr(m, "tails", "linear") is None for m in transforms):
            notes.append(
                "A spline of [0, 1] returns NaN for an element outside; nflows raises an error."
            )
        if any(isinstance(m, nt.NaiveLinear) for m in modules):
            notes.append(
                "NaiveLinear has an inverse; nflows' calls torch.solve, which torch has removed."
            )
        return notes


ADAPTER = NflowsAdapter()
