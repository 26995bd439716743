"""Weights of the penalty: maps, the tracked variance, schedules and bounds on the error."""

import copy
import math

import pytest
import torch
from cases import normal

from mflow_kernels import ErrorBound, ManifoldObjective, WeightSchedule
from mflow_kernels.ops.penalty_functions import RHOS, penalty_function, penalty_log_normalizer
from mflow_kernels.testing import assert_close
from models.flows import image_flow
from models.objectives_by_hand import X, log_normal, rho_of, split_latents


def latent_maps(flow):
    """Draw one weight per channel of each latent."""
    return tuple(
        1 + torch.rand(shape[0], 1, 1, dtype=torch.float64) for shape in flow.latent_shapes
    )


@pytest.mark.parametrize("rho", RHOS)
def test_weight_maps_of_the_latents(rho):
    """Each v pixel has its own weight and its own normalizer."""
    maps = latent_maps(image_flow(None))
    flow = image_flow(ManifoldObjective("latent", rho, weight=maps, delta=0.4))
    x = normal(*X, dtype=torch.float64)
    u, v, logdet = split_latents(flow, x)
    weights = [w.expand(m.shape)[m] for w, m in zip(maps, flow.off_masks(), strict=True)]
    w = torch.cat(weights)
    terms = flow.terms(x)
    each = w * rho_of(rho, v, 0.4)
    assert_close(terms.penalty, each.sum(1), terms=100)
    grid = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    integrals = torch.stack(
        [torch.trapezoid((-one * rho_of(rho, grid, 0.4)).exp(), grid) for one in w]
    )
    expected = log_normal(u, 1) + logdet - (each + integrals.log()).sum(1)
    # The error of `test_p_v_is_a_density` for each v pixel, with steps of 120 / 240,000.
    error = len(w) * (w.max() * 5e-4) ** 2 / 10
    assert ((terms.log_likelihood - expected).abs() < error).all()
    assert_close(flow.log_prob(x), terms.log_likelihood, terms=100)


def test_a_map_of_the_image_weighs_pixels():
    weight = torch.rand(1, 4, 4, dtype=torch.float64)
    weight[0, 0] = 0  # these pixels have no penalty
    flow = image_flow(ManifoldObjective("data", "l1", weight=weight))
    x = normal(*X, dtype=torch.float64)
    error = (x - flow.project(x)).abs()
    expected = (weight * error).flatten(1).sum(1)
    terms = flow.terms(x)
    assert_close(terms.penalty, expected, terms=100)
    assert_close(terms.loss, expected - terms.log_likelihood, terms=100)


def test_maps_are_converted_and_saved_with_the_model():
    weight = torch.rand(4, 4) + 0.1
    flow = image_flow(ManifoldObjective("data", weight=weight))
    other = image_flow(ManifoldObjective("data", weight=torch.ones(4, 4)))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.objective.weight, weight.double())
    assert flow.objective.weight.dtype == torch.float64  # image_flow calls .double()


@pytest.mark.parametrize("rho", RHOS)
def test_the_variance_is_tracked_in_training(rho):
    """w maximizes the likelihood of all errors so far, under the density exp(-w rho) / Z."""
    flow = image_flow(ManifoldObjective("data", rho, weight="variance", delta=0.4)).train()
    means = []
    for scale in (0.01, 1.0, 30.0):  # errors below and above delta
        x = scale * normal(*X, dtype=torch.float64)
        error = (x - flow.project(x)).detach()
        means.append(rho_of(rho, error, 0.4).mean())
        terms = flow.terms(x)
        mean = torch.stack(means).mean()
        w = flow.objective.trained_weight.double().requires_grad_()
        loss = w * mean + penalty_log_normalizer(rho, w, 0.4)
        (slope,) = torch.autograd.grad(loss, w)
        assert abs(w * slope) < 1e-6  # relative to w, which is tracked in float32
        expected = w.detach() * rho_of(rho, error, 0.4).flatten(1).sum(1)
        assert_close(terms.penalty.float(), expected, terms=3)
    assert flow.objective.batches == 3


def test_evaluation_keeps_the_variance_and_the_state_dict_holds_it():
    flow = image_flow(ManifoldObjective("data", weight="variance")).train()
    x = normal(*X, dtype=torch.float64)
    flow.terms(x)
    before = flow.objective.variance.clone()
    flow.eval()
    flow.terms(3 * x)
    assert torch.equal(flow.objective.variance, before)
    other = image_flow(ManifoldObjective("data", weight="variance")).eval()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.terms(x).loss, flow.terms(x).loss)


