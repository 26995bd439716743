"""The density and the samples of flows with standard normal latents."""

import math

import pytest
import torch
from cases import normal, perturbed

from layers.chains import levels
from mflow_kernels import FlowStep, Glow, ManifoldFlow, ReversibleChain, VectorFlow
from mflow_kernels.testing import assert_close


def one_level(**options) -> ReversibleChain:
    return ReversibleChain([FlowStep(3, width=4, spatial_dims=0) for _ in range(2)], **options)


FLOWS = {
    "images": lambda: Glow((1, 4, 4), 2, 1, 4),
    "vectors": lambda: VectorFlow(3, 2, 4),
    "chain": lambda: one_level(input_shape=(3,)),
    "chain with a split": lambda: levels(input_shape=(1, 4, 2)),
    "chain, states stored": lambda: one_level(input_shape=(3,), reversible=False),
}
every_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)


@every_flow
def test_log_prob_is_the_normal_density_of_z_and_the_volume(make, device):
    flow = perturbed(make()).double().to(device)
    x = normal(2, *flow.input_shape, dtype=torch.float64, device=device)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: flat(flow(x[None])[0])[0]))(x)
    dimensions = math.prod(flow.input_shape)
    logdet = jacobian.reshape(2, dimensions, dimensions).slogdet().logabsdet
    z = flat(flow(x)[0])
    covariance = torch.eye(dimensions, dtype=x.dtype, device=device)
    expected = torch.distributions.MultivariateNormal(z.new_zeros(dimensions), covariance)
    assert_close(flow.log_prob(x), expected.log_prob(z) + logdet, terms=10_000)


def flat(z):
    parts = z if isinstance(z, tuple) else (z,)
    return torch.cat([part.flatten(1) for part in parts], 1)


@every_flow
def test_samples_are_the_inverse_of_normal_latents(make, device):
    flow = perturbed(make()).to(device)

    def draw(seed, **options):
        return flow.sample(5, generator=torch.Generator(device).manual_seed(seed), **options)

    x = draw(1)
    assert x.shape == (5, *flow.input_shape)
    assert x.device == next(flow.parameters()).device
    assert not x.requires_grad
    assert torch.equal(draw(1), x)
    assert not torch.equal(draw(2), x)
    warm, cool = flat(flow(x)[0]), flat(flow(draw(1, temperature=0.5))[0])
    assert_close(cool, warm / 2, terms=10_000, scale=warm.abs().max().item())
    assert_close(draw(1, temperature=0.0)[0], flow.sample(1, temperature=0.0)[0], terms=100)


@pytest.mark.filterwarnings("ignore:mask. all latent pixels are u")
def test_a_chain_serves_a_manifold_flow():
    for chain, shape in (
        (one_level(input_shape=(3,)), (3,)),
        (levels(input_shape=(1, 4, 2)), (1, 4, 2)),
    ):
        model = ManifoldFlow(perturbed(chain), manifold_dim=2)
        x = normal(3, *shape)
        model.initialize(x)
        model.terms(x).loss.sum().backward()
        u = model.encode(x).detach()
        assert u.shape == (3, 2)
        assert_close(model.encode(model.decode(u)), u, terms=1000)
        assert model.sample(2).shape == (2, *shape)
        plain = ManifoldFlow(chain, mask=tuple(torch.ones(s).bool() for s in chain.latent_shapes))
        assert_close(plain.log_prob(x), chain.log_prob(x), terms=100)


def test_latent_shapes_of_a_chain():
    assert levels(input_shape=(1, 4, 2)).latent_shapes == ((2, 2, 1), (2, 2, 1))
    assert levels(input_shape=[1, 4, 2]).input_shape == (1, 4, 2)
    assert one_level(input_shape=(3,)).latent_shapes == ((3,),)
    z, _ = levels()(normal(2, 1, 4, 2))
    assert [tuple(part.shape[1:]) for part in z] == [(2, 2, 1), (2, 2, 1)]


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (one_level, (4,), r"input_shape: expected \(3, \*spatial\), got \(4,\)"),
        (one_level, (), r"input_shape: expected \(3, \*spatial\), got \(\)"),
        (levels, (1, 3, 4), r"input_shape: expected \(1, H, W\) with .* by 2, got \(1, 3, 4\)"),
        (levels, (1, 4), r"input_shape: expected \(1, H, W\) with .* by 2, got \(1, 4\)"),
        (one_level, (0,), "input_shape: expected at least 1, got 0"),
    ],
)
def test_input_shapes_that_do_not_fit(make, shape, message):
    with pytest.raises(ValueError, match=message):
        make(input_shape=shape)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"input_shape: .* give it to the constructor"):
        one_level().sample(2)
    with pytest.raises(TypeError, match=r"flow: .* got ReversibleChain without an input_shape"):
        ManifoldFlow(one_level(), 2)
    flow = VectorFlow(3, 1, 4)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        flow.sample(0)
    with pytest.raises(ValueError, match="temperature: expected a finite number >= 0, got -1"):
        flow.sample(1, temperature=-1)
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 3\), got \(2, 4\)"):
        one_level(input_shape=(3,)).log_prob(normal(2, 4))
