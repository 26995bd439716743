"""Objectives: values by hand, densities, gradients, dtypes and memory."""

import pytest
import torch
from cases import normal, perturbed

from mflow_kernels import Glow, ManifoldFlow, ManifoldObjective, VectorFlow
from mflow_kernels.models.objectives import Terms
from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.testing import assert_close
from models.flows import assert_gradient_is_a_difference, image_flow
from models.objectives_by_hand import X, log_normal, rho_of, split_latents


@pytest.mark.parametrize("domain", ["latent", "data"])
@pytest.mark.parametrize("rho", RHOS)
def test_terms_by_hand(domain, rho, device):
    """The penalty is on v and defines p_V, or it is on reconstructions and p_V is Gaussian."""
    objective = ManifoldObjective(domain, rho, weight=7.0, delta=0.4, sigma=0.3)
    flow = image_flow(objective).to(device)
    x = normal(*X, dtype=torch.float64, device=device)
    u, v, logdet = split_latents(flow, x)
    e = v if domain == "latent" else x - flow.decode(u)
    on, penalty = log_normal(u, 1), 7.0 * rho_of(rho, e, 0.4).flatten(1).sum(1)
    terms = flow.terms(x)
    # `test_p_v_is_a_density` checks the normalizer of the latent domain.
    off = terms.off_manifold if domain == "latent" else log_normal(v, 0.3)
    loss = penalty - on - logdet - (0 if domain == "latent" else off)
    wants = Terms(loss, on + off + logdet, on, off, logdet, penalty)
    for got, want in zip(terms, wants, strict=True):
        assert_close(got, want, terms=100)


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


@pytest.mark.parametrize("domain", ["latent", "data"])
@pytest.mark.parametrize("rho", RHOS)
def test_gradients(domain, rho):
    """Through latents, penalties and the inverse."""
    objective = ManifoldObjective(domain, rho, weight=3.0, delta=0.4, sigma=0.5)
    model = ManifoldFlow(perturbed(VectorFlow(4, 2, 4), 0.3).double(), 2, objective=objective)
    x = normal(3, 4, dtype=torch.float64)
    assert_gradient_is_a_difference(lambda x: model.terms(x).loss, model, x)


def test_float32_terms_are_float32():
    flow = image_flow(ManifoldObjective("data", "huber")).float()
    for value in flow.terms(normal(*X)):
        assert value.dtype == torch.float32
        assert value.shape == (4,)


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
