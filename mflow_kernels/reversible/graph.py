"""Autograd's graph of a module's run: what it depends on, and that nobody differentiates it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

STORE = "reversible=False allows it"


class Guard(torch.autograd.Function):
    """A copy of a module's input, whose graph must not be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> NoReturn:
        raise RuntimeError(
            f"ReversibleChain: the loss uses activations of {ctx.name}, as those that hooks "
            f"collect; a reversible chain has no gradient for them; {STORE}"
        )


_inner = threading.local()  # `active`: this thread differentiates a second run


@contextmanager
def without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Differentiate a second run without the hooks that users registered on these leaves.

    Autograd's outer graph runs them, once, with the whole gradient. Each hook gives way by itself,
    since other threads may run it at the same time.
    """
    for leaf in leaves:
        hooks = leaf._backward_hooks or {}
        for key, hook in list(hooks.items()):
            if not hasattr(hook, "outer_only"):
                hooks[key] = _outer_only(hook)
    before, _inner.active = getattr(_inner, "active", False), True
    try:
        yield
    finally:
        _inner.active = before


def _outer_only(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    @wraps(hook)
    def run(gradient: Tensor) -> Any:
        return None if getattr(_inner, "active", False) else hook(gradient)

    run.outer_only = True  # type: ignore[attr-defined]
    return run


def nodes_behind(outputs: Sequence[Tensor], start: int = 0) -> Iterator[Any]:
    """The nodes of autograd's graph that outputs depend on. Nodes older than `start` end it."""
    waiting: list[Any] = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        if node._sequence_nr() < start:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
