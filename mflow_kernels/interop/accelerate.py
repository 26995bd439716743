"""`accelerate` and `decelerate`: models of other libraries, computed by our kernels."""

import importlib.metadata
from collections.abc import Mapping

from torch import nn

from mflow_kernels.interop.adapter import LIBRARIES, load_adapter
from mflow_kernels.interop.report import Left, Replaced, Report
from mflow_kernels.interop.subclasses import decelerate_module, is_accelerated
from mflow_kernels.interop.visitor import Visitor


def accelerate(
    model: nn.Module,
    *,
    reversible: bool = False,
    like: Mapping[type, type] | None = None,
    even_if_slower: bool = False,
) -> Report:
    """Make a model of one of these libraries compute with our kernels, in place: normflows, nflows,
    glasflow, zuko and FrEIA.

    Modules, parameters, buffers, names and interfaces stay the same, and therefore state
    dictionaries, optimizers and copies do too; only the computation changes. A layer is left
    unchanged if our kernels cannot compute it exactly, if its library's version was not tested, or
    if a replacement would cost more on the device of its weights (see `costs.py`).
    A second call accelerates the model again.

    Args:
        model: a model of one of these libraries, or any module that contains such models or layers.
        reversible: in the backward pass, rebuild the states inside sequences of layers instead of
            storing them, except every eighth one. Networks run twice, and their activations are not
            stored. A run of few couplings, or whose networks have many weights for each number of a
            batch, gains little memory, and an autoregressive spline needs a pass of its network for
            each dimension (docs/interop.md).
        like: classes of your own that compute what a class of FrEIA computes, with the same
            attributes, as {MyBlock: Fm.AllInOneBlock}. Each layer is compared with its replacement
            on a random state, and left if the values differ.
        even_if_slower: also replace layers that would cost more. With `reversible`, vector flows
            then take little memory, at more than the original's time.

    Returns:
        A report: the replaced layers, the other layers with the reasons, and the intended
        differences from the original model.

    Raises:
        TypeError: `model` is not a module, or `like` does not map classes to layers of FrEIA.
    """
    decelerate(model)
    like = _checked(like)
    libraries = {library for m in model.modules() for library in _libraries_of(m)}
    if not libraries:
        *names, last = map(_distribution, LIBRARIES)
        why = f"it has no layer of {', '.join(names)} or {last}"
        return Report("", (), (Left("", type(model).__name__, why),), ())
    replaced: list[Replaced] = []
    left: list[Left] = []
    notes: list[str] = []
    for library in sorted(libraries):
        adapter = load_adapter(LIBRARIES[library])
        visitor = Visitor(adapter, reversible, even_if_slower, like)
        visitor.visit(model, "")
        replaced += visitor.replaced
        left += visitor.left
        accelerated = [m for m in model.modules() if is_accelerated(m)]
        notes += [text for text, is_about in adapter.notes if any(map(is_about, accelerated))]
    versions = ", ".join(
        f"{name} {_version(name)}" for name in sorted(map(_distribution, libraries))
    )
    return Report(versions, tuple(replaced), tuple(left), tuple(notes))


def decelerate(model: nn.Module) -> None:
    """Restore the original computation of every accelerated layer. Weights do not change.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if is_accelerated(module):
            decelerate_module(module)


def _checked(like: Mapping[type, type] | None) -> Mapping[type, type]:
    for cls, known in (like or {}).items():
        if not (isinstance(cls, type) and isinstance(known, type) and _is_freia(known)):
            raise TypeError(f"like: expected classes, the second of FrEIA; got {cls!r}: {known!r}")
    return like or {}


def _is_freia(cls: type) -> bool:
    return cls.__module__.startswith("FrEIA.") and cls in load_adapter("freia").layers


def _libraries_of(module: nn.Module) -> list[str]:
    modules = [f"{cls.__module__}." for cls in type(module).__mro__]
    return [name for name in LIBRARIES if any(m.startswith(f"{name}.") for m in modules)]


def _distribution(library: str) -> str:
    return library.partition(".")[0]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
