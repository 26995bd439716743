import math

import pytest
import torch
from cases import normal, perturbed
from torch import nn

from mflow_kernels import (
    ErrorBound,
    Glow,
    ManifoldFlow,
    ManifoldObjective,
    VectorFlow,
    WeightSchedule,
)
from mflow_kernels.models.objectives import Terms
from mflow_kernels.models.penalty_weight import draw_errors
from mflow_kernels.ops.penalty_functions import penalty_log_normalizer
from mflow_kernels.testing import assert_close

RHOS = ("l2", "l1", "huber")
X = (4, 1, 4, 4)


def image_flow(objective, manifold_dim=5) -> ManifoldFlow:
    glow = perturbed(Glow((1, 4, 4), 2, 1, 4))
    return ManifoldFlow(glow, manifold_dim, objective=objective).double()


def split_latents(flow, x):
    z, logdet = flow.latents(x)
    v = torch.cat([part[:, m] for part, m in zip(z, flow.off_masks(), strict=True)], 1)
    return flow.gather(z), v, logdet


def log_normal(e, sigma):
    """Return log N(e; 0, sigma^2 I); torch.distributions would round sigma to float32."""
    return (-(e / sigma).square() / 2 - math.log(sigma) - math.log(2 * math.pi) / 2).sum(1)


def rho_of(rho, e, delta):
    return {
        "l2": e.square() / 2,
        "l1": e.abs(),
        "huber": torch.where(e.abs() <= delta, e.square() / 2, delta * (e.abs() - delta / 2)),
    }[rho]


@pytest.mark.parametrize("rho", RHOS)
def test_latent_domain_by_hand(rho, device):
    flow = image_flow(ManifoldObjective("latent", rho, weight=7.0, delta=0.4)).to(device)
    x = normal(*X, dtype=torch.float64, device=device)
    u, v, logdet = split_latents(flow, x)
    on = log_normal(u, 1)
    penalty = 7.0 * rho_of(rho, v, 0.4).sum(1)
    terms = flow.terms(x)
    assert_close(terms.on_manifold, on, terms=100)
    assert_close(terms.penalty, penalty, terms=100)
    assert_close(terms.logdet, logdet, terms=100)
    assert_close(terms.loss, penalty - on - logdet, terms=100)
    assert_close(
        terms.log_likelihood, terms.on_manifold + terms.off_manifold + terms.logdet, terms=100
    )


@pytest.mark.parametrize("rho", RHOS)
def test_data_domain_by_hand(rho, device):
    """The penalty is on reconstructions, p_V is Gaussian, and the likelihood has no penalty."""
    flow = image_flow(ManifoldObjective("data", rho, weight=7.0, delta=0.4, sigma=0.3)).to(device)
    x = normal(*X, dtype=torch.float64, device=device)
    u, v, logdet = split_latents(flow, x)
    on = log_normal(u, 1)
    off = log_normal(v, 0.3)
    penalty = 7.0 * rho_of(rho, x - flow.decode(u), 0.4).flatten(1).sum(1)
    terms = flow.terms(x)
    for got, want in zip(
        terms,
        Terms(penalty - on - off - logdet, on + off + logdet, on, off, logdet, penalty),
        strict=True,
    ):
        assert_close(got, want, terms=100)


def test_latent_l2_is_the_gaussian_of_pie():
    """p_V = N(0, I / weight) to float64 accuracy, including its normalizer."""
    flow = image_flow(ManifoldObjective("latent", "l2", weight=100.0))
    x = normal(*X, dtype=torch.float64)
    u, v, logdet = split_latents(flow, x)
    pie = log_normal(v, 0.1)
    pie = pie + log_normal(u, 1) + logdet
    assert_close(flow.terms(x).log_likelihood, pie, terms=100)
    # The loss leaves out only the normalizer.
    constant = v.shape[1] * (math.log(0.1) + math.log(2 * math.pi) / 2)
    assert_close(-flow.terms(x).loss - constant, pie, terms=100)


