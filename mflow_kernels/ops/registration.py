"""How an operator becomes known to torch, and its eager form without the dispatcher."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.launch import transformed


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    gradient: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register mflow::name and mflow::name_backward.

    Args:
        forward, backward: without autograd; their annotations are the operators' schemas.
        fake, fake_backward: empty results of their shapes, dtypes and layouts.
        setup: keeps in ctx what `gradient` needs: (ctx, inputs, outputs).
        gradient: (ctx, *grads of the outputs, run=) to a gradient for each input, by `run`, which
            is the backward operator or `backward` itself.

    Returns:
        The registered operator, and the operator as `eager_function`.
    """
    operator = torch.library.custom_op(f"mflow::{name}", forward, mutates_args=())
    backward_operator = torch.library.custom_op(
        f"mflow::{name}_backward", backward, mutates_args=()
    )
    operator.register_fake(fake)
    backward_operator.register_fake(fake_backward)
    operator.register_autograd(partial(gradient, run=backward_operator), setup_context=setup)
    return operator, eager_function(forward, setup, partial(gradient, run=backward))


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
            refuse_second_derivative(forward.__name__)
            return backward(ctx, *grads)

    Eager.__name__ = Eager.__qualname__ = forward.__name__
    return Eager.apply


def refuse_second_derivative(name: str) -> None:
    """Where a gradient is to be differentiated again. `once_differentiable` would not do: it lets
    through, as constant, what saved tensors carry."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: its gradient cannot be differentiated again; those of torch.func (grad, vjp, "
            "hessian), which run the reference, can"
        )


def operator(registered: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """The registered operator; or its plain `forward` where forward-mode differentiation or a
    transform is on, which the operator does not pass on."""
    return forward if transformed() else registered
