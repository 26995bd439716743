"""Giving a module another computation while it stays what it is.

An accelerated layer is the same object with the same parameters, buffers, children and hooks, and
so the same state dictionary; only its class is a subclass of its own that computes otherwise. To
take the acceleration back is to give it its class back.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from mflow_kernels.interop.sequence import Run

PLAN = "_mflow_plan"  # in a module's __dict__, out of reach of state dictionaries


def accelerate_module(module: nn.Module, library: str, kind: str, plan: Any) -> None:
    """Let `module` compute by `plan`, which the methods of that kind find as `plan_of(self)`."""
    original: Any = type(module)
    module.__class__ = _fast_class(original, library, kind)
    module.__dict__[PLAN] = plan


def is_accelerated(module: nn.Module) -> bool:
    return PLAN in module.__dict__


def original_class(module: nn.Module) -> type:
    return type(module).__mro__[1] if is_accelerated(module) else type(module)


def decelerate_module(module: nn.Module) -> None:
    module.__class__ = original_class(module)
    del module.__dict__[PLAN]


def plan_of(module: nn.Module) -> Any:
    return module.__dict__[PLAN]


@cache
def _fast_class(original: type, library: str, kind: str) -> type:
    """A subclass with the methods that the library's adapter has for layers of this kind."""
    methods = importlib.import_module(f"mflow_kernels.interop.{library}.adapter").METHODS[kind]
    namespace = {
        **methods,
        "__module__": original.__module__,
        "__reduce_ex__": _reduce,
        "_mflow_kind": (library, kind),
    }
    return type(original.__name__, (original,), namespace)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copies and pickles name the original class: that of the accelerated one has no name."""
    return _rebuilt, (original_class(self), *self._mflow_kind), self.__dict__


def _rebuilt(original: type, library: str, kind: str) -> Any:
    fast: Any = _fast_class(original, library, kind)
    return fast.__new__(fast)


class Fused(nn.Module):
    """Layers of a container as one run, in the interface of one layer of the library."""

    def __init__(self, layers: Sequence[nn.Module], run: Run) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = run


class FusedLists:
    """A container's lists of layers with runs in place of some.

    Attributes:
        fused: by the name that the list has in the container.
    """

    def __init__(self, container: nn.Module, fused: dict[str, nn.Module]) -> None:
        self.fused = fused
        self._sources = self._layers(container)
        original: Any = original_class(container)
        self._view = original.__new__(original)
        self._refresh(container)

    def _refresh(self, container: nn.Module) -> None:
        attributes = {**container.__dict__, "_modules": {**container._modules, **self.fused}}
        attributes.pop(PLAN, None)
        self._view.__dict__.clear()
        self._view.__dict__.update(attributes)

    def _layers(self, container: nn.Module) -> list[nn.Module]:
        return [m for name in self.fused for m in flat(container._modules[name])]

    def view(self, container: nn.Module) -> Any:
        """The container with its runs, for its own methods to walk; itself, where somebody has
        put other layers into it since."""
        now = self._layers(container)
        same = len(now) == len(self._sources)
        if not (same and all(a is b for a, b in zip(now, self._sources, strict=True))):
            return container
        # Up to torch 2.11, compilers cannot trace this.
        if not torch.compiler.is_compiling():
            self._refresh(container)
        return self._view


def flat(layers: nn.Module | None) -> list[nn.Module]:
    """The layers of a list of layers, or of a list of such lists."""
    if type(layers) is not nn.ModuleList:
        return [] if layers is None else [layers]
    return [layer for child in layers for layer in flat(child)]