@pytest.mark.parametrize("domain", ["latent", "data"])
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("weight", [0.5, 40.0])
def test_p_v_is_a_density(domain, rho, weight):
    """exp(off_manifold) of a single v pixel integrates to 1."""
    objective = ManifoldObjective(domain, rho, weight=weight, delta=0.3, sigma=0.7)
    flow = ManifoldFlow(VectorFlow(2, 1, 2).double(), 1, objective=objective)
    # At weight 0.5, the tails of l1 and huber fall by e^-0.15 per unit, so they reach e^-36 at 240.
    v = torch.linspace(-240, 240, 480_001, dtype=torch.float64)
    latents = (torch.stack([v, torch.zeros_like(v)], 1),)
    density = objective.off_density(flow, latents).exp()
    # At the kink of l1, whose slope is the weight, the trapezoidal rule with steps of h = 0.001 has
    # an error of (weight h)^2 / 12.
    error = (weight * 1e-3) ** 2 / 10
    assert torch.trapezoid(density, v).item() == pytest.approx(1, abs=error)


class Stretched(nn.Module):
    """A vector flow whose first two latents are multiplied by `by`."""

    def __init__(self, flow, by) -> None:
        super().__init__()
        self.flow, self.input_shape, self.latent_shapes = flow, flow.input_shape, flow.latent_shapes
        self.by = torch.tensor([by, by, *[1.0] * (flow.input_shape[0] - 2)], dtype=torch.float64)

    def forward(self, x):
        (z,), logdet = self.flow(x)
        return (z * self.by,), logdet + self.by.log().sum()

    def inverse(self, z):
        x, logdet = self.flow.inverse((z[0] / self.by,))
        return x, logdet - self.by.log().sum()


@pytest.mark.parametrize(
    "of",
    [
        lambda by: ManifoldObjective("data", "huber", weight=5.0, sigma=0.1 * by),
        lambda by: ManifoldObjective("latent", "l2", weight=100.0 / by**2),
        lambda by: ManifoldObjective("latent", "l1", weight=10.0 / by),
    ],
    ids=["sigma", "latent l2", "latent l1"],
)
def test_scaling_v_and_p_v_together_changes_nothing(of):
    """Neither the likelihood nor the penalty changes."""
    flow = VectorFlow(4, 2, 8).double()
    x = normal(3, 4, dtype=torch.float64)
    plain, stretched = (ManifoldFlow(Stretched(flow, by), 2, objective=of(by)) for by in (1.0, 7.0))
    assert_close(stretched.log_prob(x), plain.log_prob(x), terms=100)
    assert_close(stretched.terms(x).penalty, plain.terms(x).penalty, terms=100)


