"""Registers operators with torch, and makes eager forms of them that bypass the dispatcher."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from mflow_kernels.ops.fallback import FAKES
from mflow_kernels.ops.launch import transformed, use_kernels

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
) -> "Operator":
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
            `run` as described above, and differentiates the reference if gradients are recorded. A
            gradient of torch's operators alone can be differentiated as it is.

    Returns:
        The operator in its three forms.
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
    setup, gradient = setup or _save_inputs, gradient or partial(_run_backward, forward)
    registered.register_autograd(partial(gradient, run=run), setup_context=setup)
    return Operator(
        registered, eager_function(forward, setup, partial(gradient, run=backward)), forward
    )


@dataclass(frozen=True)
class Operator:
    """An operator. A call runs the form that fits the mode.

    Attributes:
        registered: what compilers and dispatch modes see.
        eager: an autograd function, which costs the host a quarter as much.
        plain: the computation without autograd; under transforms of torch.func and in forward-mode
            differentiation it runs the reference, which they differentiate.
    """

    registered: Callable[..., Any]
    eager: Callable[..., Any]
    plain: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        if transformed():
            return self.plain(*arguments)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return self.registered(*arguments)
        return (self.eager if torch.is_grad_enabled() else self.plain)(*arguments)


def _count_results(forward: Callable[..., Any]) -> int:
    return len(get_args(inspect.signature(forward).return_annotation)) or 1


def _like_tensors(results: int, *arguments: Any) -> Any:
    tensors = (t for t in arguments[results:] if isinstance(t, Tensor))
    return tuple(map(torch.empty_like, tensors))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _run_backward(
    forward: Callable[..., Any], ctx: Any, *gradients: Tensor, run: Any
) -> tuple[Tensor | None, ...]:
    tensors, options = ctx.saved_tensors, ctx.options
    if torch.is_grad_enabled():
        found = gradients_of(lambda *given: forward(*given, *options), tensors, gradients)
    else:
        found = run(*gradients, *tensors, *options)
    return (*found, *(None for _ in options))


def gradients_of(
    reference: Callable[..., Any], tensors: Sequence[Any], cotangents: Sequence[Tensor]
) -> tuple[Any, ...]:
    """The gradients of a reference's tensors, by autograd, from those of its results. They can be
    differentiated again if gradients are recorded. An argument of None has none.

    The dispatcher calls a registered operator below autograd, which then records no graph;
    `torch.func` works there.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), use_kernels("torch"):
        # Tensors may depend on each other. Autograd stops at views, which do not.
        leaves = [
            t if t is None else t.view_as(t) if again and t.requires_grad else _leaf(t)
            for t in tensors
        ]
        found = reference(*leaves)
        results = found if isinstance(found, tuple) else (found,)
    if not results[0].requires_grad:
        gradients: tuple[Tensor, ...] = torch.func.vjp(reference, *tensors)[1](cotangents)
        return gradients
    pairs = [
        # The ledger of a reference has one column; those of a kernel have equal gradients.
        (y, dy if dy.shape == y.shape else dy[:, :1])
        for y, dy in zip(results, cotangents, strict=True)
        if y.requires_grad
    ]
    inputs = [leaf for leaf in leaves if leaf is not None]
    parts = [y for y, _ in pairs], inputs, [dy for _, dy in pairs]
    of_inputs = iter(torch.autograd.grad(*parts, create_graph=again))
    return tuple(t if t is None else next(of_inputs) for t in tensors)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def eager_function(
    forward: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Return a differentiable `forward` that takes a quarter of the operator's time on the host.

    Compilers cannot trace the result.

    Args:
        forward: takes the operator's arguments.
        setup, backward: as for `register_autograd`. Gradients are recorded in `backward` if they
            are to be differentiated again.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = forward(*inputs)
            setup(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return backward(ctx, *grads)

    Eager.__name__ = Eager.__qualname__ = forward.__name__
    return Eager.apply
