"""Autograd's graph of a module's run: what it depends on, and that nobody differentiates it."""

from collections.abc import Iterator, Sequence
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