@pytest.mark.parametrize("domain", ["latent", "data"])
@pytest.mark.parametrize("rho", RHOS)
def test_gradients(domain, rho):
    """Gradients through latents, penalties and the inverse agree with finite differences."""
    objective = ManifoldObjective(domain, rho, weight=3.0, delta=0.4, sigma=0.5)
    flow = VectorFlow(4, 2, 4).double()
    flow.chain.reversible = False  # gradcheck perturbs inputs between forward and backward
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model = ManifoldFlow(flow, 2, objective=objective)
    names = [name for name, _ in model.named_parameters()]
    x = normal(3, 4, dtype=torch.float64).requires_grad_()

    def loss(x, *values):
        parameters = dict(zip(names, values, strict=True))
        parameters = {f"model.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(_Loss(model), parameters, (x,))

    leaves = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(loss, (x, *leaves), fast_mode=True)


class _Loss(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.terms(x).loss


def test_float32_terms_are_float32():
    flow = image_flow(ManifoldObjective("data", "huber")).float()
    for value in flow.terms(normal(*X)):
        assert value.dtype == torch.float32
        assert value.shape == (4,)


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


def test_a_constant_map_equals_a_number():
    x = normal(*X, dtype=torch.float64)
    latent = image_flow(ManifoldObjective("latent", weight=50.0))
    maps = tuple(torch.full(shape, 50.0, dtype=torch.float64) for shape in latent.latent_shapes)
    data = image_flow(ManifoldObjective("data", weight=50.0))
    for flow, weight in ((latent, maps), (data, torch.full((4, 4), 50.0, dtype=torch.float64))):
        expected = flow.terms(x)
        flow.objective = ManifoldObjective(flow.objective.domain, weight=weight)
        for got, want in zip(flow.terms(x), expected, strict=True):
            assert_close(got, want, terms=100)


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


@pytest.mark.parametrize(
    ("rho", "weight", "tail"), [("l2", 25.0, 0.0), ("l1", 4.0, 1.0), ("huber", 3.0, None)]
)
def test_draws_off_the_manifold_follow_p_v(rho, weight, tail):
    """The score identity E[w rho(v)] = (1 + t) / 2, and the share t of draws beyond delta."""
    e = draw_errors(torch.full((40_000,), weight), rho, 0.4, torch.Generator().manual_seed(0))
    if tail is None:
        a = 0.4 * math.sqrt(weight / 2)
        tail = 1 / (1 + math.sqrt(math.pi) * a * math.exp(a**2) * math.erf(a))
        beyond = (e.abs() > 0.4).double().mean().item()
        assert beyond == pytest.approx(tail, abs=4 * math.sqrt(tail * (1 - tail) / len(e)))
    penalty = weight * rho_of(rho, e, 0.4).double()
    error = 4 * penalty.std().item() / math.sqrt(len(e))
    assert penalty.mean().item() == pytest.approx((1 + tail) / 2, abs=error)
    assert e.mean().item() == pytest.approx(0.0, abs=4 * e.std().item() / math.sqrt(len(e)))


class OneParameter(nn.Module):
    """A model whose penalized likelihood has a known optimum: with sigma = 1,

    -log p = (theta - 3)^2 / 2 + constant, and every pixel's error is theta.
    """

    input_shape = (2,)
    latent_shapes = ((2,),)

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
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    for value in (math.nan, math.inf):
        objective._adapt(torch.full((2, 3), value), zeros)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name


def saved_bytes(steps, reversible, domain):
    """Return the bytes that the terms store for the backward pass, without parameters."""
    glow = Glow((1, 8, 8), 1, steps, 4, reversible=reversible, checkpoint_every=None)
    flow = ManifoldFlow(glow, 8, objective=ManifoldObjective(domain))
    own = {p.untyped_storage().data_ptr() for p in (*flow.parameters(), *flow.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > 2048:  # states, but not weights
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = normal(64, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow.terms(x).loss.sum()
    loss.backward()
    return sum(kept.values())


def test_the_inverse_pass_of_the_data_domain_stores_nothing():
    """The stored bytes do not grow with depth: only the ends of the inverse pass are stored."""
    shallow, deep = saved_bytes(2, True, "data"), saved_bytes(8, True, "data")
    assert shallow == deep
    state = 64 * 64 * 4
    assert shallow <= saved_bytes(2, True, "latent") + 6 * state
    assert saved_bytes(8, False, "data") > 4 * deep


def test_maps_that_do_not_fit_the_model():
    message = r"weight: expected a shape that broadcasts to \(1, 4, 4\), got \(3, 4\)"
    with pytest.raises(ValueError, match=message):
        image_flow(ManifoldObjective("data", weight=torch.ones(3, 4)))
    with pytest.raises(ValueError, match="weight: expected one map for each of 2 latents, got 1"):
        image_flow(ManifoldObjective("latent", weight=(torch.ones(2, 1, 1),)))
    message = r"weight\[1\]: expected a shape that broadcasts to \(8, 1, 1\), got \(2, 1, 1\)"
    flow = image_flow(None)
    flow.objective = ManifoldObjective("latent", weight=(torch.ones(2, 1, 1),) * 2)
    with pytest.raises(ValueError, match=message):
        flow.terms(normal(*X, dtype=torch.float64))


@pytest.mark.parametrize("domain", ["latent", "data"])
def test_bad_batches(domain):
    flow = image_flow(ManifoldObjective(domain))
    with pytest.raises(TypeError, match=r"x: expected dtype float32, .* got int64"):
        flow.terms(torch.ones(X, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected at least one sample, got shape \(0, 1, 4"):
        flow.terms(torch.empty(0, 1, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 1, 4, 4\), got \(2, 1, 4, 6\)"):
        flow.terms(torch.ones(2, 1, 4, 6, dtype=torch.float64))
