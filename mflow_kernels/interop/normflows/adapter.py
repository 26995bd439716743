"""normflows: how its models and layers walk ours.

Its flows go latent -> data in `forward` and data -> latent in `inverse`.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import normflows as nf
import torch
from normflows.flows.affine.coupling import AffineConstFlow
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.normflows.layers import LAYERS as LAYERS
from mflow_kernels.interop.normflows.layers import channels_of as channels_of
from mflow_kernels.interop.report import Left
from mflow_kernels.interop.sequence import Run
from mflow_kernels.interop.subclasses import Fused, FusedLists, accelerate_module, plan_of
from mflow_kernels.ops.launch import pixels

# How its models and layers walk.


class FusedFlow(Fused):
    """Flows of a model as one."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._go(z, True)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._go(z, False)

    def _go(self, z: Tensor, latent: bool) -> tuple[Tensor, Tensor]:
        if self.run.expresses(z, latent):
            z, log_det = self.run(z, inverse=latent)
            return z, log_det.expand(len(z))
        total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        layers: Any = self.layers
        for layer in layers if latent else reversed(layers):
            z, log_det = layer(z) if latent else layer.inverse(z)
            total = total + log_det
        return z, total


def _layer_methods(shape: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable[..., Any]]:
    """`forward` and `inverse` of a layer whose log-determinants have this shape, by the layer's own
    code where the number of channels does not fit ours."""

    def method(name: str, latent: bool) -> Callable[..., Any]:
        def walk(self: Any, z: Tensor, *context: Any, **named: Any) -> tuple[Tensor, Tensor]:
            run: Run = plan_of(self)
            if not run.expresses(z, latent):
                own = getattr(super(type(self), self), name)
                returned: tuple[Tensor, Tensor] = own(z, *context, **named)
                return returned
            x, log_det = run(z, inverse=latent)
            return x, shape(x, log_det)

        return walk

    return {"forward": method("forward", True), "inverse": method("inverse", False)}


def _actnorm_methods() -> dict[str, Callable[..., Any]]:
    def walk(self: Any, z: Tensor, latent: bool) -> tuple[Tensor, Tensor]:
        plan_of(self).settle(z, inverse=latent)
        shift, log_scale = -self.t.flatten(), -self.s.flatten()
        x, _ = (ops.actnorm_inverse if latent else ops.actnorm)(z, shift, log_scale)
        return x, (pixels(z) if latent else -pixels(z)) * self.s.sum()

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        return walk(self, z, True)

    def inverse(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        return walk(self, z, False)

    return {"forward": forward, "inverse": inverse}


def _model_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """A model's method on the model's fused flows."""

    @wraps(method)
    def through(self: Any, *args: Any, **named: Any) -> Any:
        plan: FusedLists = plan_of(self)
        return method(plan.view(self), *args, **named)

    return through


_WALKING = (
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
CONTAINERS = (nf.NormalizingFlow, nf.ClassCondFlow, nf.MultiscaleFlow, nf.NormalizingFlowVAE)
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "per sample": _layer_methods(lambda x, log_det: log_det.expand(len(x))),
    "scalar": _layer_methods(lambda x, log_det: log_det),
    "actnorm": _actnorm_methods(),
    **{
        model.__name__: {n: _model_method(vars(model)[n]) for n in _WALKING if n in vars(model)}
        for model in CONTAINERS
    },
}
_KINDS = {
    nf.flows.ActNorm: "actnorm",
    AffineConstFlow: "actnorm",
    nf.flows.Invertible1x1Conv: "scalar",
    nf.flows.InvertibleAffine: "scalar",
}


def kind_of(layer: nn.Module) -> str:
    return _KINDS.get(type(layer), "per sample")


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nf.flows.Flow)


def why_left(layer: nn.Module) -> str:
    if type(layer) in (nf.flows.Split, nf.flows.Merge):
        return "it cuts or joins states, with nothing to compute"
    return "no layer of ours does this"


def fuse(module: nn.Module, name: str, kind: Any, walk: Any) -> None:
    """Let a model, of that kind of container, walk runs of its flows."""
    if any(getattr(type(module), n) is not getattr(kind, n) for n in METHODS[kind.__name__]):
        why = f"it has methods of its own in place of {kind.__name__}'s: flows run one by one"
        walk.left.append(Left(name, type(module).__name__, why))
        return
    flows: Any = module.flows
    before = len(walk.replaced)
    prefix = f"{name}.flows" if name else "flows"
    if kind is nf.MultiscaleFlow:
        levels = [_fused(level, f"{prefix}.{i}", walk) for i, level in enumerate(flows)]
        fused = nn.ModuleList(levels)
    else:
        fused = _fused(flows, prefix, walk)
    if len(walk.replaced) > before:
        accelerate_module(module, "normflows", kind.__name__, FusedLists(module, {"flows": fused}))


def _fused(flows: Any, name: str, walk: Any) -> nn.ModuleList:
    names = [f"{name}.{i}" for i in range(len(flows))]
    cut = walk.runs(list(reversed(flows)), names[::-1])
    fused = nn.ModuleList()
    for members, run in reversed(cut):
        fused.append(members[0] if run is None else FusedFlow(members[::-1], run))
    return fused


def notes_of(layers: Sequence[nn.Module]) -> list[str]:
    """In which these layers differ from normflows' on purpose."""
    notes = []
    if any(isinstance(m, nf.flows.ActNorm) for m in layers):
        notes += [
            "ActNorm is set from whichever direction runs first, as in normflows; but a model in "
            "eval mode does not set it from samples, and one in training mode warns when it does.",
            "ActNorm keeps the scale of a channel that is constant in its first batch; normflows "
            "divides by its deviation + 1e-6.",
        ]
    maps = [m.flows[1].scale_map for m in layers if isinstance(m, nf.flows.AffineCouplingBlock)]
    if "sigmoid" in maps or "sigmoid_inv" in maps:
        notes.append("log sigmoid is finite for every finite input; normflows' is -inf from -104.")
    return notes
