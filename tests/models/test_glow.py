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


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 3, 4, 4), (1, 4, 4), (2, 16)], ids=str)
def test_inputs_of_wrong_shapes(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 1, 4, 4\), got \("):
        Glow((1, 4, 4), 1, 1, 2)(normal(*shape))
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 3\), got \("):
        VectorFlow(3, 1, 4)(normal(*shape))


X, FINE, COARSE = torch.zeros(2, 1, 4, 4), torch.zeros(2, 2, 2, 2), torch.zeros(2, 8, 1, 1)
SHAPES = r"z: expected latents of shapes \(\(2, 2, 2\), \(8, 1, 1\)\), got"
DTYPE = "expected the model's dtype float32, got"


@pytest.mark.parametrize(
    ("call", "given", "error", "message"),
    [
        ("inverse", (COARSE, FINE), ValueError, SHAPES),
        ("inverse", (FINE,), ValueError, SHAPES),
        ("inverse", (FINE[:1], COARSE), ValueError, r"z\[0\]: expected shape \(2, 2, 2, 2\), got"),
        ("inverse", FINE, TypeError, "z: expected a tuple of 2 latents, got Tensor"),
        ("forward", X.byte(), TypeError, r"x: expected dtype float.*got uint8"),
        ("forward", X.numpy(), TypeError, r"x: expected a torch.Tensor, got ndarray"),
        ("forward", X.to("meta"), ValueError, "x: expected the model's device cpu, got meta"),
        ("initialize", X.double(), TypeError, f"x: {DTYPE} float64"),
        ("initialize", X.half(), TypeError, f"x: {DTYPE} float16"),
        ("inverse", (FINE, COARSE.double()), TypeError, rf"z\[1\]: {DTYPE} float64"),
        ("inverse", (FINE, COARSE.bfloat16()), TypeError, rf"z\[1\]: {DTYPE} bfloat16"),
    ],
)
def test_states_that_do_not_fit(call, given, error, message):
    with pytest.raises(error, match=message):
        getattr(Glow((1, 4, 4), 2, 1, 2), call)(given)


def test_autocast_takes_bfloat16_images():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Glow((1, 4, 4), 2, 1, 2)(X.bfloat16())[1].isfinite().all()


@pytest.mark.parametrize(
    ("flow", "arguments", "error", "message"),
    [
        (Glow, ((1, 28, 28), 3, 1, 4), ValueError, r"2 \*\* levels = 8, got 28x28"),
        (Glow, ((1, 8, 6), 2, 1, 4), ValueError, "image_shape: expected .* = 4, got 8x6"),
        (Glow, ((1, 0, 8), 1, 1, 4), ValueError, "H: expected at least 1, got 0"),
        (Glow, ((8, 8), 1, 1, 4), ValueError, r"image_shape: expected \(C, H, W\), got \(8, 8\)"),
        (Glow, (8, 1, 1, 4), ValueError, r"image_shape: expected \(C, H, W\), got 8"),
        (Glow, ((0, 8, 8), 1, 1, 4), ValueError, "C: expected at least 1, got 0"),
        (Glow, ((1, 8, 8), 0, 1, 4), ValueError, "levels: expected at least 1, got 0"),
        (Glow, ((1, 8, 8), 32, 1, 4), ValueError, "levels: expected at most 31, got 32"),
        (Glow, ((1, 8, 8), 1, 0, 4), ValueError, "steps: expected at least 1, got 0"),
        (Glow, ((1, 8, 8), 1, 1, 0), ValueError, "width: expected at least 1, got 0"),
        (Glow, ((1, 8, 8.0), 1, 1, 4), TypeError, "W: expected a whole number, got float"),
        (VectorFlow, (1, 1, 4), ValueError, "dim: expected at least 2, got 1"),
        (VectorFlow, (3, 0, 4), ValueError, "steps: expected at least 1, got 0"),
        (VectorFlow, (3, 1, 0), ValueError, "width: expected at least 1, got 0"),
        (VectorFlow, (3, 1.0, 4), TypeError, "steps: expected a whole number, got float"),
    ],
)
def test_bad_arguments(flow, arguments, error, message):
    with pytest.raises(error, match=message):
        flow(*arguments)


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
