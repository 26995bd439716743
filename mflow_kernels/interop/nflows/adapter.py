"""nflows: what each of its transforms is in ours, and how its composites walk them.

Its transforms go data -> latent in `forward` and latent -> data in `inverse`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import nflows.transforms as nt
import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.actnorm_initialization import per_channel, standard_deviation
from mflow_kernels.interop.linear import (
    Affine,
    Linear,
    Listed,
    Reorder,
    Setting,
    inverse_of,
    lu_linears,
)
from mflow_kernels.interop.params import Params
from mflow_kernels.interop.report import Left
from mflow_kernels.interop.sequence import Coupling, Exactly, Part, Run, why_not
from mflow_kernels.interop.subclasses import Fused, FusedLists, accelerate_module, plan_of
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.reversible.program import Squeezing

CONTAINERS = (nt.CompositeTransform,)

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


def _unset(layer: Any) -> bool:
    return layer.training and not bool(layer.initialized)


def _set_actnorm(layer: Any, x: Tensor, from_latent: bool) -> None:
    """As nflows does, which never sets it from samples; but a constant channel keeps its scale."""
    if from_latent:
        return
    std, constant = standard_deviation(x, 1)
    std = torch.where(constant, 1.0, std)
    layer.log_scale.copy_(-std.log())
    layer.shift.copy_(-(per_channel(x) / std[:, None]).mean(1))
    layer.initialized.fill_(True)


_SETTING = Setting(_unset, _set_actnorm)  # which depends on its mode too, not on a tensor alone

# Transform by transform.


def _actnorm(layer: Any) -> tuple[Part, ...]:
    return (Linear(layer, _actnorms, "actnorm", _SETTING),)


def _lu_linear(layer: Any) -> tuple[Part, ...]:
    return (Linear(layer, lu_linears),)


def _naive_linear(layer: Any) -> tuple[Part, ...]:
    return (Linear(layer, _naive_linears),)


def _conv(layer: Any) -> tuple[Part, ...]:
    return (Linear(layer.permutation, _permutations, "permutation"), Linear(layer, lu_linears))


def _permute(layer: Any) -> tuple[Part, ...] | str:
    if layer._dim != 1:
        return f"it permutes axis {layer._dim}, not the channels"
    return (Linear(layer, _permutations, "permutation"),)


def _coupling(layer: Any) -> tuple[Part, ...] | str:
    if layer.unconditional_transform is not None:
        return "it transforms the features that ours leave alone too"
    stays, moves = layer.identity_features.tolist(), layer.transform_features.tolist()
    n = len(moves)
    if type(layer) is nt.AdditiveCouplingTransform:
        net = Params(layer.transform_net, None, slice(None), passing="argument")
        scale = ScaleFunction("exp", order="scale-shift")
    else:
        net = Params(layer.transform_net, slice(n, None), slice(0, n), passing="argument")
        scale = ScaleFunction("sigmoid", offset=2.0, eps=1e-3, order="scale-shift")
    coupling = Coupling(net, scale, False, Exactly(len(stays)))
    order = (*stays, *moves)
    if order == tuple(range(len(order))):
        return (coupling,)
    return (Reorder(Listed(order)), coupling, Reorder(Listed(inverse_of(order))))


def _squeeze(layer: Any) -> tuple[Part, ...] | str:
    if layer.factor != 2:
        return f"it squeezes by {layer.factor}, ours by 2"
    return (Squeezing(inverse=False),)


def _composite(layer: Any) -> tuple[Part, ...] | str:
    parts: list[Part] = []
    for child in layer._transforms:
        of = LAYERS[type(child)](child) if type(child) in LAYERS else why_left(child)
        channels = channels_of(child)
        if isinstance(of, str) or (channels is not None and why_not(of, channels)):
            return "not all of its transforms are ours"
        parts += of
    return tuple(parts)


LAYERS: dict[type, Callable[[Any], tuple[Part, ...] | str]] = {
    nt.ActNorm: _actnorm,
    nt.LULinear: _lu_linear,
    nt.NaiveLinear: _naive_linear,
    nt.OneByOneConvolution: _conv,
    nt.Permutation: _permute,
    nt.RandomPermutation: _permute,
    nt.ReversePermutation: _permute,
    nt.AffineCouplingTransform: _coupling,
    nt.AdditiveCouplingTransform: _coupling,
    nt.SqueezeTransform: _squeeze,
    nt.CompositeTransform: _composite,
}


def is_layer(module: nn.Module) -> bool:
    """Composites are layers where all of them is ours."""
    if isinstance(module, nt.CompositeTransform):
        return type(module) in LAYERS and not isinstance(_composite(module), str)
    wraps = (nt.MultiscaleCompositeTransform, nt.InverseTransform)
    return isinstance(module, nt.Transform) and not isinstance(module, wraps)


def why_left(layer: nn.Module) -> str:
    return "no layer of ours does this"


def channels_of(layer: Any) -> int | None:
    if isinstance(layer, nt.ActNorm):
        return len(layer.shift)
    if isinstance(layer, nt.Permutation):
        return len(layer._permutation)
    features = getattr(layer, "features", None)
    return features if isinstance(features, int) else None


# How its composites and transforms walk.


class FusedTransform(Fused):
    """Transforms of a composite as one."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._go(inputs, context, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._go(inputs, context, True)

    def _go(self, x: Tensor, context: Tensor | None, latent: bool) -> tuple[Tensor, Tensor]:
        if self.run.expresses(x, latent):
            return _walk(self.run, x, context, latent)
        layers: Any = self.layers
        total = x.new_zeros(len(x))
        for layer in reversed(layers) if latent else layers:
            x, log_det = (layer.inverse if latent else layer)(x, context)
            total = total + log_det
        return x, total


