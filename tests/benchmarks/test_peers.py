"""Losses of other manifold flows, each compared with its formula."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.manifold.peers import (
    Autoencoder,
    denoising_loss,
    free_form_loss,
    pie_loss,
    prior_loss,
    reconstruction_loss,
    rectangular_loss,
    warm_up,
)
from mflow_kernels import HierarchicalFlow, ManifoldFlow, ManifoldObjective, VectorFlow

D, DIM, N, DEVIATION = 5, 2, 6, 0.1


@pytest.fixture
def x():
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(x):
    """A flow on D dimensions, then a prior flow on u, float64."""
    torch.manual_seed(0)
    objective = ManifoldObjective("latent", "l2", weight=DEVIATION**-2)
    first = ManifoldFlow(VectorFlow(D, 2, 8), DIM, objective=objective)
    model = HierarchicalFlow([first, ManifoldFlow(VectorFlow(DIM, 2, 8), DIM)]).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.dim() == 2 and not p.any() else None
    for stage in range(2):
        model.initialize(x, stage=stage)
    return model


def autoencoder(prior=None):
    encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, DIM))
    decoder = nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, D))
    return Autoencoder(encoder, decoder, (D,), DIM, prior).double()


def gradients(loss, model):
    return torch.autograd.grad(loss.mean(), list(model.parameters()), allow_unused=True)


def test_an_autoencoder_composes_its_networks_and_its_prior(x):
    prior = ManifoldFlow(VectorFlow(DIM, 2, 8), DIM).double()
    model = autoencoder(prior)
    code = model.encoder(x)
    prior.initialize(code)
    torch.testing.assert_close(model.encode(x, stages=1), code)
    torch.testing.assert_close(model.encode(x), prior.encode(code))
    torch.testing.assert_close(model.decode(model.encode(x)), model.decoder(code))
    assert model.sample(3).shape == (3, D)
    # The density on the manifold has the volume of prior and decoder together.
    density = model.manifold_log_prob(x).value
    expected = prior.log_prob(code) - autoencoder_volume(model, code)
    torch.testing.assert_close(density, expected)
    with pytest.raises(NotImplementedError):
        model.log_prob(x)


def autoencoder_volume(model, code):
    jacobian = torch.vmap(torch.func.jacrev(model.decoder))(code)
    return torch.logdet(jacobian.mT @ jacobian) / 2


def test_two_phases_train_the_chart_and_then_the_prior(model, x):
    first, prior = model.stages
    error = reconstruction_loss(model, x)
    torch.testing.assert_close(error, (x - first.project(x)).square().sum(1))
    assert all(g is None for g in torch.autograd.grad(
        error.sum(), list(prior.parameters()), allow_unused=True))  # fmt: skip
    loss = prior_loss(model, first.encode(x).detach())
    torch.testing.assert_close(loss, -prior.log_prob(first.encode(x)))
    loss.sum().backward()
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in prior.parameters())


def test_pie_is_the_likelihood_with_a_gaussian_v(model, x):
    first, prior = model.stages
    latents, logdet = first.latents(x)
    v = latents[0][:, : D - DIM]
    off = torch.distributions.Normal(0.0, DEVIATION).log_prob(v).sum(1)
    expected = -(prior.log_prob(first.gather(latents)) + off + logdet)
    torch.testing.assert_close(pie_loss(model, x), expected)


def test_a_denoising_flow_adds_the_noise_of_v(model, x):
    loss = denoising_loss(model, x, 30.0, torch.Generator().manual_seed(1))
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    noisy = x + DEVIATION * noise
    error = (x - model.stages[0].project(noisy)).square().sum(1)
    torch.testing.assert_close(loss, 15 * error - model.log_prob(noisy))


def test_a_rectangular_flow_has_the_density_on_the_manifold(model, x):
    error = reconstruction_loss(model, x)
    for likelihood in (0.0, 0.4, 1.0):
        loss = rectangular_loss(model, x, 20.0, likelihood=likelihood, method="exact")
        expected = 10 * error - likelihood * model.manifold_log_prob(x).value
        torch.testing.assert_close(loss, expected)


def test_volumes_of_a_part_of_the_batch_are_unbiased(model, x):
    whole = rectangular_loss(model, x, 20.0, method="exact").mean()
    parts = [
        rectangular_loss(model, x.roll(shift, 0), 20.0, method="exact", volume_samples=2).mean()
        for shift in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_a_free_form_flow_has_the_gradient_of_the_exact_volume():
    """With one code dimension and a decoder that inverts the encoder's Jacobian, the trace
    estimator is exact, so its gradient is that of 1/2 log det F F^T."""
    torch.manual_seed(0)
    x = torch.randn(1, D, dtype=torch.float64)
    encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    jacobian = torch.func.jacrev(encoder)(x[0])  # (1, D)
    decoder = nn.Linear(1, D).double()
    decoder.weight.data = jacobian.detach().T / jacobian.detach().square().sum()
    model = Autoencoder(encoder, decoder, (D,), 1)
    code = encoder(x)
    likelihood = -(code.square() / 2).sum(1) + (jacobian @ jacobian.T).logdet() / 2
    error = reconstruction_loss(model, x)
    loss = free_form_loss(model, x, 3.0, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(
        gradients(loss, model), gradients(1.5 * error - likelihood, model), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_the_free_form_volume_adds_nothing_to_the_value(x):
    prior = ManifoldFlow(VectorFlow(DIM, 2, 8), DIM).double()
    model = autoencoder(prior)
    expected = 2 * reconstruction_loss(model, x) - prior.log_prob(model.encoder(x))
    torch.testing.assert_close(free_form_loss(model, x, 4.0), expected)


def own_objective():
    """A model without the Gaussian v that some losses need."""
    flow = ManifoldFlow(VectorFlow(D, 2, 8), DIM, objective=ManifoldObjective("data")).double()
    return HierarchicalFlow([flow])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: pie_loss(own_objective(), x), "first stage with ManifoldObjective"),
        (lambda m, x: denoising_loss(own_objective(), x, 1.0), "first stage with ManifoldObject"),
        (lambda m, x: rectangular_loss(m, x, 0.0), "weight: expected"),
        (lambda m, x: rectangular_loss(m, x, 1.0, likelihood=2.0), "likelihood: expected"),
        (lambda m, x: rectangular_loss(m, x, 1.0, volume_samples=N + 1), "volume_samples"),
        (lambda m, x: denoising_loss(m, x, -1.0), "weight: expected"),
        (lambda m, x: free_form_loss(autoencoder(), x, 1.0, probes=0), "probes"),
        (lambda m, x: autoencoder(ManifoldFlow(VectorFlow(3, 1, 4), 3)), "prior: expected"),
    ],
)
def test_bad_input_is_refused(model, x, call, message):
    with pytest.raises(ValueError, match=message):
        call(copy.deepcopy(model), x)


def test_draws_follow_the_generator(x):
    model = autoencoder()
    first, again, other = (
        gradients(free_form_loss(model, x, 1.0, generator=torch.Generator().manual_seed(s)), model)
        for s in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_warm_up():
    assert [warm_up(p, 0.2, 0.6) for p in (0, 0.2, 0.3, 0.6, 1)] == pytest.approx(
        [0, 0, 0.25, 1, 1]
    )
