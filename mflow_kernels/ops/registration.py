"""Registers operators with torch, and makes eager forms of them that bypass the dispatcher."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.launch import transformed

# The computation of each operator by its name. A walk runs it where meta tensors would skip it.
COMPUTATIONS: dict[str, Callable[..., Any]] = {}


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any] | None = None,
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    gradient: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register mflow::name and, if the gradient has a kernel, mflow::name_backward.

    Args:
        forward, backward: the computations without autograd; their annotations become the
            operators' schemas. Without `backward`, torch's operators compute the gradient.
        fake, fake_backward: return empty results of the same shapes, dtypes and layouts.
        setup: called as setup(ctx, inputs, outputs); stores in ctx the values for `gradient`.
        gradient: called as gradient(ctx, *output_gradients, run=...); returns a gradient for each
            input. `run` is the backward operator, `backward` itself, or None.

    Returns:
        The registered operator, and its eager form (see `eager_function`).
    """
    registered = torch.library.custom_op(f"mflow::{name}", forward, mutates_args=())
    registered.register_fake(fake)
    COMPUTATIONS[f"mflow::{name}"] = forward
    run = None
    if backward is not None and fake_backward is not None:
        run = torch.library.custom_op(f"mflow::{name}_backward", backward, mutates_args=())
        run.register_fake(fake_backward)
        COMPUTATIONS[f"mflow::{name}_backward"] = backward
    registered.register_autograd(partial(gradient, run=run), setup_context=setup)
    return registered, eager_function(forward, setup, partial(gradient, run=backward))


def register_elementwise(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], fake: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register an operator from (x, params, *options) to y and a ledger, as `register` does.

    Its backward operator takes (dy, dledger, x, params, *options) and returns dx and dparams.
    """

    def fake_backward(dy: Tensor, dledger: Tensor, x: Tensor, params: Tensor, *_: Any) -> Any:
        return torch.empty_like(x), torch.empty_like(params)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, params, *ctx.options = inputs
        ctx.save_for_backward(x, params)

    def gradient(ctx: Any, dy: Tensor, dledger: Tensor, run: Any) -> tuple[Tensor | None, ...]:
        grads = run(dy, dledger, *ctx.saved_tensors, *ctx.options)
        return (*grads, *(None for _ in ctx.options))

    return register(
        name, forward, backward, fake=fake, fake_backward=fake_backward, setup=setup,
        gradient=gradient,
    )  # fmt: skip


def eager_function(
    forward: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Return a differentiable `forward` that takes a quarter of the operator's time on the host.

    Compilers cannot trace the result, and its gradient cannot be differentiated again.

    Args:
        forward: takes the operator's arguments.
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
    """Raise if a gradient is about to be differentiated again.

    `once_differentiable` is not enough: it treats saved tensors as constants.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: its gradient cannot be differentiated again; use torch.func (grad, vjp, "
            "hessian), which differentiates the reference"
        )


def operator(registered: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the registered operator, or its plain `forward` if a transform is on.

    The operator works neither under forward-mode differentiation nor in transforms of torch.func.
    """
    return forward if transformed() else registered
