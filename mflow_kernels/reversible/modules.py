"""The modules and tensors of a network or layer that runs twice, and what its first run showed."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Known:
    """What the first run of a module showed, in the modes in which it ran.

    Attributes:
        others: the leaves that it depends on and does not own.
        inner: the shapes of leaves that it made and that did not outlive the run.
        plain: whether it has modules of torch alone, which use no tensors but their own.
        changes_input: whether it changes its input in place. It then gets a copy.
        keeps_graph: whether its tensors outlived the run, as when hooks collect activations. Each
            run then records a graph that refuses to be differentiated.
        draws: whether it draws random numbers; None until the two runs have been compared.
    """

    others: list["weakref.ref[Tensor]"]
    inner: set[torch.Size] = field(default_factory=set)
    plain: bool = False
    changes_input: bool = False
    keeps_graph: bool = False
    draws: bool | None = None


@contextmanager
def trained(changed: Sequence[tuple[Tensor, bool]]) -> Iterator[None]:
    """Set whether these parameters require gradients."""
    for p, flag in changed:
        p.requires_grad_(flag)
    try:
        yield
    finally:
        for p, flag in changed:
            p.requires_grad_(not flag)


def versions(context: Sequence[Any]) -> list[int]:
    """Counts of the changes in place of tensors."""
    return [c._version for c in context if isinstance(c, Tensor) and not c.is_inference()]


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all modules in it, each once."""
    if isinstance(module, torch.jit.ScriptModule):
        return list(module.modules())
    modules = {module: None}
    waiting = [module]
    for m in waiting:  # `module.modules()` takes three times as long
        for child in m._modules.values():
            if child is not None and child not in modules:
                modules[child] = None
                waiting.append(child)
    return waiting


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Its own parameters, without those of the modules in it."""
    if isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_parameters(recurse=False))
    return module._parameters  # type: ignore[return-value]


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Its own buffers, without those of the modules in it."""
    if isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_buffers(recurse=False))
    return module._buffers  # type: ignore[return-value]


def tensors(result: Any) -> list[Tensor]:
    """The tensors that a module returned."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [t for t in parts if isinstance(t, Tensor)]


def detached(result: Any) -> Any:
    """What a module returned, without autograd's graph."""
    if isinstance(result, (tuple, list)):
        return type(result)(map(detached, result))
    return result.detach() if isinstance(result, Tensor) else result
