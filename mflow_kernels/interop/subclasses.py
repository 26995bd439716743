"""Accelerating a module by changing its class.

An accelerated layer is the same object, with the same parameters, buffers, children, hooks and
state dictionary. Only its class changes, to a subclass of the original class with our methods.
Decelerating it restores the original class.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from mflow_kernels.interop.adapter import load_adapter

# The key in a module's __dict__, which state dictionaries do not see.
IMPLEMENTATION = "_mflow_implementation"


def accelerate_module(module: nn.Module, folder: str, kind: str, implementation: Any) -> None:
    """Give `module` the methods that the adapter in `folder` has for modules of this kind.

    The methods find `implementation` with `implementation_of(self)`.
    """
    original: Any = type(module)
    module.__class__ = _accelerated_class(original, folder, kind)
    module.__dict__[IMPLEMENTATION] = implementation


def is_accelerated(module: nn.Module) -> bool:
    return IMPLEMENTATION in module.__dict__


def original_class(module: nn.Module) -> type:
    return type(module).__mro__[1] if is_accelerated(module) else type(module)


def decelerate_module(module: nn.Module) -> None:
    module.__class__ = original_class(module)
    del module.__dict__[IMPLEMENTATION]


def implementation_of(module: nn.Module) -> Any:
    return module.__dict__[IMPLEMENTATION]


@cache
def _accelerated_class(original: type, folder: str, kind: str) -> type:
    namespace = {
        **load_adapter(folder).methods[kind],
        "__module__": original.__module__,
        "__reduce_ex__": _reduce,
        "_mflow_kind": (folder, kind),
    }
    return type(original.__name__, (original,), namespace)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Let copies and pickles refer to the original class: the subclass cannot be imported."""
    return _rebuilt, (original_class(self), *self._mflow_kind), self.__dict__


def _rebuilt(original: type, folder: str, kind: str) -> Any:
    cls: Any = _accelerated_class(original, folder, kind)
    return cls.__new__(cls)


class FusedContainer:
    """A container in which fused sequences replace some of the layers.

    Args:
        fused: the lists of layers, by their names in the container.
    """

    def __init__(self, container: nn.Module, fused: dict[str, nn.Module]) -> None:
        self.fused = fused
        self._sources = self._layers(container)
        original: Any = original_class(container)
        self._view = original.__new__(original)
        self._refresh(container)

    def _refresh(self, container: nn.Module) -> None:
        attributes = {**container.__dict__, "_modules": {**container._modules, **self.fused}}
        attributes.pop(IMPLEMENTATION, None)
        self._view.__dict__.clear()
        self._view.__dict__.update(attributes)

    def _layers(self, container: nn.Module) -> list[nn.Module]:
        return [m for name in self.fused for m in flat(container._modules[name])]

    def view(self, container: nn.Module) -> Any:
        """Return a view of the container with the fused sequences, to run its methods on.

        If its layers have been replaced since, this returns the container itself.
        """
        if not same_modules(self._layers(container), self._sources):
            return container
        # Up to torch 2.11, compilers cannot trace this.
        if not torch.compiler.is_compiling():
            self._refresh(container)
        return self._view


def same_modules(a: Sequence[nn.Module], b: Sequence[nn.Module]) -> bool:
    """Whether two sequences have the same modules; not every compiler can trace `list.__eq__`."""
    return len(a) == len(b) and all(one is other for one, other in zip(a, b, strict=True))


def on_view(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a container that runs on its view with fused sequences."""

    @wraps(method)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        container: FusedContainer = implementation_of(self)
        return method(container.view(self), *args, **named)

    return call


def flat(layers: nn.Module | None) -> list[nn.Module]:
    """Return the layers of a list of layers, or of a list of such lists."""
    if type(layers) is not nn.ModuleList:
        return [] if layers is None else [layers]
    return [layer for child in layers for layer in flat(child)]
