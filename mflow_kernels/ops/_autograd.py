"""Operators without the dispatcher, for autograd alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops._launch import forward_mode


def eager_function(
    forward: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """A differentiable `forward` that costs the host a quarter of what the registered operator
    does: compilers cannot take it, and its gradient cannot be differentiated again.

    Args:
        forward: takes what the operator takes.
        setup, backward: as for `register_autograd`.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = forward(*inputs)
            setup(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                # `once_differentiable` would let through, as constant, what saved tensors carry.
                raise RuntimeError(
                    f"{forward.__name__}: its gradient cannot be differentiated again; those of "
                    "torch.func (grad, vjp, hessian), which run the reference, can"
                )
            return backward(ctx, *grads)

    Eager.__name__ = Eager.__qualname__ = forward.__name__
    return Eager.apply


def operator(registered: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """The registered operator; or, since it passes no tangents, its plain `forward` where
    forward-mode differentiation is on."""
    return forward if forward_mode() else registered
