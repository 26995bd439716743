"""Models of other libraries: a training step of each, as it is and by this package."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.measurements import Call
from benchmarks.harness.models import assert_gradient_close
from benchmarks.harness.session import Bench, Measured
from mflow_kernels.testing import assert_close

ROUNDS = 7
Build = Callable[[torch.device], tuple[nn.Module, tuple[Tensor, ...]]]


def loss_of(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Return the negative log-likelihood per sample in nats, without its constant."""
    if hasattr(model, "forward_kld"):  # a model of normflows includes the base distribution
        return model.forward_kld(*inputs)
    z, logdet = model(*inputs)
    return (z.flatten(1).square().sum(1) / 2 - logdet).mean()


def train(model: nn.Module, *inputs: Tensor) -> None:
    """Run forward and backward, without the optimizer step, which is the same for all."""
    model.zero_grad()
    loss_of(model, *inputs).backward()


def assert_trains_alike(
    model: nn.Module,
    original: nn.Module,
    inputs: Sequence[Tensor],
    products: int,
    name: str,
    **how: Any,
) -> None:
    """Assert that the loss, and its gradient of the first input, equal those of the original in
    float64.

    Args:
        products: number of products behind one element of the gradient.
        how: options of `assert_close` for the loss.
    """  # fmt: skip
    x, wide = inputs[0].clone().requires_grad_(), inputs[0].double().requires_grad_()
    loss = loss_of(model, x, *inputs[1:])
    want = loss_of(copy.deepcopy(original).double(), wide, *(t.double() for t in inputs[1:]))
    loss.backward()
    want.backward()
    assert_close(loss.detach(), want.detach(), name=f"{name}: loss", **how)
    assert x.grad is not None
    assert wide.grad is not None
    assert_gradient_close(x.grad, wide.grad, products, name)


def measure(
    bench: Bench,
    variants: Sequence[str],
    build: Build,
    variant_of: Callable[[nn.Module, str], nn.Module],
    check: Callable[[nn.Module, nn.Module, tuple[Tensor, ...], str], None],
    about: Callable[[nn.Module, str], dict[str, Any]],
    *,
    workers: int,
) -> Measured:
    """Measure time and peak memory of a training step, for every variant that passes its check.

    Args:
        build: returns the original on a device, and its inputs.
        variant_of: makes a variant of the original.
        check: called as check(model, original, inputs, variant). Raises AssertionError if the
            results differ.
        about: returns what to save with a variant.
        workers: processes at once that measure peaks.
    """
    measured = Measured()
    original, inputs = build(bench.device)

    def make(variant: str) -> Callable[[], Call]:
        model = variant_of(original, variant)
        check(model, original, inputs, variant)
        measured.extra[variant] = about(model, variant)
        return lambda: partial(train, model, *inputs)

    made = measured.compare(bench, variants, make, ROUNDS)
    measured.add_peaks(bench, [*made], _step_of, build, variant_of, workers=workers)
    return measured


def _step_of(
    build: Build,
    variant_of: Callable[[nn.Module, str], nn.Module],
    variant: str,
    device: torch.device,
) -> tuple[nn.Module, Call]:
    original, inputs = build(device)
    model = variant_of(original, variant)
    return model, partial(train, model, *inputs)
