"""The parts of nflows' transforms, and of those that other packages copy from it.

nflows' transforms go data -> latent in `forward` and latent -> data in `inverse`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.interop import autoregressive
from mflow_kernels.interop.actnorm_initialization import per_channel, standard_deviation
from mflow_kernels.interop.adapter import PartsOf
from mflow_kernels.interop.linear import (
    Affine,
    DataInit,
    Linear,
    Reorder,
    lu_linears,
    one_linear,
    permutation,
)
from mflow_kernels.interop.masked_networks import MadeKinds
from mflow_kernels.interop.orders import Listed, SameBuffers, inverse_of
from mflow_kernels.interop.params import Params
from mflow_kernels.interop.parts import Coupling, Exactly, Part, why_not
from mflow_kernels.interop.splines import coupling_parts
from mflow_kernels.ops.scale import ScaleFunction, log_scale_ref
from mflow_kernels.reversible.rearrangements import SpaceToDepth

# Linear transforms, data -> latent.


def _actnorms(modules: Sequence[Any]) -> Affine:
    log_scale = torch.stack([m.log_scale for m in modules])
    return Affine(log_scale.exp(), torch.stack([m.shift for m in modules]), log_scale.sum(1))


def _naive_linears(modules: Sequence[Any]) -> Affine:
    weight = torch.stack([m.weight() for m in modules])
    bias = torch.stack([m.bias for m in modules])
    return Affine(weight, bias, torch.stack([m.logabsdet() for m in modules]))


def _pointwise_affines(modules: Sequence[Any]) -> Affine:
    numbers = [t.flatten().double() for m in modules for t in (m._scale, m._shift)]
    scale, shift = torch.stack(torch.broadcast_tensors(*numbers)).unflatten(0, (-1, 2)).unbind(1)
    return Affine(scale, shift, scale.abs().log().sum(1))


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


def _done(layer: Any) -> Tensor:
    return layer.initialized


_DATA_INIT = DataInit(_is_pending, _initialize_actnorm, _done)

# The parts of each transform.


def _conv(layer: Any) -> tuple[Part, ...]:
    return (permutation(layer.permutation, "_permutation"), Linear(layer, lu_linears))


def _permute(layer: Any) -> tuple[Part, ...] | str:
    if layer._dim != 1:
        return f"it permutes axis {layer._dim}, not the channels"
    return (permutation(layer, "_permutation"),)


# Scale functions of `AffineCouplingTransform`. Release 0.14 has the first one only.
_SCALES = (
    ScaleFunction("sigmoid", offset=2.0, eps=1e-3, order="scale-shift"),
    ScaleFunction("softplus", eps=1e-3, clamp=math.log(3.0), order="scale-shift"),
)
_PROBE = torch.linspace(-6, 6, 97, dtype=torch.float64)


def _scale_of(layer: Any) -> tuple[ScaleFunction, float] | None:
    """Return the scale function of an affine coupling and the factor of its raw scale."""
    activation = getattr(layer, "scale_activation", None)
    if activation is None:
        return _SCALES[0], 1.0
    try:
        log_s = activation(_PROBE).log()
    except Exception:  # a user's function may raise anything; the layer is left and reported
        return None
    clamp = float(log_s[-1] / math.tanh(_PROBE[-1].item() / 2))  # glasflow's exp(clamp tanh(x / 2))
    scales = [(scale, 1.0) for scale in _SCALES]
    if clamp > 0:
        scales.append((ScaleFunction("tanh", clamp=clamp, order="scale-shift"), clamp / 2))
    for scale, factor in scales:
        want = log_scale_ref(factor * _PROBE, scale)
        if torch.allclose(log_s, want, rtol=1e-13, atol=1e-14):
            return scale, factor
    return None


def _affine(layer: Any) -> tuple[Part, ...] | str:
    found = _scale_of(layer)
    if found is None:
        return "its scale activation is a custom function"
    n = len(layer.transform_features)
    factors = found[1], 1.0
    net = Params(layer.transform_net, slice(n, None), slice(0, n), factors, passing="argument")
    return _coupling(layer, net, found[0])


def _additive(layer: Any) -> tuple[Part, ...] | str:
    net = Params(layer.transform_net, None, slice(None), passing="argument")
    return _coupling(layer, net, ScaleFunction("exp", order="scale-shift"))


def _coupling(layer: Any, net: Params, scale: ScaleFunction) -> tuple[Part, ...] | str:
    if layer.unconditional_transform is not None:
        return "it also transforms the features that our couplings leave alone"
    unchanged, transformed = layer.identity_features.tolist(), layer.transform_features.tolist()
    fits = SameBuffers(layer, "identity_features", "transform_features")
    coupling = Coupling(net, scale, False, Exactly(len(unchanged)), fits)
    order = (*unchanged, *transformed)
    if order == tuple(range(len(order))):
        return (coupling,)
    return (Reorder(Listed(order)), coupling, Reorder(Listed(inverse_of(order))))


def _masked_affine(layer: Any, made: MadeKinds) -> tuple[Part, ...] | str:
    scale = _autoregressive_scale(layer)
    if scale is None:
        return "its scale activation is a custom function"
    return autoregressive.affine_parts(layer, made, scale)


def _autoregressive_scale(layer: Any) -> ScaleFunction | None:
    """The scale function of a masked affine transform; glasflow's may have one of its own."""
    softplus = ScaleFunction("softplus", eps=layer._epsilon, clamp=1e30, order="scale-shift")
    activation = getattr(layer, "scale_activation", None)
    if activation is None:
        return softplus
    try:
        log_s = activation(_PROBE).log()
    except Exception:  # as in `_scale_of`
        return None
    same = torch.allclose(log_s, log_scale_ref(_PROBE, softplus), rtol=1e-13, atol=1e-14)
    return softplus if same else None