def _walk(run: Run, x: Tensor, context: Any, latent: bool) -> tuple[Tensor, Tensor]:
    x, log_det = run(x, () if context is None else (context,), inverse=latent)
    return x, log_det.expand(len(x))


def _transform_method(name: str, latent: bool) -> Callable[..., Any]:
    """A transform's own method, where our kernels do not fit the number of channels."""

    def walk(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        run: Run = plan_of(self)
        if not run.expresses(inputs, latent):
            own: tuple[Tensor, Tensor] = getattr(super(type(self), self), name)(inputs, context)
            return own
        return _walk(run, inputs, context, latent)

    return walk


def _actnorm_forward(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    plan_of(self).settle(inputs, inverse=False)
    # exp(s) x + b is the inverse of exp(-s) (x - b).
    return ops.actnorm_inverse(inputs, -self.shift, -self.log_scale)


def _actnorm_inverse(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    return ops.actnorm(inputs, -self.shift, -self.log_scale)


def _composite_forward(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    return nt.CompositeTransform.forward(plan_of(self).view(self), inputs, context)


def _composite_inverse(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    return nt.CompositeTransform.inverse(plan_of(self).view(self), inputs, context)


METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "transform": {
        "forward": _transform_method("forward", False),
        "inverse": _transform_method("inverse", True),
    },
    "actnorm": {"forward": _actnorm_forward, "inverse": _actnorm_inverse},
    "composite": {"forward": _composite_forward, "inverse": _composite_inverse},
}


def kind_of(layer: nn.Module) -> str:
    return "actnorm" if type(layer) is nt.ActNorm else "transform"


def fuse(module: nn.Module, name: str, kind: Any, walk: Any) -> None:
    """Let a composite walk runs of its transforms."""
    if type(module) is not kind:
        why = "a kind of CompositeTransform that we do not know: transforms run one by one"
        walk.left.append(Left(name, type(module).__name__, why))
        return
    transforms: Any = module._transforms
    prefix = f"{name}._transforms" if name else "_transforms"
    before = len(walk.replaced)
    fused = nn.ModuleList(
        members[0] if run is None else FusedTransform(members, run)
        for members, run in walk.runs(
            list(transforms), [f"{prefix}.{i}" for i in range(len(transforms))]
        )
    )
    if len(walk.replaced) > before:
        accelerate_module(module, "nflows", "composite", FusedLists(module, {"_transforms": fused}))


def notes_of(layers: Sequence[nn.Module]) -> list[str]:
    """In which these transforms differ from nflows' on purpose."""
    notes = []
    if any(isinstance(m, nt.ActNorm) for m in layers):
        notes.append(
            "ActNorm keeps the scale of a channel that is constant in its first batch; nflows' "
            "turns to NaN."
        )
    if any(isinstance(m, nt.NaiveLinear) for m in layers):
        notes.append(
            "NaiveLinear has an inverse; nflows' calls torch.solve, which torch has no longer."
        )
    return notes
