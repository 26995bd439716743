"""`accelerate` and `decelerate`: find what ours express in a model of another library."""

import importlib
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

from torch import nn

from mflow_kernels.interop.fingerprints import why_untested
from mflow_kernels.interop.linear import Linear, Reorder
from mflow_kernels.interop.params import Pair, Params
from mflow_kernels.interop.report import Left, Replaced, Report
from mflow_kernels.interop.sequence import Coupling, Part, Run, why_not
from mflow_kernels.interop.subclasses import (
    accelerate_module,
    decelerate_module,
    is_accelerated,
)
from mflow_kernels.layers.networks import has_hooks
from mflow_kernels.reversible.program import Squeezing

_ADAPTERS = {"normflows": "normflows", "nflows": "nflows", "FrEIA": "freia"}


def accelerate(model: nn.Module, *, reversible: bool = False) -> Report:
    """Let the layers of a normflows, nflows or FrEIA model compute by ours, in place.

    Modules, parameters, buffers, names and interfaces stay what they are, and so do state
    dictionaries, optimizers and copies: only the computation is another one. Layers that one of
    ours does not express exactly run as before, and so do those of a version of their library that
    was not tested. A model that was accelerated before is so anew.

    Args:
        model: of one of these libraries, or any module that has such models or layers in it.
        reversible: rebuild the states inside runs of layers in the backward pass, in place of
            keeping them: memory does not grow with the number of steps, networks run once more.

    Returns:
        What was replaced by what, what was left and why, and in which the accelerated model differs
        from the original on purpose.

    Raises:
        TypeError: where `model` is no module.
    """
    decelerate(model)
    libraries = {library for m in model.modules() for library in _library_of(m)}
    if not libraries:
        why = "no layer of normflows, nflows or FrEIA"
        return Report("", (), (Left("", type(model).__name__, why),), ())
    replaced: list[Replaced] = []
    left: list[Left] = []
    notes: list[str] = []
    named = []
    for library in sorted(libraries):
        adapter = importlib.import_module(f"mflow_kernels.interop.{_ADAPTERS[library]}.adapter")
        walk = Walk(adapter, reversible)
        walk.visit(model, "")
        replaced += walk.replaced
        left += walk.left
        notes += adapter.notes_of([m for m in model.modules() if is_accelerated(m)])
        named.append(f"{library} {_version(library)}")
    if replaced:
        notes.append(
            "Gradients cannot be differentiated again (create_graph=True says so); those that "
            "torch.func takes can."
        )
    return Report(", ".join(named), tuple(replaced), tuple(left), tuple(notes))


