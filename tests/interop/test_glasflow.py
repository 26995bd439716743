"""Flows of glasflow, a fork of nflows, and of nessai, which builds its flows of glasflow's."""

import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from interop import peers
from mflow_kernels.interop import accelerate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gf = pytest.importorskip("glasflow.flows")
    from mflow_kernels.interop.glasflow.adapter import ADAPTER


def nessai(name, **options):
    flows = pytest.importorskip("nessai.flows")
    return getattr(flows, name)(4, 8, 3, 1, batch_norm_between_layers=False, **options)


def glasflow(cls=gf.RealNVP, features=4, **options):
    """Its documentation's flows: four couplings, with linear transforms between."""
    return cls(features, 4, n_neurons=8, n_blocks_per_transform=1, **options)


def autoregressive(cls, **options):
    return cls(4, 2, n_conditional_inputs=3, n_neurons=8, n_blocks_per_transform=1, **options)


def real_nvp(activation, **options):
    return lambda: glasflow(scale_activation=activation, **options)


MODELS = {
    "glasflow": (lambda: glasflow(linear_transform="permutation"), "4 affine softplus couplings"),
    "glasflow, nflows": (real_nvp("nflows"), "4 affine sigmoid couplings"),
    "glasflow, log1": (real_nvp("log1"), "4 affine tanh couplings"),
    "glasflow, log2.5, lu": (real_nvp("log2.5", linear_transform="lu"), "affine tanh coupling"),
    "glasflow, shifts": (lambda: glasflow(volume_preserving=True), "4 additive couplings"),
    "glasflow, context": (lambda: glasflow(n_conditional_inputs=3), "4 affine softplus"),
    "glasflow, splines": (
        lambda: glasflow(gf.CouplingNSF, num_bins=4, tail_bound=2.0),
        "4 spline couplings",
    ),
    "glasflow, autoregressive": (
        lambda: autoregressive(gf.MaskedAffineAutoregressiveFlow),
        "2 autoregressive affine maps",
    ),
    "glasflow, autoregressive splines": (
        lambda: autoregressive(
            gf.MaskedPiecewiseRationalQuadraticAutoregressiveFlow, tails="linear", tail_bound=2.0
        ),
        "2 autoregressive splines",
    ),
    "nessai": (lambda: nessai("RealNVP", linear_transform="lu"), "affine sigmoid coupling"),
    "nessai, mlp, actnorm": (
        lambda: nessai("RealNVP", net="mlp", linear_transform=None, actnorm=True),
        "3 actnorms",
    ),
    "nessai, splines": (
        lambda: nessai("NeuralSplineFlow", linear_transform="permutation"),
        "spline coupling",
    ),
}


class TestGlasflow(peers.LibraryTests):
    adapter = ADAPTER
    models: ClassVar = {name: make for name, (make, _) in MODELS.items()}
    trained: ClassVar = {"glasflow": True}
    copied, pickles = "glasflow", False  # its scale activation is a local function

    def inputs(self, model, n=16, seed=3):
        generator = torch.Generator().manual_seed(seed)
        takes = any(getattr(m, "context_features", None) for m in model.modules())
        return tuple(torch.randn(n, k, generator=generator) for k in ((4, 3) if takes else (4,)))

    def encode(self, model, x, *c):
        return model.forward(x, **named(c))

    def decode(self, model, z, *c):
        return model.inverse(z, **named(c))

    def log_prob(self, model, x, *c):
        return model.log_prob(x, **named(c))

    def left(self):
        yield glasflow(scale_activation=F.softplus), "its scale activation is a custom function"


def named(conditions):
    return {"conditional": conditions[0]} if conditions else {}


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_replaced(name):
    make, part = MODELS[name]
    report = accelerate(make())
    assert part in str(report)
    assert not report.left, str(report)
    assert report.library.startswith("glasflow 0.")
