"""Comparisons of accelerated models with their originals, for the tests of all libraries."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mflow_kernels.interop import Report, accelerate, decelerate
from mflow_kernels.interop.adapter import Adapter
from mflow_kernels.interop.subclasses import is_accelerated
from mflow_kernels.testing import assert_close

Results = dict[str, Tensor]  # outputs and log-determinants of a model, by name


def perturbed(model: nn.Module, by: float = 0.1, seed: int = 1) -> nn.Module:
    """Perturb every trainable parameter in place, so that no network is zero; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def assert_equals_original(
    model: nn.Module,
    results: Callable[[nn.Module], Results],
    terms: int,
    *,
    reversible: bool = False,
) -> nn.Module:
    """Assert that an accelerated copy has the values and gradients of the model; return the copy.

    Both run in their own dtype. Float32 results may differ by the rounding of a float32 sum of
    `terms` terms, float64 results by 1e-10.
    """
    fast = copy.deepcopy(model)
    report = accelerate(fast, reversible=reversible)
    assert report.replaced, str(report)
    got, want = results(fast), results(model)
    assert got.keys() == want.keys()
    for name in got:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        _assert_equal(got[name], want[name], terms, name)
    assert_equal_gradients(fast, model, results, terms)
    return fast


def assert_equal_gradients(
    fast: nn.Module, model: nn.Module, results: Callable[[nn.Module], Results], terms: int
) -> None:
    """Assert that a fixed combination of all results has equal gradients, and that it has some."""
    for m in (fast, model):
        m.zero_grad()
        generator = torch.Generator().manual_seed(2)
        total = sum(
            (r * torch.randn(r.shape, generator=generator).to(r.dtype)).sum()
            for r in results(m).values()
        )
        assert isinstance(total, Tensor)
        total.backward()
    compared = 0
    for (name, p), (same, q) in zip(fast.named_parameters(), model.named_parameters(), strict=True):
        assert name == same
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            _assert_equal(p.grad, q.grad, terms, f"d {name}")
            compared += 1
    assert compared


def input_gradient(x: Tensor, outputs: list[Tensor]) -> Tensor:
    """The gradient of a fixed combination of outputs, for the state or a condition."""
    total = sum(
        (y * torch.arange(1.0, y.numel() + 1).cos().to(y).view_as(y)).sum() for y in outputs
    )
    assert isinstance(total, Tensor)
    (grad,) = torch.autograd.grad(total, x, retain_graph=True)
    return grad


def _assert_equal(got: Tensor, want: Tensor, terms: int, name: str) -> None:
    if want.dtype == torch.float64:
        error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
        assert error < 1e-10, f"{name}: {error:.1e}"
    else:
        # Both sides round like a sum of `terms` terms.
        assert_close(got, want, terms=4 * terms, scale=1.0, name=name)


def assert_left_alone(model: nn.Module) -> Report:
    """Assert that no layer of a model is replaced and no attribute changes; return the report."""
    before = [(m, type(m), dict(m.__dict__)) for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = accelerate(model)
    assert not report.replaced
    assert not report.notes
    assert report.left
    assert str(report).startswith("Nothing was replaced; the model is unchanged.")
    after = list(model.modules())
    assert len(after) == len(before)
    for m, (was, kind, attributes) in zip(after, before, strict=True):
        assert m is was
        assert type(m) is kind
        assert m.__dict__.keys() == attributes.keys()
        assert all(m.__dict__[name] is value for name, value in attributes.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return report


def assert_untested_code_is_left(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch, model: nn.Module
) -> None:
    """Assert that every accelerated class has a fingerprint, and that other code is left alone."""
    for cls in (*adapter.layers, *adapter.containers):
        assert cls.__module__ in adapter.fingerprints, cls
    for name in adapter.fingerprints:
        monkeypatch.setitem(adapter.fingerprints, name, set())
    assert "is not that of a tested version" in str(assert_left_alone(model))


def assert_checkpoints_and_copies(
    model: nn.Module, fast: nn.Module, value: Callable[[nn.Module], Tensor], pickles: bool = True
) -> None:
    """Assert that checkpoints, copies and deceleration of an accelerated model work.

    - It has the parameters that it had before, and loads a checkpoint of the original.
    - Copies, and with `pickles` also pickles, compute the same, with weights of their own.
    - Decelerated, it has the original classes and computes what the original does.

    Args:
        model, fast: two models of the same architecture; `fast` is accelerated.
        value: computes the result to compare.
    """
    perturbed(fast, seed=7)
    parameters = [id(p) for p in fast.parameters()]
    accelerate(fast)
    assert [id(p) for p in fast.parameters()] == parameters
    assert not same_state(fast, model)
    fast.load_state_dict(model.state_dict())
    assert same_state(fast, model)
    want = value(model)
    torch.testing.assert_close(value(fast), want)
    copies = [copy.deepcopy(fast)]
    if pickles:
        copies.append(pickle.loads(pickle.dumps(fast)))
    for copied in copies:
        assert classes(copied) == classes(fast)
        torch.testing.assert_close(value(copied), want)
        perturbed(copied)  # must not change the original
        assert not torch.equal(value(copied), value(fast))
    decelerate(fast)
    assert classes(fast) == classes(model)
    assert not any(map(is_accelerated, fast.modules()))
    assert torch.equal(value(fast), want)


def assert_exports(call: Callable[..., tuple[Any, Tensor]], *inputs: Any) -> None:
    """Assert that torch.export exports a method of a model, and that the program equals it."""

    class Exported(nn.Module):
        def forward(self, *inputs: Any) -> tuple[Any, Tensor]:
            return call(*inputs)

    with torch.no_grad():
        program = torch.export.export(Exported(), inputs)
        torch.testing.assert_close(program.module()(*inputs), call(*inputs))


def train(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int) -> list[float]:
    """The losses of `steps` steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_trained_together(
    make: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor], *, reversible: bool
) -> nn.Module:
    """Assert that a model and its accelerated copy have equal losses for 20 steps; return the copy.

    In float64 they agree to 1e-7. In float32 Adam amplifies rounding, since its steps do not depend
    on the size of a gradient. There the losses may differ by ten times the difference between the
    original and the original with weights changed by one unit in the last place.
    """
    for dtype in (torch.float32, torch.float64):
        with default_dtype(dtype):
            torch.manual_seed(0)
            model = make().to(dtype)
            fast, nudged = copy.deepcopy(model), copy.deepcopy(model)
            assert accelerate(fast, reversible=reversible).replaced
            plain, accelerated = (train(m, loss, 20) for m in (model, fast))
            assert abs(plain[18] - plain[0]) > 1e-3  # the loss does fall
            bound = 1e-7
            if dtype == torch.float32:
                nudged = train(perturbed(nudged, torch.finfo(dtype).eps), loss, 20)
                bound = 1e-6 + 10 * _apart(plain, nudged)
            assert _apart(plain, accelerated) < bound
    return fast


def _apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / (1 + abs(x)) for x, y in zip(a, b, strict=True))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


def classes(model: nn.Module) -> list[Any]:
    return [type(m) for m in model.modules()]
