"""How nflows' transforms and composites call our kernels, in nflows and in copies of it.

nflows' transforms go data -> latent in `forward` and latent -> data in `inverse`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.adapter import Adapter, Fuser
from mflow_kernels.interop.nflows.layers import channels_of, layers_of
from mflow_kernels.interop.report import Left
from mflow_kernels.interop.sequence import FusedSequence, per_sample
from mflow_kernels.interop.subclasses import (
    FusedContainer,
    FusedLayers,
    accelerate_module,
    implementation_of,
    on_view,
)


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


class NflowsAdapter(Adapter):
    """The adapter of nflows, or of a package with a copy of nflows.

    Args:
        folder: its adapter's folder.
        nt: `nflows.transforms`, or the copy of it.
        fingerprints: of its modules, by their names.
        affine: as for `layers_of`.
    """

    channels_of = staticmethod(channels_of)

    def __init__(
        self, folder: str, nt: Any, fingerprints: dict[str, set[str]], affine: tuple[type, ...] = ()
    ) -> None:
        self.folder, self.nt, self.fingerprints = folder, nt, fingerprints
        self.layers = layers_of(nt, affine)
        self.containers = (nt.CompositeTransform,)
        composite = {n: on_view(vars(nt.CompositeTransform)[n]) for n in ("forward", "inverse")}
        self.methods: Mapping[str, Mapping[str, Callable[..., Any]]] = {
            "transform": {
                "forward": _transform_method("forward", False),
                "inverse": _transform_method("inverse", True),
            },
            "actnorm": {"forward": _actnorm_forward, "inverse": _actnorm_inverse},
            "CompositeTransform": composite,
        }
        splines = (
            nt.PiecewiseRationalQuadraticCouplingTransform,
            nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            nt.PiecewiseRationalQuadraticCDF,
        )
        self.functions = dict.fromkeys(splines, f"{nt.__name__}.splines.rational_quadratic")

    def is_layer(self, module: nn.Module) -> bool:
        """A composite counts as a layer if our kernels have all of its transforms."""
        nt = self.nt
        if isinstance(module, nt.CompositeTransform):
            parts_of = self.layers.get(type(module))
            return parts_of is not None and not isinstance(parts_of(module), str)
        wrappers = (nt.MultiscaleCompositeTransform, nt.InverseTransform)
        return isinstance(module, nt.Transform) and not isinstance(module, wrappers)

    def kind_of(self, cls: type) -> str:
        return "actnorm" if cls is self.nt.ActNorm else "transform"

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
        nt, notes = self.nt, []
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
        if any(isinstance(m, nt.NaiveLinear) for m in modules) and self._solves():
            notes.append(
                "NaiveLinear has an inverse; nflows' calls torch.solve, which torch has removed."
            )
        return notes

    def _solves(self) -> bool:
        """Whether `NaiveLinear` calls torch.solve, as in release 0.14."""
        return "torch.solve" in inspect.getsource(self.nt.NaiveLinear)
