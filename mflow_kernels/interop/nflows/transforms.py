"""How nflows' transforms and composites call our kernels, in nflows and in copies of it.

nflows' transforms go data -> latent in `forward` and latent -> data in `inverse`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.adapter import instance_of
from mflow_kernels.interop.nflows.layers import channels_of, layers_of
from mflow_kernels.interop.subclasses import implementation_of, on_view
from mflow_kernels.interop.two_way import TwoWayAdapter, run_layer


def _transform_method(name: str) -> Callable[..., Any]:
    def call(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        return run_layer(self, name, inputs, context, inverse=name == "inverse")

    return call


def _actnorm_forward(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    implementation_of(self).initialize_from(inputs, inverse=False)
    # exp(s) x + b is the inverse of exp(-s) (x - b).
    return ops.actnorm_inverse(inputs, -self.shift, -self.log_scale)


def _actnorm_inverse(self: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    return ops.actnorm(inputs, -self.shift, -self.log_scale)


class NflowsAdapter(TwoWayAdapter):
    """The adapter of nflows, or of a package with a copy of nflows.

    Args:
        folder: its adapter's folder.
        nt: `nflows.transforms`, or the copy of it.
        fingerprints: of its modules, by their names.
        affine: as for `layers_of`.
    """

    encodes, listed = "forward", "_transforms"
    channels_of = staticmethod(channels_of)

    def __init__(
        self, folder: str, nt: Any, fingerprints: dict[str, set[str]], affine: tuple[type, ...] = ()
    ) -> None:
        self.folder, self.nt, self.fingerprints = folder, nt, fingerprints
        self.layers = layers_of(nt, affine)
        self.containers = (nt.CompositeTransform,)
        both = ("forward", "inverse")
        self.methods = {
            "layer": {name: _transform_method(name) for name in both},
            "actnorm": {"forward": _actnorm_forward, "inverse": _actnorm_inverse},
            "CompositeTransform": {n: on_view(vars(nt.CompositeTransform)[n]) for n in both},
        }
        self.kinds = {nt.ActNorm: "actnorm"}
        splines = (
            nt.PiecewiseRationalQuadraticCouplingTransform,
            nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            nt.PiecewiseRationalQuadraticCDF,
        )
        self.functions = dict.fromkeys(splines, f"{nt.__name__}.splines.rational_quadratic")
        self.notes = [
            (
                "ActNorm keeps the scale of a channel that is constant in its first batch; nflows' "
                "turns to NaN.",
                instance_of(nt.ActNorm),
            ),
            (
                "A spline of [0, 1] returns NaN for an element outside; nflows raises an error.",
                lambda m: isinstance(m, nt.Transform) and getattr(m, "tails", "linear") is None,
            ),
        ]
        if "torch.solve" in inspect.getsource(nt.NaiveLinear):  # as in release 0.14
            self.notes.append(
                (
                    "NaiveLinear has an inverse; nflows' calls torch.solve, which torch removed.",
                    instance_of(nt.NaiveLinear),
                )
            )

    def is_layer(self, module: nn.Module) -> bool:
        """A composite counts as a layer if our kernels have all of its transforms."""
        nt = self.nt
        if isinstance(module, nt.CompositeTransform):
            parts_of = self.layers.get(type(module))
            return parts_of is not None and not isinstance(parts_of(module), str)
        wrappers = (nt.MultiscaleCompositeTransform, nt.InverseTransform)
        return isinstance(module, nt.Transform) and not isinstance(module, wrappers)
