import math

import pytest
import torch
from cases import HostReads, normal, perturbed

from mflow_kernels import Glow, ManifoldFlow, ManifoldObjective, VectorFlow
from mflow_kernels.testing import assert_close
from models.flows import image_flow


def test_the_default_mask_covers_the_image_evenly():
    """The shapes are those of a two-level flow on 28x28 images."""

    class Shapes(VectorFlow):
        def __init__(self):
            super().__init__(2, steps=1, width=2)
            self.input_shape, self.latent_shapes = (1, 28, 28), ((2, 14, 14), (8, 7, 7))

    before = torch.zeros(784, dtype=torch.bool)
    for dim in (1, 3, 15, 49, 64, 98, 200, 391, 392, 393, 500, 700, 783):
        flow = ManifoldFlow(Shapes(), dim)
        chosen = ~torch.cat([mask.flatten() for mask in flow.off_masks()])
        assert chosen.sum() == dim
        assert not (before & ~chosen).any()  # the manifolds nest
        before = chosen
        for mask in flow.off_masks():
            for counts in ((~mask).sum(1), (~mask).sum(2)):
                assert (counts.amax(1) - counts.amin(1)).max() <= 1
        fine, coarse = flow.off_masks()
        per_channel = (~coarse).sum((1, 2)).tolist()
        assert per_channel == [min(49, max(0, dim - 49 * (7 - c))) for c in range(8)]
        assert fine.all() or not coarse.any()


def test_encode_and_decode_follow_the_mask():
    mask = (torch.rand(2, 2, 2) < 0.5, torch.rand(8, 1, 1) < 0.5)
    mask[0][0, 0, 0] = True
    flow = ManifoldFlow(perturbed(Glow((1, 4, 4), 2, 1, 4)).double(), mask=mask)
    x = normal(3, 1, 4, 4, dtype=torch.float64)
    z, _ = flow.latents(x)
    u = flow.encode(x)
    assert torch.equal(u, torch.cat([part[:, m] for part, m in zip(z, mask, strict=True)], 1))
    assert u.shape == (3, flow.manifold_dim)
    zeroed = tuple(torch.where(m, part, 0.0) for part, m in zip(z, mask, strict=True))
    assert_close(flow.decode(u), flow.flow.inverse(zeroed)[0], terms=100)
    torch.testing.assert_close(flow.off_masks(), tuple(~m for m in mask))


def test_masks_broadcast_and_may_repeat_the_dimension():
    coarse = torch.arange(8)[:, None, None] >= 5
    flow = ManifoldFlow(Glow((1, 4, 4), 2, 1, 4), 7, mask=(torch.eye(2) > 0, coarse))
    assert flow.manifold_dim == 7
    fine_off, coarse_off = flow.off_masks()
    assert torch.equal(fine_off, ~(torch.eye(2) > 0).expand(2, 2, 2))
    assert torch.equal(coarse_off, ~coarse)


def constant_mask(every: bool, objective) -> ManifoldFlow:
    mask = tuple(torch.full((1, 1, 1), every) for _ in range(2))
    word = "the whole space .* the plain likelihood" if every else "one point .* the penalty alone"
    with pytest.warns(UserWarning, match=f"mask: .* {word}"):
        return ManifoldFlow(
            perturbed(Glow((1, 4, 4), 2, 1, 4)).double(), mask=mask, objective=objective
        )


@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize("domain", ["latent", "data"])
def test_the_whole_space_as_manifold_is_plain_likelihood(domain, by_mask):
    objective = ManifoldObjective(domain)
    flow = constant_mask(True, objective) if by_mask else image_flow(objective, 16)
    x = normal(3, 1, 4, 4, dtype=torch.float64)
    assert_close(flow.project(x), x, terms=100)
    terms = flow.terms(x)
    z, logdet = flow.latents(x)
    standard = sum((-part.square() / 2 - math.log(2 * math.pi) / 2).flatten(1).sum(1) for part in z)
    assert_close(terms.loss, -(standard + logdet), terms=100)
    assert_close(terms.log_likelihood, standard + logdet, terms=100)
    assert_close(flow.log_prob(x), standard + logdet, terms=100)
    assert not terms.off_manifold.any()
    assert not terms.penalty.any()
    assert flow.manifold_dim == 16


@pytest.mark.parametrize("domain", ["latent", "data"])
def test_an_empty_mask_leaves_the_penalty_alone(domain):
    flow = constant_mask(False, ManifoldObjective(domain, weight=7.0))
    x = normal(3, 1, 4, 4, dtype=torch.float64)
    assert flow.encode(x).shape == (3, 0)
    point = flow.flow.inverse((x.new_zeros(1, 2, 2, 2), x.new_zeros(1, 8, 1, 1)))[0]
    assert_close(flow.project(x), point.expand(3, -1, -1, -1), terms=100)
    assert_close(flow.sample(2), point.expand(2, -1, -1, -1), terms=100)
    terms = flow.terms(x)
    z, logdet = flow.latents(x)
    e = torch.cat([part.flatten(1) for part in z], 1) if domain == "latent" else (x - point)
    penalty = 7 * e.square().flatten(1).sum(1) / 2
    assert_close(terms.penalty, penalty, terms=100)
    assert not terms.on_manifold.any()
    assert not flow.manifold_log_prob(x).value.any()
    off = torch.zeros_like(penalty) if domain == "latent" else terms.off_manifold
    assert_close(terms.loss, penalty - logdet - off, terms=100)


@pytest.mark.parametrize("reversible", [True, False])
def test_training_in_the_data_domain_never_waits_for_the_device(reversible, monkeypatch):
    """Training in the data domain runs the flow in both directions and does not check W^-1."""
    # This one function computes on the host, from Python numbers.
    monkeypatch.setattr("mflow_kernels.models.objectives.penalty_log_normalizer", lambda *_: 0.0)
    glow = perturbed(Glow((1, 4, 4), 2, 2, 4, reversible=reversible))
    flow = ManifoldFlow(glow, 5, objective=ManifoldObjective("data"))
    x = normal(2, 1, 4, 4)
    flow.terms(x).loss.mean().backward()  # may check once whether networks repeat their results
    with HostReads() as reads:
        flow.terms(x).loss.mean().backward()
    assert not reads.found
    with HostReads() as reads, torch.no_grad():
        flow.project(x)
    assert reads.found  # a direct call checks W^-1 at once


def test_the_default_weight_fits_the_scale_of_the_data():
    """Images have a range of 1; vectors, such as u of another flow, have unit variance."""
    image, vector = image_flow(), ManifoldFlow(VectorFlow(3, 1, 4), 2)
    assert image.objective.weight == 400
    assert vector.objective.weight == 1
