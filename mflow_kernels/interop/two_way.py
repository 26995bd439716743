"""Libraries whose layers have `forward` and `inverse`, and whose models hold them in lists.

These are nflows and its copies, where `forward` goes data -> latent, and normflows, where it goes
latent -> data.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mflow_kernels.interop.adapter import Adapter, Piece
from mflow_kernels.interop.sequence import FusedSequence
from mflow_kernels.interop.subclasses import FusedContainer, implementation_of


def per_sample(x: Tensor, log_det: Tensor) -> Tensor:
    """The log-determinants (N,) that `FusedSequence` returned for the state x."""
    return log_det if log_det.dim() else log_det.expand(x.shape[0])


def _computed(
    sequence: FusedSequence, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    return sequence(x, () if context is None else (context,), inverse=inverse)


def _named(context: Tensor | None) -> dict[str, Tensor]:
    return {} if context is None else {"context": context}


def run_layer(
    layer: nn.Module,
    name: str,
    x: Tensor,
    context: Tensor | None,
    inverse: bool,
    shape: Callable[[Tensor, Tensor], Tensor] = per_sample,
) -> tuple[Tensor, Tensor]:
    """Compute `forward` or `inverse` of an accelerated layer.

    The layer's own code runs if our kernels do not support the number of channels.

    Args:
        name: of the method.
        inverse: whether it goes latent -> data.
        shape: expands the log-determinant for a state as the layer does.
    """
    sequence: FusedSequence = implementation_of(layer)
    if not sequence.supports(x, inverse):
        own: tuple[Tensor, Tensor] = getattr(super(type(layer), layer), name)(x, **_named(context))
        return own
    x, log_det = _computed(sequence, x, context, inverse)
    return x, shape(x, log_det)


class FusedRun(nn.Module):
    """Layers of a container as one layer.

    Args:
        layers: data -> latent.
        encodes: the method that goes data -> latent: "forward" or "inverse".
    """

    def __init__(self, layers: Sequence[nn.Module], sequence: FusedSequence, encodes: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sequence, self.encodes = sequence, encodes

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run("forward", x, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run("inverse", x, context)

    def _run(self, name: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inverse = name != self.encodes
        if self.sequence.supports(x, inverse):
            x, log_det = _computed(self.sequence, x, context, inverse)
            return x, per_sample(x, log_det)
        total = x.new_zeros(len(x))
        layers: Any = self.layers
        for layer in reversed(layers) if inverse else layers:
            call = layer if name == "forward" else layer.inverse
            x, log_det = call(x, **_named(context))
            total = total + log_det
        return x, total


class TwoWayAdapter(Adapter):
    """An adapter of such a library.

    Attributes:
        encodes: as for `FusedRun`. If it is "inverse", lists of layers go latent -> data.
        listed: the name of a container's list of layers, or of such lists.
    """

    encodes: str
    listed: str

    def fuse(
        self, container: nn.Module, kind: type[nn.Module], cut: Callable[..., list[Piece]]
    ) -> Any:
        fused = self._fused(container._modules[self.listed], self.listed, cut)
        if any(isinstance(m, FusedRun) for m in fused.modules()):
            return FusedContainer(container, {self.listed: fused})
        return None

    def _fused(self, layers: Any, name: str, cut: Callable[..., list[Piece]]) -> nn.ModuleList:
        names = [f"{name}.{i}" for i in range(len(layers))]
        if any(type(layer) is nn.ModuleList for layer in layers):
            return nn.ModuleList(map(self._fused, layers, names, [cut] * len(names)))
        along = slice(None) if self.encodes == "forward" else slice(None, None, -1)
        made = [
            members[0] if sequence is None else FusedRun(members, sequence, self.encodes)
            for members, sequence in cut(list(layers)[along], names[along])
        ]
        return nn.ModuleList(made[along])
