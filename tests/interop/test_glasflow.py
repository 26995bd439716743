"""Flows of glasflow, a fork of nflows, and of nessai, which builds its flows of glasflow's."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from interop import peers
from mflow_kernels.interop import accelerate, decelerate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gf = pytest.importorskip("glasflow.flows")


def nessai(name, **options):
    flows = pytest.importorskip("nessai.flows")
    return getattr(flows, name)(4, 8, 3, 1, batch_norm_between_layers=False, **options)


def glasflow(cls=gf.RealNVP, features=4, **options):
    """Its documentation's flows: four couplings, with linear transforms between."""
    return cls(features, 4, n_neurons=8, n_blocks_per_transform=1, **options)


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


def results(dtype):
    def of(model):
        generator = torch.Generator().manual_seed(0)
        x, c = (torch.randn(16, n, generator=generator).to(dtype) for n in (4, 3))
        takes = any(getattr(m, "context_features", None) for m in model.modules())
        named = {"conditional": c} if takes else {}
        x.requires_grad_()
        z, log_det = model.forward(x, **named)
        back, log_det_back = model.inverse(z, **named)
        out = {"z": z, "log_det": log_det, "x": back, "log_det back": log_det_back}
        return out | {"d": peers.input_gradient(x, [z, log_det])}

    return of


@pytest.mark.parametrize("reversible", [False, True], ids=["stored", "reversible"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_original(name, reversible):
    make, part = MODELS[name]
    torch.manual_seed(0)
    model = make()
    model.forward(
        torch.randn(64, 4), **({"conditional": torch.zeros(64, 3)} if "ext" in name else {})
    )
    model = peers.perturbed(model).double().eval()
    fast = peers.assert_equals_original(model, results(torch.float64), 1, reversible=reversible)
    report = accelerate(fast)
    assert part in str(report)
    assert not report.left, str(report)
    assert report.library.startswith("glasflow 0.")
    decelerate(fast)
    assert peers.classes(fast) == peers.classes(model)


def test_other_scale_activations_are_left():
    report = peers.assert_left_alone(glasflow(scale_activation=F.softplus))
    assert "its scale activation is a custom function" in str(report)
