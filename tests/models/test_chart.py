"""Methods that all manifold flows share, for one flow and hierarchies of two and three stages."""

import math

import pytest
import torch
from cases import normal
from torch import nn

from mflow_kernels.models.chart import Chart
from mflow_kernels.testing import assert_close
from models.flows import hierarchy, image_flow


def assert_on_manifold(model, x):
    """Assert that x is its own projection, up to the rounding of about ten operators."""
    distance = model.distance(x)
    assert_close(distance, torch.zeros_like(distance), terms=10_000, scale=x.abs().max().item())


MODELS = [image_flow, lambda: hierarchy(6, 6), lambda: hierarchy(8, 6, 3)]
X = (3, 1, 4, 4)


@pytest.fixture(params=range(len(MODELS)))
def model(request, device):
    return MODELS[request.param]().to(device)


@pytest.fixture
def x(device):
    return normal(*X, dtype=torch.float64, device=device)


def test_projections_and_samples_lie_on_the_manifold(model, x):
    assert (model.distance(x) > 1e-2).all()
    projected = model.project(x)
    assert_close(model.distance(x), (x - projected).flatten(1).norm(dim=1), terms=100)
    assert_on_manifold(model, projected)
    assert_close(model.project(projected), projected, terms=1000)
    assert_on_manifold(model, model.sample(4))


def test_interpolation_stays_on_the_manifold(model, x):
    y = torch.flip(x, (0,)) + 1
    path = model.interpolate(x, y, 5)
    assert path.shape == (5, *X)
    assert_close(path[0], model.project(x), terms=1000)
    assert_close(path[-1], model.project(y), terms=1000)
    assert_on_manifold(model, path.flatten(0, 1))
    middle = (model.encode(x) + model.encode(y)) / 2
    assert_close(model.encode(path[2]), middle, terms=10_000)


@pytest.mark.parametrize("how", [{}, {"method": "hutchinson", "probes": 8}], ids=["", "estimate"])
def test_the_score_joins_density_and_distance(how, model, x):
    """By hand: -log p_M - log N(distance in the D - d directions off the manifold)."""
    off = 16 - model.manifold_dim
    noise = torch.distributions.Normal(0.0, torch.tensor(0.3, dtype=torch.float64, device=x.device))
    spread = torch.zeros(3, off, dtype=torch.float64, device=x.device)
    spread[:, 0] = model.distance(x).detach()

    def seeded():
        return how | {"generator": torch.Generator(x.device).manual_seed(0)}

    log_prob = model.manifold_log_prob(x, **seeded()).value
    expected = -log_prob - noise.log_prob(spread).sum(1)
    assert_close(model.ood_score(x, 0.3, **seeded()), expected, terms=1000)


def test_deviation_is_per_direction_off_the_manifold():
    model = image_flow()
    x = normal(4, 1, 4, 4, dtype=torch.float64)
    squared = (x - model.project(x)).square().flatten(1).sum(1).mean() / 11
    assert model.deviation(x) == pytest.approx(squared.sqrt().item())
    assert image_flow(dim=16).deviation(x) == 0


def test_empty_batches_give_empty_results(model, x):
    none = x[:0]
    assert model.encode(none).shape == (0, model.manifold_dim)
    assert model.project(none).shape == (0, 1, 4, 4)
    for call in (model.log_prob, model.distance, lambda x: model.ood_score(x, 1.0)):
        assert call(none).shape == (0,)
    for method in ("exact", "hutchinson"):
        value, error = model.manifold_log_prob(none, method=method)
        assert value.shape == error.shape == (0,)
    assert model.interpolate(none, none, 3).shape == (3, 0, 1, 4, 4)


class Plane(Chart):
    """The plane {A u} with orthogonal columns A, whose most probable u has a closed form."""

    def __init__(self):
        super().__init__()
        self.basis = nn.Parameter(torch.linalg.qr(normal(6, 2, dtype=torch.float64))[0])
        self.input_shape, self.manifold_dim = (6,), 2

    def encode(self, x, *, context=None):
        return x @ self.basis

    def decode(self, u, *, context=None):
        return u @ self.basis.T


def test_inpainting_finds_the_most_probable_point():
    """(A^T M A / s^2 + I) u = A^T M x / s^2, for the mask M of each sample."""
    model, s = Plane(), 0.3
    x = normal(4, 6, dtype=torch.float64)
    known = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1], [0] * 6, [1] * 6]).bool()
    a = model.basis.detach()
    weighted = a * known[:, :, None] / s**2
    left = a.T @ weighted + torch.eye(2, dtype=torch.float64)
    u = torch.linalg.solve(left, (weighted * x[:, :, None]).sum(1))
    hidden = x.where(known, math.nan)
    filled = model.inpaint(hidden, known, s, steps=400)
    assert torch.equal(filled[known], x[known])
    assert (filled - u @ a.T)[~known].abs().max() < 1e-4
    assert torch.equal(filled[:2], model.inpaint(hidden[:2], known[:2], s, steps=400))
    assert not filled.requires_grad
    found = model.most_probable(hidden, s, known, steps=400)
    assert (found - u).abs().max() < 1e-4
    assert (model.most_probable(x[3:], s, steps=400) - u[3:]).abs().max() < 1e-4
