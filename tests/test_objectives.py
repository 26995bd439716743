import math

import pytest
import torch
from cases import normal
from torch import nn

from mflow_kernels import (
    Glow,
    ManifoldFlow,
    ManifoldObjective,
    VectorFlow,
    bits_per_dimension,
)
from mflow_kernels.objectives import Terms

RHOS = ("l2", "l1", "huber")
X = (4, 1, 4, 4)


def image_flow(objective, manifold_dim=5) -> ManifoldFlow:
    glow = Glow((1, 4, 4), 2, 1, 4)
    with torch.no_grad():
        for parameter in glow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return ManifoldFlow(glow, manifold_dim, objective=objective).double()


def split_latents(flow, x):
    z, logdet = flow.latents(x)
    v = torch.cat([part[:, m] for part, m in zip(z, flow.off_masks(), strict=True)], 1)
    return flow.gather(z), v, logdet


def log_normal(e, sigma):
    """log N(e; 0, sigma^2 I); torch.distributions would round sigma to float32."""
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
    torch.testing.assert_close(terms.on_manifold, on)
    torch.testing.assert_close(terms.penalty, penalty)
    torch.testing.assert_close(terms.logdet, logdet)
    torch.testing.assert_close(terms.loss, penalty - on - logdet)
    torch.testing.assert_close(
        terms.log_likelihood, terms.on_manifold + terms.off_manifold + terms.logdet
    )


@pytest.mark.parametrize("rho", RHOS)
def test_data_domain_by_hand(rho, device):
    """The penalty is on reconstructions, p_V stays a Gaussian; the likelihood has no penalty."""
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
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-10)


def test_latent_l2_is_the_gaussian_of_pie():
    """p_V = N(0, I / weight), to the last digits of float64: its normalizer is in float64 too."""
    flow = image_flow(ManifoldObjective("latent", "l2", weight=100.0))
    x = normal(*X, dtype=torch.float64)
    u, v, logdet = split_latents(flow, x)
    pie = log_normal(v, 0.1)
    pie = pie + log_normal(u, 1) + logdet
    torch.testing.assert_close(flow.terms(x).log_likelihood, pie, rtol=1e-13, atol=1e-12)
    # The loss leaves out that constant and nothing else.
    constant = v.shape[1] * (math.log(0.1) + math.log(2 * math.pi) / 2)
    torch.testing.assert_close(-flow.terms(x).loss - constant, pie, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("domain", ["latent", "data"])
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("weight", [0.5, 40.0])
def test_p_v_is_a_density(domain, rho, weight):
    """exp(off_manifold) of one v pixel integrates to 1."""
    objective = ManifoldObjective(domain, rho, weight=weight, delta=0.3, sigma=0.7)
    flow = ManifoldFlow(VectorFlow(2, 1, 2).double(), 1, objective=objective)
    # The tail of l1 and huber at weight 0.5 falls by e^-0.15 a unit: 240 units reach e^-36.
    v = torch.linspace(-240, 240, 480_001, dtype=torch.float64)
    latents = (torch.stack([v, torch.zeros_like(v)], 1),)
    density = objective.off_density(flow, latents).exp()
    # Trapezoids of h = 0.001 at l1's kink, where the slope is weight, are off by (weight h)^2 / 12.
    error = (weight * 1e-3) ** 2 / 10
    assert torch.trapezoid(density, v).item() == pytest.approx(1, abs=error)


@pytest.mark.parametrize("domain", ["latent", "data"])
@pytest.mark.parametrize("rho", RHOS)
def test_gradients(domain, rho):
    """Through latents, penalties and, in the data domain, the inverse: by finite differences."""
    objective = ManifoldObjective(domain, rho, weight=3.0, delta=0.4, sigma=0.5)
    flow = VectorFlow(4, 2, 4).double()
    flow.chain.reversible = False  # gradcheck's own perturbations want plain autograd
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model = ManifoldFlow(flow, 2, objective=objective)
    names = [name for name, _ in model.named_parameters()]
    x = normal(3, 4, dtype=torch.float64).requires_grad_()

    def loss(x, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(_Loss(model), _under("model.", parameters), (x,))

    leaves = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(loss, (x, *leaves), fast_mode=True)


class _Loss(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.terms(x).loss


def _under(prefix, parameters):
    return {prefix + name: value for name, value in parameters.items()}


def test_the_whole_space_has_no_off_manifold_term():
    flow = image_flow(ManifoldObjective(), manifold_dim=16)
    terms = flow.terms(normal(*X, dtype=torch.float64))
    assert not terms.off_manifold.any()
    assert not terms.penalty.any()


def test_float32_terms_are_float32():
    flow = image_flow(ManifoldObjective("data", "huber")).float()
    for value in flow.terms(normal(*X)):
        assert value.dtype == torch.float32
        assert value.shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "pixel"}, "domain: expected one of latent, data, got 'pixel'"),
        ({"rho": "l3"}, "rho: expected one of l2, l1, huber, got 'l3'"),
        ({"weight": 0.0}, "weight: expected a finite number > 0, got 0.0"),
        ({"weight": math.inf}, "weight: expected a finite number > 0, got inf"),
        ({"delta": -1.0}, "delta: expected a finite number > 0, got -1.0"),
        ({"sigma": math.nan}, "sigma: expected a finite number > 0, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ManifoldObjective(**arguments)


def test_bits_per_dimension():
    """A uniform density on [0, 1)^D costs n_bits a dimension: every level as likely as another."""
    assert bits_per_dimension(torch.zeros(2), 12, 5).tolist() == [5, 5]
    # A density of 2^D on half of that range saves one bit a dimension.
    likelihood = torch.full((1,), 12 * math.log(2), dtype=torch.float64)
    assert bits_per_dimension(likelihood, 12, 8).item() == pytest.approx(7)
