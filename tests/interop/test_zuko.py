"""Accelerated flows of zuko, built as in its README and tutorials."""

import copy
from functools import partial
from typing import ClassVar

import pytest
import torch

from interop import peers
from mflow_kernels.interop import accelerate

zuko = pytest.importorskip("zuko")
zuko_adapter = pytest.importorskip("mflow_kernels.interop.zuko.adapter")

LINEAR = partial(zuko.transforms.MonotonicRQSTransform, bound=1.5, slope=1e-2)


def nsf(features=3, **options):
    return zuko.flows.NSF(features, 2, transforms=2, bins=4, hidden_features=[8], **options)


def affine(**options):
    return zuko.flows.MAF(4, 2, transforms=2, hidden_features=[8, 8, 8], **options)


# The second feature depends on the last one, and that on the first.
GRAPH = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)


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
    "affine": lambda: affine(randperm=True),
    "affine, residual": lambda: affine(residual=True, activation=torch.nn.ELU),
    "affine, a graph": lambda: affine(adjacency=GRAPH),
    "angles": lambda: zuko.flows.NCSF(3, 2, transforms=2, bins=4, hidden_features=[8]),
}


class TestZuko(peers.LibraryTests):
    adapter = zuko_adapter.ADAPTER
    models = MODELS
    trained: ClassVar = {"two passes": False, "affine": False}
    copied = "autoregressive"

    def inputs(self, model, n=16, seed=3):
        features = model.base().event_shape[0]
        generator = torch.Generator().manual_seed(seed)
        # Some elements are outside the splines' interval.
        return tuple(2 * torch.randn(n, k, generator=generator) for k in (features, 2))

    def encode(self, model, x, c):
        return model.transform(c).call_and_ladj(x)

    def decode(self, model, z, c):
        return model.transform(c).inv.call_and_ladj(z)

    def log_prob(self, model, x, c):
        return model(c).log_prob(x)

    def others(self, model, x, z, c):
        transform = model.transform(c)
        return {"z alone": transform(x), "x alone": transform.inv(z)}

    def left(self):
        yield zuko.flows.NICE(3, 2), "not MonotonicRQSTransform"
        yield zuko.flows.NCSF(1), "not MonotonicRQSTransform"
        yield zuko.flows.MAF(3, activation=torch.nn.Softsign), "activation is a custom function"
        yield zuko.flows.SOSPF(3), "not MonotonicRQSTransform"
        yield zuko.flows.GF(3), "UnconditionalTransform: mflow_kernels has no such layer"
        yield zuko.flows.NSF(3, bins=65), "bins: expected"


def test_batches_broadcast():
    """States and conditions may have any batch, and no batch."""
    model = TestZuko().initialized(nsf)
    fast = copy.deepcopy(model)
    accelerate(fast)
    for batch, conditions in (((), ()), ((5, 4), (4,)), ((5, 1), (4,)), ((4,), ())):
        x, c = torch.randn(*batch, 3), torch.randn(*conditions, 2)
        want, got = (m(c).log_prob(x) for m in (model, fast))
        torch.testing.assert_close(got, want)
        want, got = (m.transform(c).inv(x) for m in (model, fast))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert fast(c).sample((7, 2)).shape == (7, 2, 3)


def test_a_spline_without_condition_has_parameters_of_its_own():
    torch.manual_seed(0)
    model = zuko.flows.NSF(1, transforms=2)
    fast = copy.deepcopy(model)
    assert len(accelerate(fast).replaced) == 2
    x = torch.randn(9, 1)
    want, got = (m().log_prob(x) for m in (model, fast))
    torch.testing.assert_close(got, want)
