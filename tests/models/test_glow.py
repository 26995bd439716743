import pytest
import torch
from cases import normal, perturbed
from torch import nn

from mflow_kernels import Glow, VectorFlow
from mflow_kernels.testing import assert_close, check_bijection


@pytest.mark.parametrize(
    ("shape", "levels", "expected"),
    [
        ((3, 32, 32), 3, ((6, 16, 16), (12, 8, 8), (48, 4, 4))),
        ((1, 28, 28), 2, ((2, 14, 14), (8, 7, 7))),
        ((2, 2, 6), 1, ((8, 1, 3),)),
    ],
)
def test_latent_shapes(shape, levels, expected):
    glow = Glow(shape, levels, 1, 2)
    assert glow.latent_shapes == expected
    assert glow.input_shape == shape
    z, logdet = glow(normal(2, *shape))
    assert tuple(part.shape[1:] for part in z) == expected
    assert logdet.shape == (2,)


def test_a_new_flow_only_rotates():
    """Couplings and actnorms start as the identity, so a new Glow preserves volume."""
    x = normal(2, 3, 8, 8)
    z, logdet = Glow((3, 8, 8), 2, 2, 4)(x)
    assert_close(logdet, torch.zeros(2), scale=1.0, terms=10_000)
    norms = torch.stack([part.square().flatten(1).sum(1) for part in z]).sum(0)
    assert_close(norms, x.square().flatten(1).sum(1), terms=192)


@pytest.mark.parametrize("reversible", [True, False])
def test_maps_over_samples(reversible, device):
    """torch.func.vmap of the flow, its inverse and its gradient agrees with a batch."""
    glow = perturbed(Glow((1, 4, 4), 2, 1, 4, reversible=reversible)).double().to(device)
    x = normal(3, 1, 4, 4, dtype=torch.float64, device=device).requires_grad_()
    (z, logdet), (plain, plain_logdet) = torch.func.vmap(glow)(x[:, None]), glow(x)
    back, _ = torch.func.vmap(glow.inverse)(z)
    grads = torch.func.vmap(torch.func.grad(lambda x: glow(x)[1].sum()))(x[:, None])
    wants = [*plain, plain_logdet, x, *torch.autograd.grad(plain_logdet.sum(), x)]
    for got, want in zip([*z, logdet, back, grads], wants, strict=True):
        assert_close(got.squeeze(1), want, terms=10_000)


@pytest.mark.parametrize("reversible", [True, False])
def test_runs_on_the_meta_device(reversible):
    """Forward, backward and inverse give shapes without data, as in memory planning."""
    glow = Glow((3, 8, 8), 2, 2, 8, reversible=reversible).to("meta")
    x = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)
    z, logdet = glow(x)
    (sum(part.sum() for part in z) + logdet.sum()).backward()
    assert [tuple(part.shape[1:]) for part in z] == list(glow.latent_shapes)
    for leaf in (x, *glow.parameters()):
        assert leaf.grad.shape == leaf.shape
    assert glow.inverse(z)[0].shape == x.shape


def test_autocast_takes_bfloat16_images():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Glow((1, 4, 4), 2, 1, 2)(normal(2, 1, 4, 4).bfloat16())[1].isfinite().all()


@pytest.mark.parametrize("dim", [2, 5])
def test_vector_flow(dim, device):
    flow = VectorFlow(dim, 2, 4).to(device)
    assert flow.latent_shapes == (flow.input_shape,) == ((dim,),)
    check_bijection(flow, (3, dim))
    x = 4 + 2 * normal(64, dim, device=device)
    (z,), _ = flow.initialize(x)
    assert_close(z.mean(0), torch.zeros_like(z[0]), terms=64, scale=x.abs().max().item())


def test_samples_of_networks_with_large_outputs_are_finite():
    """The default scale bounds |log s| for every output of a network."""
    glow = Glow((1, 4, 4), 2, 8, 8)
    for module in glow.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=3.0)
    x, logdet = glow.inverse(tuple(normal(16, *shape) for shape in glow.latent_shapes))
    assert x.isfinite().all()
    assert logdet.isfinite().all()
