"""The visitor that accelerates the layers of one library in a model."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, repeat
from typing import Any

import torch
from torch import nn

from mflow_kernels.interop.adapter import Adapter, Piece
from mflow_kernels.interop.autoregressive import Autoregressive
from mflow_kernels.interop.costs import why_slower
from mflow_kernels.interop.fingerprints import original_of, why_untested
from mflow_kernels.interop.linear import Linear, Reorder
from mflow_kernels.interop.params import Params
from mflow_kernels.interop.parts import Coupling, Elementwise, Part, why_not
from mflow_kernels.interop.report import Left, Replaced
from mflow_kernels.interop.sequence import FusedSequence
from mflow_kernels.interop.subclasses import accelerate_module, is_accelerated
from mflow_kernels.layers.networks import has_hooks
from mflow_kernels.ops.spline import Spline
from mflow_kernels.reversible.rearrangements import SpaceToDepth


class Visitor:
    """Accelerates the layers of one library in a model, outer modules first."""

    def __init__(
        self, adapter: Adapter, reversible: bool, even_if_slower: bool, like: Mapping[type, type]
    ) -> None:
        self.adapter, self.reversible = adapter, reversible
        self.even_if_slower, self.like = even_if_slower, like
        self._unlike: dict[int, str] = {}
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._seen: set[int] = set()
        self._in_sequences: set[int] = set()

    def visit(self, module: nn.Module, name: str, reported: bool = False) -> None:
        """Accelerate `module` and the modules in it, each once.

        `reported` says that the report already names a layer around it.
        """
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if self.adapter.is_layer(module) or type(module) in self.like:
            self._visit_layer(module, name, reported)
            reported = True
        kind = next((c for c in self.adapter.containers if isinstance(module, c)), None)
        found, fused = len(self.replaced), None
        if kind is not None and not is_accelerated(module):
            fused = self._fused(module, name, kind)
        for child_name, child in module.named_children():
            self.visit(child, f"{name}.{child_name}" if name else child_name, reported)
        if kind is not None and fused is not None and len(self.replaced) > found:
            accelerate_module(module, self.adapter.folder, kind.__name__, fused)

    def _fused(self, container: nn.Module, name: str, kind: type[nn.Module]) -> Any:
        """Return what a container's methods need to run sequences; None if it is left."""
        cls, prefix = type(container), f"{name}." if name else ""
        if why := why_untested(self.adapter.fingerprints, kind):
            fused: Any = why
        elif any(
            getattr(cls, n) is not getattr(kind, n) for n in self.adapter.methods[kind.__name__]
        ):
            fused = f"it has methods of its own in place of {kind.__name__}'s"
        else:
            fused = self.adapter.fuse(container, kind, partial(self._cut, prefix))
        if isinstance(fused, str):
            self.left.append(Left(name, cls.__name__, fused))
            return None
        return fused

    def _visit_layer(self, layer: nn.Module, name: str, reported: bool) -> None:
        parts = self._parts(layer)
        class_name = type(layer).__name__
        in_sequence = id(layer) in self._in_sequences
        kind = self._kind_of(self._class_of(layer))
        if not isinstance(parts, str) and not in_sequence:
            if _only_permutes(parts):
                parts = "it only permutes the state, and would not be faster alone"
            elif kind not in self.adapter.repaired and (why := self._why_slower([layer], parts)):
                parts = why
        if isinstance(parts, str):
            if not reported:
                self.left.append(Left(name, class_name, parts))
            return
        accelerate_module(layer, self.adapter.folder, kind, self._sequence(parts))
        if not in_sequence:
            by = self.adapter.repaired.get(kind, describe(parts))
            self.replaced.append(Replaced(name, class_name, by))
        self._in_sequences.update(map(id, layer.modules()))

    def _cut(
        self,
        prefix: str,
        layers: Sequence[nn.Module],
        names: Sequence[str],
        conditions: Sequence[tuple[int, ...]] | None = None,
    ) -> list[Piece]:
        """See `cut` of `Adapter.fuse`; `prefix` comes before the names."""
        pieces: list[Piece] = []
        found = map(self._parts, layers)
        each = zip(layers, names, found, conditions or repeat(None), strict=False)
        for is_left, run in groupby(each, lambda one: isinstance(one[2], str)):
            members, own_names, own, taken = map(list, zip(*run, strict=True))
            parts: list[Part] = []
            if not is_left:
                parts = [_given(p, c) for ps, c in zip(own, taken, strict=True) for p in ps]
            if len(members) == 1 or _only_permutes(parts) or self._why_slower(members, parts):
                pieces += [([member], None) for member in members]
                continue
            pieces.append((members, self._sequence(parts)))
            self._in_sequences.update(map(id, members))
            by = f"{'one reversible run' if self.reversible else 'one run'} of {describe(parts)}"
            counts = Counter(type(m).__name__ for m in members)
            classes = ", ".join(f"{k} {n}" if k > 1 else n for n, k in counts.items())
            self.replaced.append(Replaced(prefix + own_names[0], classes, by))
        return pieces

    def _kind_of(self, cls: type) -> str:
        return self.adapter.kinds.get(cls, "layer")

    def _sequence(self, parts: Sequence[Part]) -> FusedSequence:
        return FusedSequence(parts, self.reversible)

    def _why_slower(self, layers: Sequence[nn.Module], parts: Sequence[Part]) -> str:
        """Say why a run of layers, or a layer alone, is left because it would cost more."""
        if self.even_if_slower:
            return ""
        tensors = (t for m in layers for t in (*m.parameters(), *m.buffers()))
        device = next((t.device.type for t in tensors), "cpu")
        channels = [n for n in map(self.adapter.channels_of, layers) if n is not None]
        why = why_slower(parts, max(channels, default=None), device)
        return why and f"{why} (even_if_slower=True replaces it)"

    def _parts(self, layer: nn.Module) -> tuple[Part, ...] | str:
        """Return the parts of a layer, or the reason why it is left."""
        adapter, cls = self.adapter, self._class_of(layer)
        if cls not in adapter.layers:
            return adapter.why_left(layer)
        modules = list(layer.modules())
        functions = {adapter.functions[type(m)] for m in modules if type(m) in adapter.functions}
        if why := why_untested(adapter.fingerprints, cls, modules, functions):
            return why
        if type(layer) in self.like and (why := self._why_unlike(layer, cls)):
            return why
        parts = adapter.layers[cls](layer)
        if isinstance(parts, str):
            return parts
        channels = adapter.channels_of(layer)
        if channels is not None and (why := why_not(parts, channels)):
            return why
        if has_hooks(*_bypassed(layer, parts)):
            return "it has hooks, which a fused run would not call"
        return parts

    def _class_of(self, layer: nn.Module) -> type:
        """Return the library's class that a layer has, copies, or is said to be like."""
        cls = type(layer)
        if cls in self.adapter.layers:
            return cls
        return self.like.get(cls) or original_of(self.adapter.fingerprints, cls) or cls

    def _why_unlike(self, layer: nn.Module, cls: type) -> str:
        """Say why a layer does not compute what `cls` computes, on a random state, with changed
        weights and in float64."""
        if id(layer) not in self._unlike:
            try:
                same = self._computes_as(layer, cls)
                why = "" if same else f"it computes something else than {cls.__name__}"
            except Exception as error:  # a user's class may raise anything
                why = f"it could not be compared with {cls.__name__}: {error}"
            self._unlike[id(layer)] = why
        return self._unlike[id(layer)]

    def _computes_as(self, layer: nn.Module, cls: type) -> bool:
        own = copy.deepcopy(layer).cpu().double().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in own.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            fast = copy.deepcopy(own)
            probe, parts = self.adapter.probe(own), self.adapter.layers[cls](fast)
            if probe is None:
                raise ValueError(f"layers of {self.adapter.folder} do not show their shape")
            if isinstance(parts, str):
                raise ValueError(parts)
            kind = self._kind_of(cls)
            accelerate_module(fast, self.adapter.folder, kind, FusedSequence(parts))
            pairs = zip(probe(fast), probe(own), strict=True)
            return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


