"""Layers and runs that would cost more than the original are left, and the report says so."""

import FrEIA.modules as Fm
import nflows.transforms as nt
import pytest
import torch

from interop.test_freia import SUB, blocks, convolutional, fully_connected, sequence
from interop.test_nflows import real_nvp, splines
from interop.test_normflows import couplings
from mflow_kernels.interop import accelerate, costs
from mflow_kernels.interop.subclasses import implementation_of


def freia(*dims, count=4, net=convolutional, **options):
    torch.manual_seed(0)
    return blocks(dims, count, net, **options)


def wide(channels):
    return freia(channels, 2, 2, count=2, learned_householder_permutation=1, permute_soft=True)


LEFT = {
    "vectors": (couplings, "vectors of fewer than 512 numbers"),
    "vectors in a composite": (real_nvp, "vectors of fewer than 512 numbers"),
    "splines": (splines, ""),
    "wide vectors": (lambda: freia(512, count=2, net=fully_connected), ""),
    "rotated vectors": (
        lambda: freia(512, count=2, net=fully_connected, permute_soft=True),
        "a matrix between couplings of vectors",
    ),
    "images": (lambda: freia(4, 8, 8), ""),
    "unequal parts": (lambda: freia(5, 8, 8), "do not keep half of fewer than 63 channels"),
    "wide unequal parts": (lambda: freia(63, 4, 4), ""),
    "learned matrices": (lambda: wide(130), "a learned matrix of more than 128 channels"),
    "narrow learned matrices": (lambda: wide(128), ""),
    "linear maps": (
        lambda: nt.CompositeTransform([nt.RandomPermutation(6), nt.LULinear(6)]),
        "it has no coupling",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_costs_more_is_left(name):
    make, why = LEFT[name]
    model = make()
    report = accelerate(model)
    assert bool(report.replaced) == (not why)
    assert why in str(report)
    assert accelerate(model, even_if_slower=True).replaced


def test_no_limit_is_known_for_a_gpu():
    assert costs.why_slower((), None, "cpu")
    assert not costs.why_slower((), None, "cuda")


@pytest.mark.parametrize(("channels", "count", "size"), [(4, 3, 16), (4, 4, 2), (63, 4, 16)])
def test_states_are_rebuilt_where_that_was_asked_for(channels, count, size):
    """Few couplings, many weights for each number of the batch, and unequal parts gain little."""
    model = freia(channels, 16, 16, count=count)
    accelerate(model, reversible=True)
    ((run, _, _),) = implementation_of(model).items
    x = torch.randn(2, channels, size, size)
    model(x)[0].sum().backward()
    assert run.sequence.drift is not None


@pytest.mark.skipif(
    hasattr(Fm.ActNorm, "initialize"), reason="the development branch stores an index itself"
)
def test_a_fixed_permutation_is_an_index():
    """It multiplies no matrix, and its index follows the matrix that a checkpoint brings."""
    model, other = freia(40, 4, 4), freia(40, 4, 4, count=4)
    for block in other.module_list:
        block.w_perm.data = block.w_perm[torch.randperm(40)].detach().clone()
        block.w_perm_inv.data = block.w_perm.data.transpose(0, 1).contiguous()
    accelerate(model)
    x = torch.randn(2, 40, 4, 4)
    with torch.profiler.profile() as profile:
        model(x)[0].sum().backward()
    products = {e.name for e in profile.events() if "mm" in e.name or "matmul" in e.name}
    assert not products
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)
    # With another matrix in its place, FrEIA's own code runs.
    with torch.no_grad():
        model[0].w_perm.copy_(torch.eye(40).add(0.1).view(40, 40, 1, 1))
        other[0].w_perm.copy_(model[0].w_perm)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)


H = Fm.HouseholderPerm, {"n_reflections": 2, "fixed": False}
FIXED = Fm.HouseholderPerm, {"n_reflections": 2, "fixed": True}
COUPLING = Fm.GLOWCouplingBlock, SUB
ROTATED = {"learned_householder_permutation": 2, "permute_soft": True, **SUB}
RUNS = {
    "permutation, learned rotation": [(Fm.PermuteRandom, {"seed": 1}), H],
    "permutation, actnorm": [(Fm.PermuteRandom, {"seed": 1}), (Fm.ActNorm, {})],
    "learned rotations": [H, H],
    "couplings, learned rotations": [COUPLING, H] * 2,
    "couplings, fixed rotations": [COUPLING, FIXED] * 2,
    "learned rotations in blocks": [(Fm.AllInOneBlock, ROTATED)] * 2,
}


@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_reversible_runs_whose_state_needs_no_gradient(name, needs_dx):
    """A linear map that is not trained, or comes before all trained ones, has no gradient."""
    torch.manual_seed(0)
    model = sequence((6,), *RUNS[name])
    x = torch.randn(4, 6)
    model(x)  # sets actnorms
    gradients = []
    for accelerated in (False, True):
        if accelerated:
            assert accelerate(model, reversible=True, even_if_slower=True).replaced
        model.zero_grad()
        x = x.detach().requires_grad_(needs_dx)
        model(x, jac=False)[0].square().mean().backward()
        trained = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        gradients.append([*trained, *([x.grad] if needs_dx else [])])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
