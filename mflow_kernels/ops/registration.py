"""Registers operators with torch, and makes eager forms of them that bypass the dispatcher."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from mflow_kernels.ops.fallback import FAKES
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
    setup: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    gradient: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register mflow::name and, if the gradient has a kernel, mflow::name_backward.

    Args:
        forward, backward: the computations without autograd; their annotations become the
            operators' schemas. `forward` takes tensors, then options. `backward` takes the
            gradients of its results, then the same arguments, and returns the gradients of the
            tensors. Without `backward`, torch's operators compute the gradient.
        fake, fake_backward: return empty results of the same shapes, dtypes and layouts. By
            default, gradients are like their tensors.
        setup: called as setup(ctx, inputs, outputs); stores in ctx the values for `gradient`. By
            default all inputs.
        gradient: called as gradient(ctx, *output_gradients, run=...); returns a gradient for each
            input. `run` is the backward operator, `backward` itself, or None. By default it calls
            `run` as described above.

    Returns:
        The registered operator, and its eager form (see `eager_function`).
    """
    registered = torch.library.custom_op(f"mflow::{name}", forward, mutates_args=())
    registered.register_fake(fake)
    FAKES[name] = fake
    COMPUTATIONS[f"mflow::{name}"] = forward
    run = None
    if backward is not None:
        run = torch.library.custom_op(f"mflow::{name}_backward", backward, mutates_args=())
        FAKES[f"{name}_backward"] = fake_backward or partial(_like_tensors, _count_results(forward))
        run.register_fake(FAKES[f"{name}_backward"])
        COMPUTATIONS[f"mflow::{name}_backward"] = backward
    setup, gradient = setup or _save_inputs, gradient or _run_backward
    registered.register_autograd(partial(gradient, run=run), setup_context=setup)
    return registered, eager_function(forward, setup, partial(gradient, run=backward))


def _count_results(forward: Callable[..., Any]) -> int:
    return len(get_args(inspect.signature(forward).return_annotation)) or 1


def _like_tensors(results: int, *arguments: Any) -> Any:
    tensors = (t for t in arguments[results:] if isinstance(t, Tensor))
    return tuple(map(torch.empty_like, tensors))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _run_backward(ctx: Any, *gradients: Tensor, run: Any) -> tuple[Tensor | None, ...]:
    found = run(*gradients, *ctx.saved_tensors, *ctx.options)
    return (*found, *(None for _ in ctx.options))


def gradients_of(
    reference: Callable[..., Any], tensors: Sequence[Tensor], cotangents: Any
) -> tuple[Tensor, ...]:
    """The gradients of a reference's tensors, by autograd, from those of its results, a tuple.

    The dispatcher calls a registered operator below autograd, which then records no graph;
    `torch.func` works there.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in tensors]
        results = reference(*leaves)
    if not results[0].requires_grad:
        found: tuple[Tensor, ...] = torch.func.vjp(reference, *tensors)[1](cotangents)
        return found
    return torch.autograd.grad(results, leaves, cotangents)


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
