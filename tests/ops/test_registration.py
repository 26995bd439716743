"""Forward-mode differentiation: kernels do not support it, so the references carry the tangents."""

import pytest
import torch
from cases import DIFFERENTIABLE, learned, normal, options, perturbed, sample
from torch.autograd import forward_ad

from mflow_kernels import Glow
from mflow_kernels.testing import assert_close


def tangents(call, inputs, directions):
    """Tangents of all results; None for a result without one."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, directions, strict=True)]
        return [forward_ad.unpack_dual(y).tangent for y in call(*duals)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operators_carry_tangents(name, device):
    op = DIFFERENTIABLE[name]
    inputs = sample(op, (2, 6, 3, 5), (torch.float64, torch.float64), device)
    given = [value.detach() for value in learned(inputs)]
    fixed = list(inputs.values())[len(given) :]
    directions = [torch.randn_like(value) for value in given]
    got = tangents(lambda *args: op.call(*args, *fixed, **options(op)), given, directions)
    want = tangents(lambda *args: op.expected(*args, *fixed, **options(op)), given, directions)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, terms=1000)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_flows_carry_tangents(reversible, grad, device):
    """Tangents agree with gradients: w . (J v) = (J^T w) . v."""
    flow = perturbed(Glow((2, 4, 4), 2, 1, 4, reversible=reversible).double().to(device))
    x = normal(3, 2, 4, 4, dtype=torch.float64, device=device).requires_grad_()
    v = torch.randn_like(x)

    def outputs(x):
        z, logdet = flow(x)
        back, _ = flow.inverse(tuple(2 * part for part in z))
        return *z, logdet, back

    weights = [torch.randn_like(y) for y in outputs(x)]
    (pulled,) = torch.autograd.grad(outputs(x), x, weights)
    with torch.set_grad_enabled(grad):
        pushed = tangents(outputs, [x], [v])
        _, functorch = torch.func.jvp(outputs, (x,), (v,))
    assert all(t.requires_grad == grad for t in pushed)
    for tangent, other, weight in zip(pushed, functorch, weights, strict=True):
        assert_close(other, tangent, terms=1000)
        assert tangent.shape == weight.shape
    total = sum((t * w).sum() for t, w in zip(pushed, weights, strict=True))
    assert_close(total, (pulled * v).sum(), terms=10_000, scale=(pulled * v).abs().sum().item())
