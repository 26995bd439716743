"""The adapter of normflows: how its models and layers call our kernels.

normflows' flows go latent -> data in `forward` and data -> latent in `inverse`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import normflows as nf
import torch
from normflows.flows.affine.coupling import AffineConstFlow
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.actnorm_initialization import samples_note
from mflow_kernels.interop.adapter import Adapter, Fuser
from mflow_kernels.interop.normflows.layers import LAYERS, SPLINES, channels_of
from mflow_kernels.interop.report import Left
from mflow_kernels.interop.sequence import FusedSequence, per_sample
from mflow_kernels.interop.subclasses import (
    FusedContainer,
    FusedLayers,
    accelerate_module,
    implementation_of,
    on_view,
)
from mflow_kernels.ops.layouts import pixels

# Releases 1.7.0 to 1.7.3 and the development branch at c6616b1, see `interop/fingerprints.py`.
FINGERPRINTS: dict[str, set[str]] = {
    "normflows.core": {"e3c18e2d0536", "b15b268b1a0c", "fbfd5a0fb76c"},
    "normflows.flows.affine.autoregressive": {"904c414a5a2b", "dd09c0bcc755"},
    "normflows.flows.affine.coupling": {"2d15f2291305", "125df0e5894a"},
    "normflows.flows.affine.glow": {"f7431e0626d8"},
    "normflows.flows.neural_spline.autoregressive": {"4fc9a0667615"},
    "normflows.flows.neural_spline.coupling": {"4553e7f099f1"},
    "normflows.flows.neural_spline.wrapper": {"9e48651a7627", "14517864a466", "9d4f809ebd94"},
    "normflows.flows.mixing": {"67e059c2ebe2", "d4aaac22037c", "054f98c56e9d"},
    "normflows.flows.normalization": {"59c81946ef8b"},
    "normflows.flows.reshape": {"2f0c071c401a"},
    "normflows.nets.cnn": {"795b7764d029"},
    "normflows.nets.mlp": {"ae0867dade37"},
    "normflows.utils.splines": {"34287d0614c0", "e65d0b2a8172"},
}


class FusedFlow(FusedLayers):
    """Flows of a model as one flow."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, inverse=False)

    def _run(self, z: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.sequence.supports(z, inverse):
            passed = () if context is None else (context,)
            z, log_det = self.sequence(z, passed, inverse=inverse)
            return z, per_sample(z, log_det)
        named = {} if context is None else {"context": context}
        total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        layers: Any = self.layers
        for layer in layers if inverse else reversed(layers):
            z, log_det = (layer if inverse else layer.inverse)(z, **named)
            total = total + log_det
        return z, total


def _layer_methods(shape: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable[..., Any]]:
    """Return `forward` and `inverse` of a layer; `shape` expands log-determinants as it does.

    The layer's own code runs if our kernels do not support the number of channels.
    """

    def method(name: str, inverse: bool) -> Callable[..., Any]:
        def call(self: Any, z: Tensor, *context: Any, **named: Any) -> tuple[Tensor, Tensor]:
            sequence: FusedSequence = implementation_of(self)
            if not sequence.supports(z, inverse):
                own = getattr(super(type(self), self), name)
                returned: tuple[Tensor, Tensor] = own(z, *context, **named)
                return returned
            condition = context[0] if context else named.get("context")
            passed = () if condition is None else (condition,)
            x, log_det = sequence(z, passed, inverse=inverse)
            return x, shape(x, log_det)

        return call

    return {"forward": method("forward", True), "inverse": method("inverse", False)}


def _actnorm(self: Any, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    implementation_of(self).initialize_from(z, inverse=inverse)
    shift, log_scale = -self.t.flatten(), -self.s.flatten()
    x, _ = (ops.actnorm_inverse if inverse else ops.actnorm)(z, shift, log_scale)
    return x, (pixels(z) if inverse else -pixels(z)) * self.s.sum()


_MODEL_METHODS = (
    "forward",
    "forward_and_log_det",
    "inverse",
    "inverse_and_log_det",
    "forward_kld",
    "reverse_kld",
    "reverse_alpha_div",
    "sample",
    "log_prob",
)
CONTAINERS = (
    # Releases 1.7.0 and 1.7.1 lack it. It comes before the class that it is derived from.
    *filter(None, [getattr(nf, "ConditionalNormalizingFlow", None)]),
    nf.NormalizingFlow,
    nf.ClassCondFlow,
    nf.MultiscaleFlow,
    nf.NormalizingFlowVAE,
)
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "per sample": _layer_methods(per_sample),
    "scalar": _layer_methods(lambda x, log_det: log_det),
    "actnorm": {
        "forward": lambda self, z: _actnorm(self, z, inverse=True),
        "inverse": lambda self, z: _actnorm(self, z, inverse=False),
    },
    **{
        model.__name__: {n: on_view(vars(model)[n]) for n in _MODEL_METHODS if n in vars(model)}
        for model in CONTAINERS
    },
}
_KINDS = {
    nf.flows.ActNorm: "actnorm",
    AffineConstFlow: "actnorm",
    nf.flows.Invertible1x1Conv: "scalar",
    nf.flows.InvertibleAffine: "scalar",
}


def _fused(flows: Any, name: str, fuser: Fuser) -> nn.ModuleList:
    names = [f"{name}.{i}" for i in range(len(flows))]
    pieces = fuser.fuse_sequences(list(reversed(flows)), names[::-1])
    fused = nn.ModuleList()
    for members, sequence in reversed(pieces):
        fused.append(members[0] if sequence is None else FusedFlow(members[::-1], sequence))
    return fused


class NormflowsAdapter(Adapter):
    folder = "normflows"
    layers = LAYERS
    containers = CONTAINERS
    methods = METHODS
    fingerprints = FINGERPRINTS
    functions = dict.fromkeys(SPLINES, "normflows.utils.splines")
    channels_of = staticmethod(channels_of)

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, nf.flows.Flow)

    def why_left(self, layer: nn.Module) -> str:
        if type(layer) in (nf.flows.Split, nf.flows.Merge):
            return "it cuts or joins states, with nothing to compute"
        return super().why_left(layer)

    def kind_of(self, cls: type) -> str:
        return _KINDS.get(cls, "per sample")

    def fuse(self, container: nn.Module, name: str, kind: Any, fuser: Fuser) -> None:
        cls = type(container)
        if any(getattr(cls, n) is not getattr(kind, n) for n in METHODS[kind.__name__]):
            why = f"it has methods of its own in place of {kind.__name__}'s: flows run one by one"
            fuser.left.append(Left(name, cls.__name__, why))
            return
        flows: Any = container.flows
        before = len(fuser.replaced)
        prefix = f"{name}.flows" if name else "flows"
        if kind is nf.MultiscaleFlow:
            levels = [_fused(level, f"{prefix}.{i}", fuser) for i, level in enumerate(flows)]
            fused = nn.ModuleList(levels)
        else:
            fused = _fused(flows, prefix, fuser)
        if len(fuser.replaced) > before:
            implementation = FusedContainer(container, {"flows": fused})
            accelerate_module(container, self.folder, kind.__name__, implementation)

    def notes(self, modules: Sequence[nn.Module]) -> list[str]:
        notes: list[str] = []
        if any(isinstance(m, nf.flows.ActNorm) for m in modules):
            notes += [
                samples_note("normflows"),
                "ActNorm keeps the scale of a channel that is constant in its first batch; "
                "normflows divides by its deviation + 1e-6.",
            ]
        maps = [
            m.flows[1].scale_map for m in modules if isinstance(m, nf.flows.AffineCouplingBlock)
        ]
        if "sigmoid" in maps or "sigmoid_inv" in maps:
            notes.append(
                "log sigmoid is finite for every finite input; normflows' is -inf from -104."
            )
        return notes


ADAPTER = NormflowsAdapter()
