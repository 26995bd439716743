"""The local dimension, against derivatives of normal densities."""

import math

import pytest
import torch
from cases import normal, perturbed
from torch.distributions import MultivariateNormal

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, VectorFlow, local_dimension
from mflow_kernels.testing import assert_close, tolerance
from models.flows import Scale, jacobians


def by_derivative(x, z, jacobian, scale):
    """D + d log rho / d log r of N(x - J z, J J^T + r^2) at x, for one sample."""
    log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    noise = (2 * log_scale).exp() * torch.eye(len(jacobian), dtype=torch.float64)
    density = MultivariateNormal(x - jacobian @ z, jacobian @ jacobian.T + noise)
    (slope,) = torch.autograd.grad(density.log_prob(x), log_scale)
    return len(jacobian) + slope


MODELS = {
    "vectors": lambda: VectorFlow(4, 2, 8),
    "conditional vectors": lambda: VectorFlow(4, 2, 8, context_channels=2),
    "images": lambda: Glow((1, 4, 4), 1, 2, 4),
    "a manifold": lambda: ManifoldFlow(VectorFlow(4, 2, 8), 2),
    "a hierarchy": lambda: HierarchicalFlow(
        [ManifoldFlow(VectorFlow(4, 2, 8), 3), ManifoldFlow(VectorFlow(3, 2, 8), 2)]
    ),
}


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_derivative_of_the_density_of_noisy_data(name, scale):
    model = perturbed(MODELS[name]()).double().eval()
    x = normal(3, *model.input_shape, dtype=torch.float64)
    context = torch.tensor([0, 1, 1]) if name.startswith("conditional") else None
    found = local_dimension(model, x, scale, context=context)
    chart = model
    if not hasattr(model, "encode"):
        chart = ManifoldFlow(model, model.input_shape[0] if len(model.input_shape) == 1 else 16)
    u = chart.encode(x, context=context).detach()
    points = chart.decode(u, context=context).detach().flatten(1)
    each = jacobians(lambda u: chart.decode(u, context=context), u)
    for value, point, z, jacobian in zip(found.value, points, u, each, strict=True):
        expected = by_derivative(point, z, jacobian, scale)
        # The derivative is subtracted from D.
        assert_close(value, expected, terms=1000, scale=len(jacobian))
    assert (found.error == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_agrees_with_the_exact_result(name):
    """Lanczos quadrature with as many steps as coordinates is exact but for the probes."""
    model = perturbed(MODELS[name]()).double().eval()
    x = normal(3, *model.input_shape, dtype=torch.float64)
    context = torch.tensor([0, 1, 1]) if name.startswith("conditional") else None
    for scale in (0.05, 1.0, 30.0):
        exact = local_dimension(model, x, scale, context=context).value
        generator = torch.Generator().manual_seed(0)
        how = {"method": "hutchinson", "probes": 256, "generator": generator}
        found = local_dimension(model, x, scale, context=context, **how)
        rounding = tolerance(torch.float64, terms=1000) * math.prod(model.input_shape)
        assert ((found.value - exact).abs() <= 5 * found.error + rounding).all()
        assert (found.error <= 0.5).all()


def test_many_coordinates_are_estimated():
    d = 1200
    flow = Scale([1.0] * 300 + [0.001] * (d - 300))
    x = normal(2, d, dtype=torch.float64) * flow.deviation.detach()
    found = local_dimension(flow, x, 0.05, generator=torch.Generator().manual_seed(0))
    # The diagonal matrix has no variance over random signs.
    assert found.value.tolist() == pytest.approx([300, 300], abs=2)
    at_zero = local_dimension(flow, torch.zeros_like(x), 0.05).value
    assert at_zero.tolist() == pytest.approx([300, 300], abs=2)


def test_it_counts_the_directions_that_are_wider_than_the_scale():
    flow = Scale([1.0, 2.0, 0.001, 0.002])
    x = normal(100, 4, dtype=torch.float64) * flow.deviation.detach()
    for scale, dimension in ((1e-5, 4), (0.05, 2), (100.0, 0)):
        mean = local_dimension(flow, x, scale).value.mean().item()
        assert mean == pytest.approx(dimension, abs=0.02)
