"""The log-density on the manifold agrees with closed forms and autograd's Jacobians in float64."""

import math

import pytest
import torch
from cases import normal, perturbed

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, VectorFlow
from mflow_kernels.models.volume import log_volume
from mflow_kernels.testing import assert_close, tolerance
from models.flows import Scale, assert_gradient_is_a_difference, jacobians

LOG_2PI = math.log(2 * math.pi)


def vector_flow(dim=4, manifold_dim=2, **options) -> ManifoldFlow:
    return ManifoldFlow(perturbed(VectorFlow(dim, 2, 8, **options), 0.2), manifold_dim).double()


def image_flow(manifold_dim=5, **options) -> ManifoldFlow:
    return ManifoldFlow(perturbed(Glow((1, 4, 4), 2, 2, 4, **options), 0.2), manifold_dim).double()


def hierarchy() -> HierarchicalFlow:
    return HierarchicalFlow([image_flow(6), vector_flow(6, 6), vector_flow(6, 3)])


def of_plain_torch() -> ManifoldFlow:
    return ManifoldFlow(Scale([3.0, 2.0, 5.0]), 2)


def linear(matrix):
    """Return the function u -> matrix u, (N, D)."""
    return lambda u: u @ matrix.T


def expected_log_prob(model, x):
    u = model.encode(x).detach()
    singular = torch.linalg.svdvals(jacobians(model.decode, u))
    return -(u.square() / 2 + LOG_2PI / 2).sum(1) - singular.log().sum(1)


@pytest.mark.parametrize("make", [vector_flow, image_flow, hierarchy, of_plain_torch])
def test_exact_against_autograd(make):
    model = make()
    x = normal(3, *model.input_shape, dtype=torch.float64)
    assert_close(model.manifold_log_prob(x).value, expected_log_prob(model, x), terms=10_000)


def test_passes_of_few_columns_and_samples_change_nothing(monkeypatch):
    model = image_flow()
    x = normal(5, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        whole = model.manifold_log_prob(x)
        estimated = model.manifold_log_prob(x, method="hutchinson", generator=seeded())
        # A pass now takes four samples or columns of 16 pixels.
        monkeypatch.setattr("mflow_kernels.models.volume.PASS_ELEMENTS", 64)
        assert_close(model.manifold_log_prob(x, max_bytes=1000).value, whole.value, terms=100)
        parts = model.manifold_log_prob(x, method="hutchinson", generator=seeded())
    assert_close(parts.value, estimated.value, terms=100)


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def test_the_density_on_the_whole_space_is_the_ambient_density():
    model = image_flow(16)
    x = normal(3, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(model.manifold_log_prob(x).value, model.log_prob(x))
    assert_close(model.log_prob(x), expected_log_prob(model, x), terms=10_000)


def test_errors_have_the_right_size():
    """Over many independent estimates of one value, (value - exact) / error is of order 1."""
    matrix = normal(30, 12, dtype=torch.float64)
    u = torch.zeros(100, 12, dtype=torch.float64)
    exact = torch.linalg.svdvals(matrix).log().sum()
    got = log_volume(linear(matrix), u, 30, "hutchinson", probes=20, generator=seeded())
    score = (got.value - exact) / got.error
    # 100 draws of Student's t with 19 degrees of freedom have a deviation of 1.06 +- 0.08.
    assert 0.8 < score.std() < 1.3
    assert score.mean().abs() < 0.4  # 4 standard errors


def test_an_embedding_that_scales_needs_one_step():
    """With M = 4 I, every probe gives the exact value in the first step. In 16 dimensions nothing
    rounds, so that no direction is left for a second one."""
    u = torch.zeros(2, 16, dtype=torch.float64)
    got = log_volume(lambda u: 2 * u, u, 16, "hutchinson", probes=2, generator=seeded())
    assert_close(got.value, torch.full_like(got.value, 16 * math.log(2)), terms=1000)
    assert_close(got.error, torch.zeros_like(got.error), terms=1000, scale=16 * math.log(2))


def test_the_error_includes_the_bias_of_too_few_steps():
    """Five steps do not resolve singular values from 1 to 1,000."""
    scale = torch.logspace(0, 3, 50, dtype=torch.float64)
    u = torch.zeros(1, 50, dtype=torch.float64)
    decode = linear(torch.linalg.qr(normal(50, 50, dtype=torch.float64))[0] * scale)
    options = {"probes": 200, "generator": seeded()}
    exact = scale.log().sum()
    short = log_volume(decode, u, 50, "hutchinson", iterations=5, **options)
    long = log_volume(decode, u, 50, "hutchinson", **options)
    assert short.error > 5 * long.error
    assert (short.value - exact).abs() < 5 * short.error
    assert (long.value - exact).abs() < 5 * long.error


def gradient_of(model, x, **options):
    """Return the gradient of sum log p by x and the parameters, as one vector."""
    x = x.clone().requires_grad_()
    value = model.manifold_log_prob(x, **options).value.sum()
    grads = torch.autograd.grad(value, [x, *model.parameters()], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("reversible", [True, False])
def test_gradients_of_the_exact_density(reversible):
    model = vector_flow(reversible=reversible)
    x = normal(3, 4, dtype=torch.float64)
    assert_gradient_is_a_difference(lambda x: model.manifold_log_prob(x).value, model, x)


def test_gradients_of_the_estimate_are_right_on_average():
    model = vector_flow(6, 4)
    x = normal(2, 6, dtype=torch.float64)
    exact = gradient_of(model, x)
    draws = torch.stack(
        [
            gradient_of(model, x, method="hutchinson", probes=50, generator=seeded(seed))
            for seed in range(8)
        ]
    )
    error = draws.std(0) / math.sqrt(8)
    # Student's t with 7 degrees of freedom has deviation 1.18; there are hundreds of parameters.
    score = ((draws.mean(0) - exact) / error.clamp(min=1e-12))[error > 1e-9]
    assert len(score) > 100
    assert 0.6 < score.square().mean().sqrt() < 2
    assert (draws.mean(0) - exact).norm() < 0.1 * exact.norm()


def test_float32_is_close_to_float64():
    model = image_flow()
    x = normal(3, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        exact = model.manifold_log_prob(x)
        single = model.float()
        for method in ("exact", "hutchinson"):
            got = single.manifold_log_prob(x.float(), method=method, generator=seeded())
            assert got.value.dtype == got.error.dtype == torch.float32
            rounding = tolerance(torch.float32, terms=100) * exact.value.abs().max()
            slack = 5 * got.error.double() + rounding
            assert ((got.value.double() - exact.value).abs() < slack).all()


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_autocast_does_not_round_the_volume(method):
    model = image_flow().float()
    u = normal(3, 5)
    with torch.no_grad():
        plain = log_volume(model.decode, u, 16, method, generator=seeded()).value
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(
                log_volume(model.decode, u, 16, method, generator=seeded()).value, plain
            )