def test_the_variance_forgets_old_batches():
    objective = ManifoldObjective("data", weight="variance").train()
    e = torch.ones(1, 2)
    for value, batches in ((1.0, 150), (2.0, 100)):
        for _ in range(batches):
            objective._adapt(value * e, torch.zeros_like(e))
    # From the 100th batch on, this is a running mean: the old value has decayed to 0.99^100.
    expected = torch.tensor(4 - 3 * 0.99**100, dtype=torch.float64)
    assert_close(objective.variance, expected, terms=250)


def test_the_variance_gets_no_gradient():
    flow = image_flow(ManifoldObjective("data", weight="variance")).train()
    x = normal(*X, dtype=torch.float64)
    parameters = list(flow.parameters())
    got = torch.autograd.grad(flow.terms(x).loss.sum(), parameters)
    w = 1 / flow.objective.variance.item()
    flow.objective = ManifoldObjective("data", weight=w)
    want = torch.autograd.grad(flow.terms(x).loss.sum(), parameters)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, terms=100)


def test_models_that_share_an_objective_track_separate_variances():
    objective = ManifoldObjective("data", weight="variance")
    one, other = image_flow(objective).train(), image_flow(objective).train()
    one.terms(normal(*X, dtype=torch.float64))
    assert one.objective.batches == 1
    assert other.objective.batches == objective.batches == 0


def test_a_schedule_changes_the_weight_by_the_same_factor_in_each_batch():
    flow = image_flow(ManifoldObjective("data", weight=WeightSchedule(1000.0, 1.0, 3))).train()
    x = normal(*X, dtype=torch.float64)
    squares = (x - flow.project(x)).detach().square().flatten(1).sum(1)
    for weight in (100.0, 10.0, 1.0, 1.0):
        terms = flow.terms(x)
        assert flow.objective.trained_weight.item() == pytest.approx(weight, rel=1e-5)
        assert_close(terms.penalty.float(), weight * squares / 2, terms=20)  # w is float32
    flow.eval()
    flow.terms(x)
    assert flow.objective.batches == 4  # evaluation is no training batch


@pytest.mark.parametrize("weight", [3.0, 25.0])
@pytest.mark.parametrize("rho", RHOS)
def test_draws_off_the_manifold_follow_p_v(rho, weight):
    """The means of w rho(v) and of v: -w d log Z / dw, and 0 by symmetry."""
    w = torch.full((40_000,), weight)
    e = penalty_function(rho).draw(w, 0.4, torch.Generator().manual_seed(0))
    exact = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(penalty_log_normalizer(rho, exact, 0.4), exact)
    penalty = weight * rho_of(rho, e, 0.4).double()
    error = 4 * penalty.std().item() / math.sqrt(len(e))
    assert penalty.mean().item() == pytest.approx(-weight * slope.item(), abs=error)
    assert e.mean().item() == pytest.approx(0.0, abs=4 * e.std().item() / math.sqrt(len(e)))


def test_a_bound_multiplies_the_weight_by_the_ratio_of_error_and_bound():
    flow = image_flow(ManifoldObjective("data", "l1", weight=ErrorBound(0.5, 3.0))).train()
    weight, mean = 3.0, 0.0
    for batch, scale in enumerate((1e-3, 1e-3, *[1.0] * 9, 0.3, 10.0, 1e-3), start=1):
        x = scale * normal(*X, dtype=torch.float64)
        error = (x - flow.project(x)).detach()
        mean += (error.square().mean().item() - mean) / min(batch, 10)
        weight *= min(max(mean / 0.5, math.exp(-1)), math.e) ** 0.005
        penalty = weight * error.abs().flatten(1).sum(1)
        assert_close(flow.terms(x).penalty.float(), penalty, terms=20)  # w is float32
        assert flow.objective.trained_weight.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize(
    ("bound", "limit"), [(ErrorBound(1e-6), 1e8), (ErrorBound(9, 0.003), 1e-3)]
)
def test_the_weight_of_a_bound_has_limits(bound, limit):
    """If the bound is out of reach, or holds with any weight."""
    objective = ManifoldObjective(weight=bound).train()
    error = torch.ones(2, 3)
    for _ in range(1200):
        objective._adapt(error, torch.zeros_like(error))
    assert objective.trained_weight.item() == pytest.approx(limit, rel=1e-5)


@pytest.mark.parametrize("weight", ["variance", ErrorBound(0.5)])
def test_a_batch_that_is_not_finite_changes_no_weight(weight):
    """Training skips such a step, so that the weight must survive it."""
    objective = ManifoldObjective(weight=weight).train()
    zeros = torch.zeros(2, 3)
    objective._adapt(torch.ones(2, 3), zeros)
    before = copy.deepcopy(objective.state_dict())
    for value in (math.nan, math.inf):
        objective._adapt(torch.full((2, 3), value), zeros)
    torch.testing.assert_close(objective.state_dict(), before, rtol=0, atol=0)
