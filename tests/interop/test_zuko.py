"""Accelerated flows of zuko, built as in its README and tutorials."""

import copy
from functools import partial

import pytest
import torch

from interop import peers
from mflow_kernels.interop import accelerate

zuko = pytest.importorskip("zuko")
zuko_adapter = pytest.importorskip("mflow_kernels.interop.zuko.adapter")

LINEAR = partial(zuko.transforms.MonotonicRQSTransform, bound=1.5, slope=1e-2)


def nsf(features=3, **options):
    return zuko.flows.NSF(features, 2, transforms=2, bins=4, hidden_features=[8], **options)


def couplings(**options):
    layers = [
        zuko.flows.GeneralCouplingTransform(
            3,
            2,
            torch.arange(k, 3 + k) % 2,
            univariate=LINEAR,
            shapes=[(4,), (4,), (3,)],
            hidden_features=[8],
        )
        for k in range(2)
    ]
    return zuko.flows.Flow(layers, nsf().base)


MODELS = {
    "autoregressive": nsf,
    "two passes": lambda: nsf(passes=2),
    "general couplings": couplings,
    "one feature": lambda: nsf(1),
}


def inputs_of(model, dtype, n=16, seed=3):
    features = model.base().event_shape[0]
    generator = torch.Generator().manual_seed(seed)
    # Some elements are outside the splines' interval.
    return tuple(2 * torch.randn(n, k, generator=generator).to(dtype) for k in (features, 2))


def results(dtype):
    def of(model):
        x, c = (t.requires_grad_() for t in inputs_of(model, dtype))
        transform = model.transform(c)
        z, ladj = transform.call_and_ladj(x)
        out = {"z": z, "ladj": ladj, "log_prob": model(c).log_prob(x), "again": transform(x)}
        out |= {f"d{i}": peers.input_gradient(t, [z, ladj]) for i, t in enumerate((x, c))}
        back, minus_ladj = transform.inv.call_and_ladj(z)
        return out | {"x": back, "ladj of x": minus_ladj, "x alone": transform.inv(z)}

    return of


def random(make):
    torch.manual_seed(0)
    return peers.perturbed(make())


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_original(name):
    model = random(MODELS[name])
    peers.assert_equals_original(model.double(), results(torch.float64), 1)
    peers.assert_equals_original(model.float(), results(torch.float32), 256)


def test_batches_broadcast():
    """States and conditions may have any batch, and no batch."""
    model = random(nsf)
    fast = copy.deepcopy(model)
    accelerate(fast)
    for batch, conditions in (((), ()), ((5, 4), (4,)), ((5, 1), (4,)), ((4,), ())):
        x, c = torch.randn(*batch, 3), torch.randn(*conditions, 2)
        want, got = (m(c).log_prob(x) for m in (model, fast))
        torch.testing.assert_close(got, want)
    assert fast(c).sample((7, 2)).shape == (7, 2, 3)


def test_a_spline_without_condition_has_parameters_of_its_own():
    torch.manual_seed(0)
    model = zuko.flows.NSF(1, transforms=2)
    fast = copy.deepcopy(model)
    assert len(accelerate(fast).replaced) == 2
    x = torch.randn(9, 1)
    want, got = (m().log_prob(x) for m in (model, fast))
    torch.testing.assert_close(got, want)


def test_training_equals_the_original():
    def loss(model, step):
        x, c = inputs_of(model, torch.get_default_dtype(), 8, step % 2)
        return -model(c).log_prob(x).mean()

    peers.assert_trained_together(lambda: nsf(passes=2), loss, reversible=False)


def test_checkpoints_and_copies():
    model, fast = random(nsf), random(nsf)
    x, c = inputs_of(model, torch.float32)
    peers.assert_checkpoints_and_copies(model, fast, lambda m: m(c).log_prob(x))


def test_untested_code_is_left(monkeypatch):
    peers.assert_untested_code_is_left(zuko_adapter.ADAPTER, monkeypatch, nsf())


def test_other_transforms_are_left():
    for model, why in (
        (zuko.flows.NCSF(3, 2), "not MonotonicRQSTransform"),
        (zuko.flows.MAF(3), "not MonotonicRQSTransform"),
        (zuko.flows.GF(3), "UnconditionalTransform: mflow_kernels has no such layer"),
        (zuko.flows.NSF(3, bins=65), "bins: expected"),
    ):
        assert why in str(peers.assert_left_alone(model))
