"""The parts of each normflows layer.

normflows' flows go latent -> data in `forward` and data -> latent in `inverse`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import normflows as nf
import torch
from normflows.flows.affine.coupling import AffineConstFlow
from normflows.flows.neural_spline.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressive,
)
from normflows.flows.neural_spline.coupling import (
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
)
from normflows.nets import made
from torch import Tensor

from mflow_kernels.interop.actnorm_initialization import (
    per_channel,
    set_by_samples,
    standard_deviation,
)
from mflow_kernels.interop.autoregressive import affine_parts, spline_parts
from mflow_kernels.interop.linear import Affine, DataInit, Linear, Reorder, lu_linears, permutation
from mflow_kernels.interop.masked_networks import MadeKinds
from mflow_kernels.interop.orders import Listed, Rotated, SameBuffers, inverse_of
from mflow_kernels.interop.params import Masked, Params
from mflow_kernels.interop.parts import Coupling, Exactly, Part, larger_half, smaller_half
from mflow_kernels.interop.splines import coupling_parts, inverted
from mflow_kernels.layers.conv1x1 import plu
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.reversible.rearrangements import SpaceToDepth

# Linear layers, data -> latent: normflows' `inverse`.


def _actnorms(modules: Sequence[Any]) -> Affine:
    s, t = (torch.stack([getattr(m, name) for m in modules]).flatten(1) for name in ("s", "t"))
    scale = (-s).exp()
    return Affine(scale, -t * scale, -s.sum(1))


def _plain(modules: Sequence[Any]) -> Affine:
    weight = torch.stack([m.W for m in modules])
    return Affine(weight, None, torch.linalg.slogdet(weight).logabsdet)


def _plain_of_rows(modules: Sequence[Any]) -> Affine:
    rows = _plain(modules)
    return rows._replace(weight=rows.weight.mT)


def _plu(modules: Sequence[Any]) -> Affine:
    names = ("P", "L", "U", "sign_S", "log_S")
    factors = [torch.stack([getattr(m, name) for m in modules]) for name in names]
    return Affine(plu(*factors), None, factors[-1].sum(1))


def _plu_of_rows(modules: Sequence[Any]) -> Affine:
    rows = _plu(modules)
    return rows._replace(weight=rows.weight.mT)


def _is_pending(layer: Any) -> bool:
    return not bool(layer.data_dep_init_done)


def _initialize_actnorm(layer: Any, x: Tensor, from_latent: bool) -> None:
    """Initialize an actnorm as normflows does, except that a constant channel keeps its scale."""
    if from_latent and not set_by_samples(layer, "normflows"):
        return
    std, constant = standard_deviation(x)
    s = torch.where(constant, 0.0, (std + 1e-6).log()).to(layer.s.dtype)
    mean = per_channel(x).mean(1).to(layer.t.dtype)
    layer.s.copy_((-s if from_latent else s).view_as(layer.s))
    layer.t.copy_((-mean * (-s).exp() if from_latent else mean).view_as(layer.t))
    layer.data_dep_init_done.fill_(1)


def _done(layer: Any) -> Tensor:
    return layer.data_dep_init_done


_DATA_INIT = DataInit(_is_pending, _initialize_actnorm, _done)


# The parts of each layer.


def _affine_constant(layer: Any) -> tuple[Part, ...] | str:
    shape = layer.s.shape
    if len(shape) < 2 or any(n != 1 for n in shape[2:]):
        return f"its scale of shape {tuple(shape[1:])} is not one number a channel"
    if shape[1] == 1:
        return "it has one scale for all channels"
    data_init = _DATA_INIT if isinstance(layer, nf.flows.ActNorm) else None
    return (Linear(layer, _actnorms, "actnorm", data_init),)


def _permute(layer: Any) -> tuple[Part, ...] | str:
    if layer.mode == "shuffle":
        return (permutation(layer, "inv_perm"),)
    if layer.mode == "swap":
        return (Reorder(Rotated(larger=True)),)
    return f"its mode {layer.mode!r} is unknown"


def _lu_permute(layer: Any) -> tuple[Part, ...]:
    order = permutation(layer.permutation, "_permutation")
    return (order, Linear(layer.linear, lu_linears))


# Data -> latent: the scale function, whether the map is the inverse of `ops.affine_coupling`, and
# the factor of the shift.
_SCALES = {
    "exp": (ScaleFunction("exp", order="scale-shift"), True, 1.0),
    "sigmoid": (ScaleFunction("sigmoid"), False, -1.0),
    "sigmoid_inv": (ScaleFunction("sigmoid", order="scale-shift"), True, 1.0),
}
MADE = MadeKinds.of(made)
MASKED_SIGMOID = ScaleFunction("sigmoid", offset=2.0, eps=1e-3, order="scale-shift")


def _coupling_block(layer: Any) -> tuple[Part, ...] | str:
    split, coupling, _ = layer.flows
    if split.mode not in ("channel", "channel_inv"):
        return f"its split mode {split.mode!r} is not one of channels"
    net = coupling.param_map
    inner = "net" if type(net) in (nf.nets.ConvNet2d, nf.nets.MLP) else ""
    if not coupling.scale:
        scale, inverse = ScaleFunction("exp", order="scale-shift"), True
        params = Params(net, None, slice(None), inner=inner)
    elif coupling.scale_map in _SCALES:
        scale, inverse, factor = _SCALES[coupling.scale_map]
        params = Params(net, slice(1, None, 2), slice(0, None, 2), (1.0, factor), inner=inner)
    else:
        return f"its scale map {coupling.scale_map!r} is unknown"
    if split.mode == "channel":
        return (Coupling(params, scale, inverse, larger_half),)
    there, back = Rotated(larger=True), Rotated(larger=True, back=True)
    return (Reorder(there), Coupling(params, scale, inverse, smaller_half), Reorder(back))


def _masked(layer: Any) -> tuple[Part, ...] | str:
    mask = layer.b[0]
    if mask.dim() != 1 or not bool(((mask == 0) | (mask == 1)).all()):
        return "its mask is not one of 0 and 1 for each feature"
    unchanged = [i for i, m in enumerate(mask.tolist()) if m]
    transformed = [i for i, m in enumerate(mask.tolist()) if not m]
    nets = [layer._modules.get(name) for name in ("s", "t")]
    params = Masked(nets[0], nets[1], tuple(unchanged), tuple(transformed))
    order = (*unchanged, *transformed)
    scale = ScaleFunction("exp", order="scale-shift")
    return (
        Reorder(Listed(order)),
        Coupling(params, scale, True, Exactly(len(unchanged)), SameBuffers(layer, "b")),
        Reorder(Listed(inverse_of(order))),
    )


def _glow_block(layer: Any) -> tuple[Part, ...] | str:
    parts: list[Part] = []
    for part in reversed(layer.flows):
        if type(part) not in LAYERS:
            return "mflow_kernels has no such layer"
        own = LAYERS[type(part)](part)
        if isinstance(own, str):
            return own
        parts += own
    return tuple(parts)


# The inner layers of splines go data -> latent in `forward` for their wrappers' `inverse`, and the
# other way in a model of their own.

SPLINES = (
    PiecewiseRationalQuadraticCoupling,
    PiecewiseRationalQuadraticCDF,
    MaskedPiecewiseRationalQuadraticAutoregressive,
)


def _spline_coupling(layer: Any) -> tuple[Part, ...] | str:
    return coupling_parts(layer, PiecewiseRationalQuadraticCDF)


LAYERS: dict[type, Callable[[Any], tuple[Part, ...] | str]] = {
    nf.flows.ActNorm: _affine_constant,
    AffineConstFlow: _affine_constant,
    nf.flows.Permute: _permute,
    nf.flows.Invertible1x1Conv: lambda m: (Linear(m, _plu if m.use_lu else _plain),),
    nf.flows.InvertibleAffine: lambda m: (Linear(m, _plu_of_rows if m.use_lu else _plain_of_rows),),
    nf.flows.LULinearPermute: _lu_permute,
    nf.flows.AffineCouplingBlock: _coupling_block,
    nf.flows.MaskedAffineFlow: _masked,
    nf.flows.GlowBlock: _glow_block,
    nf.flows.Squeeze: lambda _: (SpaceToDepth(inverted=False),),
    nf.flows.CoupledRationalQuadraticSpline: lambda layer: _spline_coupling(layer.prqct),
    nf.flows.MaskedAffineAutoregressive: lambda m: inverted(affine_parts(m, MADE, MASKED_SIGMOID)),
    nf.flows.AutoregressiveRationalQuadraticSpline: lambda m: spline_parts(m.mprqat, MADE),
    nf.flows.CircularAutoregressiveRationalQuadraticSpline: lambda m: spline_parts(m.mprqat, MADE),
    PiecewiseRationalQuadraticCoupling: lambda layer: inverted(_spline_coupling(layer)),
    MaskedPiecewiseRationalQuadraticAutoregressive: lambda m: inverted(spline_parts(m, MADE)),
}


def channels_of(layer: Any) -> int | None:
    """Return the number of channels of a layer's states; None if the layer does not show it."""
    for m in layer.modules():
        if isinstance(m, AffineConstFlow):
            return int(m.s.shape[1])
        if isinstance(m, (nf.flows.Permute, nf.flows.Invertible1x1Conv, nf.flows.InvertibleAffine)):
            return int(m.num_channels)
        if isinstance(m, PiecewiseRationalQuadraticCoupling):
            return int(m.features)
        if isinstance(m, nf.flows.AffineCouplingBlock) and m is layer:
            net = m.flows[1].param_map
            ends = [w.shape for w in net.parameters() if w.dim() > 1]
            if type(net) in (nf.nets.ConvNet2d, nf.nets.MLP) and ends:
                return int(ends[0][1] + ends[-1][0] // (2 if m.flows[1].scale else 1))
    return None