def decelerate(model: nn.Module) -> None:
    """Give every accelerated layer of the model its own computation back, with the weights as they
    are now."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if is_accelerated(module):
            decelerate_module(module)


def _library_of(module: nn.Module) -> list[str]:
    roots = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    return [library for library in _ADAPTERS if library in roots]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "of no version"


class Walk:
    """One library's layers in a model, from the top down."""

    def __init__(self, adapter: ModuleType, reversible: bool) -> None:
        self.adapter, self.reversible = adapter, reversible
        self.library = adapter.__name__.split(".")[-2]
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._seen: set[int] = set()
        self._in_runs: set[int] = set()

    def visit(self, module: nn.Module, name: str, told: bool = False) -> None:
        """Replace what can be in `module`, once; `told` where the report says already that a layer
        around it is left."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if self.adapter.is_layer(module):
            parts = self._parts(module)
            in_run = id(module) in self._in_runs
            layer = type(module).__name__
            if not isinstance(parts, str) and not in_run and _gains_nothing(parts):
                parts = "alone it only moves the state"
            if not isinstance(parts, str):
                kind = self.adapter.kind_of(module)
                accelerate_module(module, self.library, kind, Run(parts, self.reversible))
                if not in_run:
                    guarded: dict[str, str] = getattr(self.adapter, "GUARDED", {})
                    self.replaced.append(Replaced(name, layer, guarded.get(kind, describe(parts))))
                self._in_runs.update(map(id, module.modules()))
            elif not told:
                self.left.append(Left(name, layer, parts))
            told = True
        container = next((c for c in self.adapter.CONTAINERS if isinstance(module, c)), None)
        if container is not None and not is_accelerated(module):
            if why := why_untested(container):
                self.left.append(Left(name, type(module).__name__, why))
            else:
                self.adapter.fuse(module, name, container, self)
        for child_name, child in module.named_children():
            self.visit(child, f"{name}.{child_name}" if name else child_name, told)

    def runs(
        self,
        layers: Sequence[nn.Module],
        names: Sequence[str],
        conditions: Sequence[tuple[int, ...]] | None = None,
    ) -> list[tuple[list[nn.Module], Run | None]]:
        """Layers one after the other, data -> latent, cut into runs and layers that stay alone.

        `conditions` says for each layer which of the container's conditions it takes.
        """
        cut: list[tuple[list[nn.Module], Run | None]] = []
        members: list[nn.Module] = []
        parts: list[Part] = []
        name = ""
        chosen: Sequence[tuple[int, ...] | None] = conditions or [None] * len(layers)
        for layer, path, some in (*zip(layers, names, chosen, strict=True), (None, "", None)):
            of = "" if layer is None else self._parts(layer)
            if not isinstance(of, str) and layer is not None:
                name = name or path
                members.append(layer)
                parts += of if some is None else [_given(part, some) for part in of]
                continue
            if len(members) > 1 and not _gains_nothing(parts):
                cut.append((members, Run(parts, self.reversible)))
                self._in_runs.update(map(id, members))
                counts = Counter(type(m).__name__ for m in members)
                what = ", ".join(f"{k} {n}" if k > 1 else n for n, k in counts.items())
                run = "one reversible run" if self.reversible else "one run"
                self.replaced.append(Replaced(name, what, f"{run} of {describe(parts)}"))
            else:
                cut += [([member], None) for member in members]
            if layer is not None:
                cut.append(([layer], None))
            members, parts, name = [], [], ""
        return cut

    def replaces(self, layer: nn.Module) -> bool:
        """Whether a layer will compute by ours, alone if not in a run."""
        parts = self._parts(layer)
        return not isinstance(parts, str) and not _gains_nothing(parts)

    def _parts(self, layer: nn.Module) -> tuple[Part, ...] | str:
        """What a layer is in ours, or why it stays."""
        if type(layer) not in self.adapter.LAYERS:
            return str(self.adapter.why_left(layer))
        if why := why_untested(type(layer), layer.modules()):
            return why
        parts: tuple[Part, ...] | str = self.adapter.LAYERS[type(layer)](layer)
        if isinstance(parts, str):
            return parts
        channels = self.adapter.channels_of(layer)
        if channels is not None and (why := why_not(parts, channels)):
            return why
        if has_hooks(*_bypassed(layer, parts)):
            return "it has hooks, which a fused run would not call"
        return parts


def _given(part: Part, conditions: tuple[int, ...]) -> Part:
    """A coupling whose network takes these of a run's conditions."""
    if isinstance(part, Coupling) and isinstance(part.net, Params | Pair):
        return replace(part, net=part.net.given(conditions))
    return part


def _bypassed(layer: nn.Module, parts: Sequence[Part]) -> list[nn.Module]:
    """The modules of a layer that are not called once it is accelerated: all but networks."""
    networks = {id(m) for p in parts if isinstance(p, Coupling) for m in p.net.modules()}
    return [m for m in layer.modules() if id(m) not in networks]


def _gains_nothing(parts: Sequence[Part]) -> bool:
    return all(
        isinstance(p, Squeezing) or (not isinstance(p, Coupling) and p.permutes) for p in parts
    )


def describe(parts: Sequence[Part]) -> str:
    """In words, how many of each."""
    counts = Counter(map(_word, parts))
    return ", ".join(f"{k} {n}s" if k > 1 else n for n, k in counts.items())


def _word(part: Part) -> str:
    if isinstance(part, Squeezing):
        return "squeeze"
    if isinstance(part, Linear | Reorder):
        return part.what
    additive = isinstance(part.net, Params) and part.net.raw is None
    return "additive coupling" if additive else f"affine {part.scale.kind} coupling"
