"""Weights of the penalty: maps, the tracked variance, schedules and bounds on the error."""

import copy
import math

import pytest
import torch
from cases import normal
from torch import nn

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
    for scale in (1.0, 3.0, 0.5):
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


@pytest.mark.parametrize(
    ("rho", "errors", "weight"),
    [
        ("l2", torch.distributions.Normal(0.0, 0.1), 100.0),  # 1 / 0.1^2
        ("l1", torch.distributions.Laplace(0.0, 0.1), 10.0),  # 1 / 0.1
        ("huber", torch.distributions.Normal(0.0, 0.1), 100.0),  # delta is 4 deviations
        ("huber", torch.distributions.Laplace(0.0, 20.0), 0.125),  # |e| / (20 delta), delta = 0.4
    ],
)
def test_the_calibrated_weight_of_a_known_distribution(rho, errors, weight):
    """Quantiles stand for samples: they leave out the tails, which changes w by less than 1%."""
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    e = errors.icdf(quantiles).view(2, -1)
    objective = ManifoldObjective(rho=rho, weight="variance", delta=0.4).double().train()
    objective._adapt(e, torch.zeros_like(e))
    assert objective.trained_weight.item() == pytest.approx(weight, rel=0.015)


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


class OneParameter(nn.Module):
    """A model whose penalized likelihood has a known optimum: with sigma = 1,

    -log p = (theta - 3)^2 / 2 + constant, and every pixel's error is theta.
    """

    input_shape = (2,)
    latent_shapes = ((2,),)
    prior = None

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def latents(self, x, context=None):
        v = (self.theta - 3).expand(len(x))
        return (torch.stack([torch.zeros_like(v), v], 1),), torch.zeros_like(v)

    def off_masks(self):
        return (torch.tensor([False, True]),)

    def gather(self, latents):
        return latents[0][:, :1]

    def decode(self, u, context=None):
        return self.theta.expand(len(u), 2)


def trained(objective, steps):
    model, objective = OneParameter(), objective.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model, torch.zeros(3, 2, dtype=torch.float64)).loss.mean().backward()
        optimizer.step()
    return model.theta.item(), objective.trained_weight.item()


def test_a_bound_finds_the_lagrange_multiplier():
    """Minimize (theta - 3)^2 / 2 subject to theta^2 <= 1: theta = 1, and 2 = 2 w theta, so w = 1.

    Near the optimum log w decays by 0.005 * 4 / 3 of itself in a step, to e^-4.7 = 0.01 in 700.
    """
    theta, weight = trained(ManifoldObjective(weight=ErrorBound(1.0, 2.0), sigma=1.0), 700)
    assert theta == pytest.approx(1.0, abs=0.01)
    assert weight == pytest.approx(1.0, abs=0.01)


def test_the_multiplier_of_a_bound_that_holds_anyway_vanishes():
    """theta = 3 is the unconstrained optimum; the weight falls to its least value."""
    theta, weight = trained(ManifoldObjective(weight=ErrorBound(16.0, 0.003), sigma=1.0), 400)
    assert weight == pytest.approx(1e-3, rel=1e-5)
    assert theta == pytest.approx(3 / (1 + 2e-3), abs=1e-3)


def test_a_bound_out_of_reach_leaves_a_finite_weight():
    objective = ManifoldObjective(weight=ErrorBound(1e-6), sigma=1.0).train()
    error = torch.ones(2, 3)
    for _ in range(1200):
        objective._adapt(error, torch.zeros_like(error))
    assert objective.trained_weight.item() == pytest.approx(1e8, rel=1e-5)


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
