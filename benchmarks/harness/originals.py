"""Models of other libraries: a training step of each, as it is and by this package."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness.measurements import Call
from benchmarks.harness.models import assert_gradient_close
from benchmarks.harness.session import Bench, Measured
from mflow_kernels.testing import assert_close

ROUNDS = 7


class Original(NamedTuple):
    """A model of another library, and what to compare its variants with.

    Attributes:
        products: number of products behind one element of the gradient.
        how: options of `assert_close` for the loss.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    products: int
    how: dict[str, Any]


Build = Callable[[torch.device], Original]


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


def assert_trains_alike(model: nn.Module, original: Original, name: str) -> None:
    """Assert that the loss, and its gradient of the first input, equal those of the original in
    float64."""
    first, *others = original.inputs
    x, wide = first.clone().requires_grad_(), first.double().requires_grad_()
    loss = loss_of(model, x, *others)
    exact = copy.deepcopy(original.model).double()
    want = loss_of(exact, wide, *(t.double() for t in others))
    loss.backward()
    want.backward()
    assert_close(loss.detach(), want.detach(), name=f"{name}: loss", **original.how)
    assert x.grad is not None
    assert wide.grad is not None
    assert_gradient_close(x.grad, wide.grad, original.products, name)


def measure(
    bench: Bench,
    variants: Sequence[str],
    build: Build,
    variant_of: Callable[[nn.Module, str], nn.Module],
    about: Callable[[nn.Module, str], dict[str, Any]],
    *,
    workers: int,
    memory: bool = True,
) -> Measured:
    """Measure time and peak memory of a training step, for every variant that agrees.

    Args:
        build: returns the original on a device.
        variant_of: makes a variant of the original.
        about: returns what to save with a variant.
        workers: processes at once that measure peaks.
    """
    measured = Measured()
    original = build(bench.device)

    def make(variant: str) -> Callable[[], Call]:
        model = variant_of(original.model, variant)
        assert_trains_alike(model, original, variant)
        measured.extra[variant] = about(model, variant)
        return lambda: partial(train, model, *original.inputs)

    made = measured.compare(bench, variants, make, ROUNDS)
    if memory:
        measured.add_peaks(bench, [*made], _step_of, build, variant_of, workers=workers)
    return measured


def _step_of(
    build: Build,
    variant_of: Callable[[nn.Module, str], nn.Module],
    variant: str,
    device: torch.device,
) -> tuple[nn.Module, Call]:
    original = build(device)
    model = variant_of(original.model, variant)
    return model, partial(train, model, *original.inputs)