def _given(part: Part, conditions: tuple[int, ...] | None) -> Part:
    """Return the part with a network that takes only these of the container's conditions."""
    if isinstance(part, Coupling) and isinstance(part.net, Params):
        return replace(part, net=part.net.given(conditions))
    return part


def _bypassed(layer: nn.Module, parts: Sequence[Part]) -> list[nn.Module]:
    """Return the modules of a layer that are no longer called: all but its networks."""
    networks = {id(m) for p in parts if isinstance(p, Coupling) for m in p.net.modules()}
    for part in parts:
        if isinstance(part, Elementwise) and isinstance(part.layer, Autoregressive):
            networks |= {id(m) for m in part.layer.net.modules()}
    return [m for m in layer.modules() if id(m) not in networks]


def _only_permutes(parts: Sequence[Part]) -> bool:
    """Whether the parts only permute values, so that a launch would gain nothing."""
    return all(
        isinstance(p, SpaceToDepth) or (isinstance(p, (Linear, Reorder)) and p.permutes)
        for p in parts
    )


def describe(parts: Sequence[Part]) -> str:
    """Return the number of parts of each type, in words."""
    counts = Counter(map(_word, parts))
    return ", ".join(f"{k} {n}s" if k > 1 else n for n, k in counts.items())


def _word(part: Part) -> str:
    if isinstance(part, SpaceToDepth):
        return "unsqueeze" if part.inverted else "squeeze"
    if isinstance(part, (Linear, Reorder, Elementwise)):
        return part.what
    if isinstance(part.scale, Spline):
        return "spline coupling"
    additive = isinstance(part.net, Params) and part.net.raw is None
    return "additive coupling" if additive else f"affine {part.scale.kind} coupling"
