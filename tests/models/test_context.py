"""Manifold flows with a context: one manifold and one density for each context."""

import pytest
import torch
from cases import normal, perturbed

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, ManifoldObjective, VectorFlow
from mflow_kernels.testing import assert_close


def hierarchy() -> HierarchicalFlow:
    """Two stages for two classes."""
    glow = Glow((1, 4, 4), 2, 1, 4, context_channels=2)
    model = HierarchicalFlow(
        [
            ManifoldFlow(glow, 5, objective=ManifoldObjective("data", weight=10.0)),
            ManifoldFlow(VectorFlow(5, 2, 4, context_channels=2), 3),
        ]
    )
    return perturbed(model).double().eval()


X = (4, 1, 4, 4)
CLASSES = torch.tensor([0, 1, 1, 0])

METHODS = {
    "encode": lambda m, x, c: m.encode(x, context=c),
    "decode": lambda m, x, c: m.decode(x.flatten(1)[:, : m.manifold_dim], context=c),
    "project": lambda m, x, c: m.project(x, context=c),
    "distance": lambda m, x, c: m.distance(x, context=c),
    "log_prob": lambda m, x, c: m.log_prob(x, context=c),
    "density on the manifold": lambda m, x, c: m.manifold_log_prob(x, context=c).value,
    "OOD score": lambda m, x, c: m.ood_score(x, 0.1, context=c),
    "interpolation": lambda m, x, c: m.interpolate(x, x.flip(1), 3, context=c).transpose(0, 1),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_sample_has_the_method_of_its_own_context(method):
    """A batch with mixed contexts gives what each context gives alone, and contexts differ."""
    model = hierarchy()
    x = normal(*X, dtype=torch.float64)
    call = METHODS[method]
    mixed = call(model, x, CLASSES)
    for c in range(2):
        own = c == CLASSES
        alone = call(model, x[own], CLASSES[own])
        assert_close(mixed[own], alone, terms=10_000, scale=alone.abs().max().item())
    assert not torch.allclose(mixed, call(model, x, 1 - CLASSES), rtol=1e-3)


@pytest.mark.parametrize("release", [False, True])
def test_terms_take_a_context(release):
    model = hierarchy()
    x = normal(*X, dtype=torch.float64)
    model.initialize(x, stage=0, context=CLASSES)
    model.initialize(x, stage=1, context=CLASSES)
    terms, log_prob = model.terms_and_log_prob(x, stage=1, release=release, context=CLASSES)
    assert_close(log_prob, model.log_prob(x, context=CLASSES), terms=10_000)
    other = model.terms(x, stage=1, release=release, context=1 - CLASSES)
    assert not torch.allclose(terms.loss, other.loss, rtol=1e-3)
    terms.loss.mean().backward()
    trained = model.stages if release else [model.stages[1]]
    assert all(p.grad is not None for stage in trained for p in stage.parameters())


def test_the_deviation_takes_a_context():
    model, x = hierarchy(), normal(*X, dtype=torch.float64)
    expected = (model.distance(x, context=CLASSES).square().mean() / (16 - 3)).sqrt().item()
    assert model.deviation(x, context=CLASSES) == pytest.approx(expected)
    assert model.deviation(x, context=1 - CLASSES) != pytest.approx(expected)
