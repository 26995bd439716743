"""Comparisons of accelerated models with their originals, for the tests of all libraries."""

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
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
    got, want = (_with_gradients(m, results) for m in (fast, model))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        _assert_equal(got[name], value, terms, name)
    return fast


def _with_gradients(model: nn.Module, results: Callable[[nn.Module], Results]) -> Results:
    """The results of a model, and the gradients of a weighted sum of them by its parameters."""
    model.zero_grad()
    found, generator = results(model), torch.Generator().manual_seed(2)
    total = sum(
        (r * torch.randn(r.shape, generator=generator).to(r.dtype)).sum() for r in found.values()
    )
    assert isinstance(total, Tensor)
    total.backward()
    gradients = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {name: value.detach() for name, value in (found | gradients).items()}


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


def seeded(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - FrEIA draws from this generator
    return make()


class LibraryTests:
    """Tests that models of every library pass. Subclasses say how they are built and called.

    Attributes:
        models: functions that build them, by name.
        trained: the models to train, and whether reversibly.
        copied: the model to copy.
        pickles: whether its original can be pickled.
        terms: as for `assert_equals_original`, of models of vectors. Those of images have 4096.
    """

    adapter: Adapter
    models: dict[str, Callable[[], nn.Module]]
    trained: dict[str, bool]
    copied: str
    pickles = True
    terms = 256

    def inputs(self, model: Any, n: int = 8, seed: int = 3) -> tuple[Tensor, ...]:
        """States (n, ...) and conditions."""
        raise NotImplementedError

    def encode(self, model: Any, x: Tensor, *c: Tensor) -> tuple[Any, Tensor]:
        """The latents and the log-determinant."""
        raise NotImplementedError

    def decode(self, model: Any, z: Any, *c: Tensor) -> tuple[Tensor, Tensor] | None:
        """The states of latents, and the log-determinant; None if the original has no inverse."""
        raise NotImplementedError

    def log_prob(self, model: Any, x: Tensor, *c: Tensor) -> Tensor:
        raise NotImplementedError

    def others(self, model: Any, x: Tensor, z: Any, *c: Tensor) -> Results:
        """Further results to compare."""
        return {}

    def initialized(self, make: Callable[[], nn.Module]) -> Any:
        """A model with random weights whose actnorms are initialized from data.

        It is in eval mode, as batch norm has an inverse only there.
        """
        model = seeded(make)
        with torch.no_grad():  # with a graph, reflections of FrEIA's could not be copied
            self.encode(model, *self.inputs(model, 64))
        return perturbed(model).eval()

    def results(self, dtype: torch.dtype) -> Callable[[nn.Module], Results]:
        def of(model: nn.Module) -> Results:
            x, *c = _cast(self.inputs(model), dtype)
            sources = [t.requires_grad_() for t in (x, *c) if t.is_floating_point()]
            z, log_det = self.encode(model, x, *c)
            latents = list(z) if isinstance(z, (list, tuple)) else [z]
            out = {f"z{i}": latent for i, latent in enumerate(latents)}
            for i, source in enumerate(sources):
                out[f"d{i}"] = input_gradient(source, [*latents, log_det])
            if (decoded := self.decode(model, z, *c)) is not None:
                out["x"], out["log_det of x"] = decoded
            out |= {"log_det": log_det, "log_prob": self.log_prob(model, x, *c)}
            return out | self.others(model, x, z, *c)

        return of

    @pytest.mark.parametrize("reversible", [False, True], ids=["stored", "reversible"])
    def test_equals_the_original(self, name: str, reversible: bool) -> None:
        model = self.initialized(self.models[name]).double()
        of = self.results(torch.float64)
        # FrEIA and normflows sum some log-determinants in the default dtype.
        with default_dtype(torch.float64):
            fast = assert_equals_original(model, of, 1, reversible=reversible)
        decelerate(fast)
        assert classes(fast) == classes(model)
        if not reversible:
            terms = 4096 if self.inputs(model)[0].dim() > 2 else self.terms
            model = self.initialized(self.models[name])
            assert_equals_original(model, self.results(torch.float32), terms)

    def test_training_equals_the_original(self, trained: str) -> None:
        """A model and its accelerated copy have equal losses for 20 steps, from the start of their
        actnorms on. With the trained weights, a copy then equals its original.

        In float64 the losses agree to 1e-7. In float32 Adam amplifies rounding, since its steps do
        not depend on the size of a gradient. There the losses may differ by ten times the
        difference between the original and the original with weights changed by one unit in the
        last place.
        """
        for dtype in (torch.float32, torch.float64):
            with default_dtype(dtype):
                model = seeded(self.models[trained]).to(dtype)
                fast, nudged = copy.deepcopy(model), copy.deepcopy(model)
                assert accelerate(fast, reversible=self.trained[trained]).replaced
                plain, accelerated = map(self._losses, (model, fast))
                assert abs(plain[18] - plain[0]) > 1e-3  # the loss does fall
                bound = 1e-7
                if dtype == torch.float32:
                    nudged = self._losses(perturbed(nudged, torch.finfo(dtype).eps))
                    bound = 1e-6 + 10 * _apart(plain, nudged)
                assert _apart(plain, accelerated) < bound
        decelerate(fast)
        with default_dtype(torch.float64):
            assert_equals_original(fast, self.results(torch.float64), 1)

    def _losses(self, model: nn.Module) -> list[float]:
        """The losses of 20 steps of Adam."""
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for step in range(20):
            optimizer.zero_grad()
            x, *c = _cast(self.inputs(model, 8, step % 2), torch.get_default_dtype())
            loss = -self.log_prob(model, x, *c).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def test_checkpoints_and_copies(self) -> None:
        """An accelerated model has the parameters that it had before, and loads a checkpoint of the
        original. Copies and pickles compute the same, with weights of their own. Decelerated, it
        has the original classes and computes what the original does."""
        model, fast = (self.initialized(self.models[self.copied]) for _ in range(2))
        perturbed(fast, seed=7)
        given = self.inputs(model)
        parameters = [id(p) for p in fast.parameters()]
        accelerate(fast)
        assert [id(p) for p in fast.parameters()] == parameters
        assert not same_state(fast, model)
        fast.load_state_dict(model.state_dict())
        assert same_state(fast, model)
        want = self.log_prob(model, *given)
        torch.testing.assert_close(self.log_prob(fast, *given), want)
        copies = [copy.deepcopy(fast)]
        if self.pickles:
            copies.append(pickle.loads(pickle.dumps(fast)))
        for copied in copies:
            assert classes(copied) == classes(fast)
            torch.testing.assert_close(self.log_prob(copied, *given), want)
            perturbed(copied)  # must not change the original
            assert not torch.equal(self.log_prob(copied, *given), self.log_prob(fast, *given))
        decelerate(fast)
        assert classes(fast) == classes(model)
        assert not any(map(is_accelerated, fast.modules()))
        assert torch.equal(self.log_prob(fast, *given), want)

    def test_untested_code_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every accelerated class has a fingerprint, and other code is left alone."""
        for cls in (*self.adapter.layers, *self.adapter.containers):
            assert cls.__module__ in self.adapter.fingerprints, cls
        for name in self.adapter.fingerprints:
            monkeypatch.setitem(self.adapter.fingerprints, name, set())
        report = assert_left_alone(seeded(self.models[self.copied]))
        assert "is not that of a tested version" in str(report)

    def left(self) -> Iterable[tuple[nn.Module, str]]:
        """Models without a layer that can be accelerated, with words of the reason."""
        raise NotImplementedError

    def test_other_layers_are_left(self) -> None:
        for model, why in self.left():
            assert why in str(assert_left_alone(model))


class LayerTests(LibraryTests):
    """The tests of a library whose layers are used alone, too."""

    def layers(self) -> Iterable[tuple[Any, ...]]:
        """Layers with their states and conditions."""
        raise NotImplementedError

    def both_ways(self, layer: Any, x: Tensor, *c: Tensor) -> list[Any]:
        """The results of a layer from data to latent, then from latent to data, in one list."""
        raise NotImplementedError

    def actnorm(self) -> nn.Module:
        """An actnorm of 4 channels."""
        raise NotImplementedError

    def test_a_constant_channel_keeps_its_scale(self) -> None:
        layer, x = self.actnorm(), torch.randn(50, 4)
        x[:, 2] = 3.0
        accelerate(layer)
        z = self.both_ways(layer, x)[0]
        assert z.isfinite().all()
        torch.testing.assert_close(z[:, 2], torch.zeros(50))
        torch.testing.assert_close(z[:, 0].std(), torch.tensor(1.0))

    def test_single_layers_keep_their_interface(self) -> None:
        torch.manual_seed(0)
        layers = [(layer.double(), _cast(given, torch.float64)) for layer, *given in self.layers()]
        with default_dtype(torch.float64):
            for layer, given in layers:
                self.both_ways(layer, *given)  # sets actnorms
                fast = copy.deepcopy(perturbed(layer))
                assert accelerate(fast).replaced
                assert isinstance(fast, type(layer))
                got, want = (self.both_ways(m, *given) for m in (fast, layer))
                assert list(map(type, got)) == list(map(type, want))
                torch.testing.assert_close(got, want)


def _cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


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
