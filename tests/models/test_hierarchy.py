import math
from unittest import mock

import pytest
import torch
from cases import normal

from mflow_kernels import HierarchicalFlow, ManifoldFlow, ManifoldObjective
from mflow_kernels.testing import assert_close
from models.flows import hierarchy

X = (3, 1, 4, 4)


def test_encoding_and_decoding_compose():
    a, b, c = hierarchy(8, 8, 3).stages
    model = HierarchicalFlow([a, b, c])
    x = normal(*X, dtype=torch.float64)
    u = c.encode(b.encode(a.encode(x)))
    assert torch.equal(model.encode(x), u)
    assert torch.equal(model.decode(u), a.decode(b.decode(c.decode(u))))
    assert torch.equal(model.encode(x, stages=2), b.encode(a.encode(x)))
    assert torch.equal(model.project(x, stages=1), a.project(x))
    assert torch.equal(model.project(x, stages=0), x)
    assert model.manifold_dim == 3
    assert model.input_shape == (1, 4, 4)


def test_sub_manifolds_nest():
    """A point on the smaller manifold also lies on the larger ones."""
    model = hierarchy(8, 8, 3)
    x = normal(*X, dtype=torch.float64)
    small = model.project(x)
    for count in (1, 2, 3):
        assert_close(model.project(small, stages=count), small, terms=100)
    assert (model.project(x, stages=1) - small).abs().max() > 1e-3


def test_ambient_samples_draw_v_in_every_stage():
    """u equals that of samples on the manifold; v has the scale of p_V times the temperature."""
    a, b = hierarchy(8, 3).stages
    a.objective = ManifoldObjective("latent", "l1", weight=2.0)
    b.objective = ManifoldObjective("data", sigma=0.3)
    model = HierarchicalFlow([a, b])
    how = {"n": 4000, "temperature": 0.5}
    on = model.sample(**how, generator=torch.Generator().manual_seed(0))
    x = model.sample(**how, generator=torch.Generator().manual_seed(0), off_manifold=True)
    assert_close(model.encode(x), model.encode(on), terms=10_000)
    z = torch.cat([part.flatten(1) for part in a.latents(x)[0]], 1)
    v = z[:, torch.cat([mask.flatten() for mask in a.off_masks()])]
    assert v.abs().mean().item() == pytest.approx(0.5 / 2.0, rel=4 / math.sqrt(v.numel()))
    w = b.latents(a.encode(x))[0][0][:, b.off_masks()[0]]
    assert w.std().item() == pytest.approx(0.5 * 0.3, rel=4 / math.sqrt(2 * w.numel()))
    u = model.encode(on)
    assert_close(model.encode(model.lift(u, temperature=0.5)[0]), u, terms=10_000)
    first = model.sample(**how, generator=torch.Generator().manual_seed(0), stages=1)
    other = a.sample(**how, generator=torch.Generator().manual_seed(0), off_manifold=True)
    assert_close(a.encode(other), a.encode(first), terms=10_000)


def test_log_prob_composes():
    """p(x) = p_V(v) |det df/dx| p(u), where the next stage gives p(u)."""
    a, b = hierarchy(6, 4).stages
    a.objective = ManifoldObjective("latent", "l2", weight=30.0)
    model = HierarchicalFlow([a, b])
    x = normal(*X, dtype=torch.float64)
    z, logdet = a.latents(x)
    v = torch.cat([part[:, m] for part, m in zip(z, a.off_masks(), strict=True)], 1)
    off = (-30 * v.square() / 2 + math.log(30 / (2 * math.pi)) / 2).sum(1)
    expected = logdet + off + b.log_prob(a.encode(x))
    assert_close(model.log_prob(x), expected, terms=100)
    assert_close(model.log_prob(x, stages=1), a.log_prob(x), terms=100)


def test_earlier_stages_are_frozen_unless_released():
    x = normal(*X, dtype=torch.float64)
    for release in (False, True):
        model = hierarchy(6, 4).train()
        model.stages[0].objective = ManifoldObjective("data", weight="variance").train()
        model.terms(x, stage=1, release=release).loss.sum().backward()
        assert model.stages[0].objective.batches == release
        grads = [p.grad is not None for p in model.stages[0].parameters()]
        assert all(grads) if release else not any(grads)
        assert all(p.grad is not None for p in model.stages[1].parameters())


def test_released_stages_train_the_likelihood_of_the_data():
    """The loss is -log p(x) of all stages, plus penalties and up to constant normalizers."""
    a, b, c = hierarchy(8, 6, 4).stages
    a.objective = ManifoldObjective("data", "huber", weight=3.0, sigma=0.5)
    b.objective = ManifoldObjective("latent", "l1", weight=20.0)
    c.objective = ManifoldObjective("latent", "l2", weight=50.0)
    model = HierarchicalFlow([a, b, c])
    x = normal(*X, dtype=torch.float64)
    terms = model.terms(x, stage=2, release=True)
    assert_close(terms.log_likelihood, model.log_prob(x), terms=100)
    assert_close(terms.on_manifold, c.terms(model.encode(x, stages=2)).on_manifold, terms=100)
    normalizers = 2 * math.log(2 / 20) + 2 * math.log(2 * math.pi / 50) / 2
    expected = a.terms(x).penalty - model.log_prob(x) - normalizers
    assert_close(terms.loss, expected, terms=100)
    parameters = list(model.parameters())
    got, want = (torch.autograd.grad(loss.sum(), parameters) for loss in (terms.loss, expected))
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, terms=1000)
    # With a single stage, nothing can be released.
    torch.testing.assert_close(model.terms(x, stage=0, release=True), a.terms(x), rtol=0, atol=0)


@pytest.mark.parametrize("release", [False, True])
def test_terms_and_log_prob_take_one_pass(release):
    model = hierarchy(8, 6, 4)
    x = normal(*X, dtype=torch.float64)
    for stage in range(3):
        expected = model.terms(x, stage=stage, release=release)
        if not release:
            for got, want in zip(
                expected, model.stages[stage].terms(model.encode(x, stages=stage)), strict=True
            ):
                # Without gradients, torch may multiply matrices in another order.
                assert_close(got, want, terms=100)
        log_prob = model.log_prob(x, stages=stage + 1)
        with mock.patch.object(
            ManifoldFlow, "latents", autospec=True, side_effect=ManifoldFlow.latents
        ) as passes:
            terms, got = model.terms_and_log_prob(x, stage=stage, release=release)
        assert passes.call_count == stage + 1
        assert_close(got, log_prob, terms=100)
        torch.testing.assert_close(terms, expected, rtol=0, atol=0)


def test_initialize_sets_one_stage():
    model = hierarchy(6, 4)
    model.initialize(normal(16, 1, 4, 4, dtype=torch.float64), stage=1)
    flags = [
        {bool(v) for k, v in stage.state_dict().items() if k.endswith("initialized")}
        for stage in model.stages
    ]
    assert flags == [{False}, {True}]