def _pointwise(layer: Any) -> tuple[Part, ...] | str:
    shape = torch.broadcast_shapes(layer._shift.shape, layer._scale.shape)
    if any(n != 1 for n in shape[1:]) or (len(shape) > 1 and shape[0] == 1):
        return f"its scale of shape {tuple(shape)} is not one number a channel"
    # The scale of a vector belongs to the last axis of images.
    fits = _is_vector if len(shape) == 1 and shape[0] > 1 else None
    return (Linear(layer, _pointwise_affines, "scale and shift", fits=fits),)


def _is_vector(x: Tensor) -> bool:
    return x.dim() == 2


def _squeeze(layer: Any) -> tuple[Part, ...] | str:
    if layer.factor != 2:
        return f"it squeezes by {layer.factor}, not by 2"
    return (SpaceToDepth(inverted=False),)


def layers_of(nt: Any, affine: tuple[type, ...] = ()) -> dict[type, PartsOf]:
    """Return the parts of each transform of a package, by its class.

    Args:
        nt: `nflows.transforms`, or a copy of it.
        affine: other classes that compute what `AffineCouplingTransform` computes.
    """

    made = MadeKinds.of(nt.autoregressive.made_module)

    def composite(layer: Any) -> tuple[Part, ...] | str:
        why = "mflow_kernels does not have all of its transforms"
        parts: list[Part] = []
        for child in layer._transforms:
            if type(child) not in layers:
                return why
            own = layers[type(child)](child)
            channels = channels_of(child)
            if isinstance(own, str) or (channels is not None and why_not(own, channels)):
                return why
            parts += own
        return tuple(parts)

    layers: dict[type, PartsOf] = {
        nt.ActNorm: one_linear(_actnorms, "actnorm", _DATA_INIT),
        nt.LULinear: one_linear(lu_linears),
        nt.NaiveLinear: one_linear(_naive_linears),
        nt.OneByOneConvolution: _conv,
        **dict.fromkeys((nt.Permutation, nt.RandomPermutation, nt.ReversePermutation), _permute),
        **dict.fromkeys((nt.AffineCouplingTransform, *affine), _affine),
        nt.AdditiveCouplingTransform: _additive,
        nt.PiecewiseRationalQuadraticCouplingTransform: lambda layer: coupling_parts(
            layer, nt.PiecewiseRationalQuadraticCDF
        ),
        nt.MaskedAffineAutoregressiveTransform: lambda layer: _masked_affine(layer, made),
        nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform: lambda layer: (
            autoregressive.spline_parts(layer, made)
        ),
        nt.PointwiseAffineTransform: _pointwise,
        nt.SqueezeTransform: _squeeze,
        nt.CompositeTransform: composite,
    }
    return layers


def channels_of(layer: Any) -> int | None:
    """Return the number of channels of a transform's states; None if it does not show it."""
    for vector in ("shift", "_permutation"):  # of an actnorm, of a permutation
        if hasattr(layer, vector):
            return len(getattr(layer, vector))
    if hasattr(layer, "_transforms"):
        children = list(layer._transforms)
        if any(hasattr(m, "factor") for m in children):  # a squeeze
            return None
        return next((n for n in map(channels_of, children) if n is not None), None)
    features = getattr(layer, "features", None)
    return features if isinstance(features, int) else None
