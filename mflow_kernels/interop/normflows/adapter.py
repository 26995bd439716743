"""The adapter of normflows: how its models and layers call our kernels.

normflows' flows go latent -> data in `forward` and data -> latent in `inverse`.
"""

from collections.abc import Callable
from typing import Any

import normflows as nf
from normflows.flows.affine.coupling import AffineConstFlow
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.actnorm_initialization import samples_note
from mflow_kernels.interop.adapter import instance_of
from mflow_kernels.interop.normflows.layers import LAYERS, SPLINES, channels_of
from mflow_kernels.interop.subclasses import implementation_of, on_view
from mflow_kernels.interop.two_way import TwoWayAdapter, per_sample, run_layer
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
    "normflows.nets.made": {"2ecfd9f52130", "646bc7ff8136"},
    "normflows.nets.mlp": {"ae0867dade37"},
    "normflows.utils.nn": {"6a55260e56b7", "3ff07c39ab01"},
    "normflows.utils.splines": {"34287d0614c0", "e65d0b2a8172"},
}


def _layer_methods(shape: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable[..., Any]]:
    """Return `forward` and `inverse` of a layer; `shape` expands log-determinants as it does."""

    def method(name: str) -> Callable[..., Any]:
        def call(self: Any, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
            return run_layer(self, name, z, context, name == "forward", shape)

        return call

    return {name: method(name) for name in ("forward", "inverse")}


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
    "layer": _layer_methods(per_sample),
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
KINDS = {
    nf.flows.ActNorm: "actnorm",
    AffineConstFlow: "actnorm",
    nf.flows.Invertible1x1Conv: "scalar",
    nf.flows.InvertibleAffine: "scalar",
}


def _computes_sigmoid(module: Any) -> bool:
    is_block = isinstance(module, nf.flows.AffineCouplingBlock)
    return is_block and module.flows[1].scale_map in ("sigmoid", "sigmoid_inv")


class NormflowsAdapter(TwoWayAdapter):
    folder = "normflows"
    encodes, listed = "inverse", "flows"
    layers = LAYERS
    containers = CONTAINERS
    methods = METHODS
    kinds = KINDS
    fingerprints = FINGERPRINTS
    functions = dict.fromkeys(SPLINES, "normflows.utils.splines")
    channels_of = staticmethod(channels_of)
    notes = (
        (samples_note("normflows"), instance_of(nf.flows.ActNorm)),
        (
            "ActNorm keeps the scale of a channel that is constant in its first batch; normflows "
            "divides by its deviation + 1e-6.",
            instance_of(nf.flows.ActNorm),
        ),
        (
            "log sigmoid is finite for every finite input; normflows' is -inf from -104.",
            _computes_sigmoid,
        ),
        (
            "A spline of angles and other features keeps an element outside its interval; "
            "normflows' returns 0, which has no inverse.",
            lambda m: isinstance(getattr(m, "tails", None), (list, tuple)),
        ),
    )

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, nf.flows.Flow)

    def why_left(self, layer: nn.Module) -> str:
        if type(layer) in (nf.flows.Split, nf.flows.Merge):
            return "it cuts or joins states, with nothing to compute"
        return super().why_left(layer)


ADAPTER = NormflowsAdapter()
