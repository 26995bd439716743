"""A mixture of Gaussians as the density of u: its formulas, its fit, and models that have one."""

import pytest
import torch
from torch import distributions as td

from mflow_kernels import GaussianMixture, HierarchicalFlow, ManifoldFlow, VectorFlow
from mflow_kernels.testing import assert_close


def clusters(n: int = 2000) -> torch.Tensor:
    """Three clusters in three dimensions, with weights 1/2, 1/4, 1/4 and different spreads."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    means = torch.tensor([[-4.0, 0.0, 0.0], [4.0, 4.0, 0.0], [4.0, -4.0, 2.0]]).double()
    which = torch.tensor([0, 0, 1, 2]).repeat(n // 4)
    return means[which] + normal * torch.tensor([1.0, 0.5, 0.25])[which, None]


def of_torch(mixture: GaussianMixture) -> td.MixtureSameFamily:
    below = mixture.below_diagonal.tril(-1) + torch.diag_embed(mixture.log_diagonal.exp())
    own = td.MultivariateNormal(mixture.means, precision_matrix=below.mT @ below)
    return td.MixtureSameFamily(td.Categorical(logits=mixture.log_weights), own)


@pytest.fixture
def fitted() -> GaussianMixture:
    mixture = GaussianMixture(3, 3).double()
    mixture.fit(clusters())
    return mixture


def test_the_density_is_that_of_torch(fitted):
    with torch.no_grad():
        fitted.below_diagonal += torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1))
    u = clusters(40)
    assert_close(fitted.log_prob(u), of_torch(fitted).log_prob(u), terms=100)


def test_the_fit_finds_clusters(fitted):
    weights = sorted(fitted.log_weights.softmax(0).tolist())
    assert weights == pytest.approx([0.25, 0.25, 0.5], abs=0.01)
    means = {tuple(mean.round().tolist()) for mean in fitted.means}
    assert means == {(-4, 0, 0), (4, 4, 0), (4, -4, 2)}
    one = GaussianMixture(3, 1).double()
    one.fit(clusters())
    assert fitted.log_prob(clusters()).mean() > one.log_prob(clusters()).mean() + 1


def test_samples_have_the_density(fitted):
    u = fitted.sample(20_000, generator=torch.Generator().manual_seed(0))
    want = of_torch(fitted)
    spread = want.variance.sqrt() / 20_000**0.5
    assert ((u.mean(0) - want.mean).abs() < 4 * spread).all()
    # The variance of a bounded sum of Gaussians: its standard error is below 3 / sqrt(n).
    assert ((u.var(0) / want.variance - 1).abs() < 4 * 3 / 20_000**0.5).all()
    cold = fitted.sample(100, temperature=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.cdist(cold, fitted.means).amin(1).max() < 1e-12


def test_fewer_samples_than_components_or_dimensions_give_a_density():
    mixture = GaussianMixture(5, 4)
    mixture.fit(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    assert mixture.log_prob(torch.zeros(3, 5)).isfinite().all()
    mixture.fit(torch.zeros(6, 5))
    assert mixture.log_prob(torch.zeros(3, 5)).isfinite().all()


def hierarchy(components: int = 3) -> HierarchicalFlow:
    """Two flows on three clusters in a plane of four dimensions; the second has a mixture."""
    torch.manual_seed(0)
    first = ManifoldFlow(VectorFlow(4, steps=1, width=4), 3)
    flow, prior = VectorFlow(3, steps=1, width=4), GaussianMixture(3, components)
    model = HierarchicalFlow([first, ManifoldFlow(flow, 3, prior=prior)])
    for stage in range(2):
        model.initialize(in_a_plane(), stage=stage)
    return model.eval()


def in_a_plane() -> torch.Tensor:
    return torch.cat([clusters(), torch.zeros(2000, 1)], 1).float()


def test_a_hierarchy_has_the_density_of_its_mixture():
    model = hierarchy()
    x, log_prob = model.sample_and_log_prob(50, generator=torch.Generator().manual_seed(0))
    assert_close(model.log_prob(x), log_prob, terms=1000)
    u, terms = model.encode(x), model.terms(x, stage=1)
    assert_close(terms.on_manifold, model.prior.log_prob(u), terms=100)
    parts = terms.on_manifold + terms.off_manifold + terms.logdet
    assert_close(terms.log_likelihood, parts, terms=10)
    far = model.ood_score(x + 30, 1.0, volume=False)
    assert (far > model.ood_score(x, 1.0, volume=False)).all()
    terms.loss.mean().backward()
    assert all(p.grad.any() for p in model.prior.parameters())


def test_a_mixture_separates_what_one_gaussian_joins():
    """Samples of the mixture lie near the data, although the flow has one step."""
    medians = []
    for components in (3, 1):
        x = hierarchy(components).sample(500, generator=torch.Generator().manual_seed(1))
        medians.append(torch.cdist(x, in_a_plane()).amin(1).median())
    assert medians[0] < medians[1] / 2
