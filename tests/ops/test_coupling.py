import math

import pytest
import torch
from cases import FLOW_OPERATORS, SCALES, normal, sample
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError

from mflow_kernels import ops
from mflow_kernels.ops.coupling import affine_coupling_op, launch_coupling
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close

DIRECTIONS = [FLOW_OPERATORS["affine_coupling"], FLOW_OPERATORS["affine_coupling_inverse"]]
both = pytest.mark.parametrize("op", DIRECTIONS, ids=lambda op: op.id)


def test_by_hand(device):
    """s = e^0.5 on the second channel. The first passes through; the default shifts first."""

    def row(*values):
        return torch.tensor([values], dtype=torch.float64, device=device)

    e = math.exp(0.5)
    y, logdet = ops.affine_coupling(row(3.0, 1.0), row(0.5, 2.0), "exp")
    assert_close(y, row(3.0, e * 3.0))
    assert_close(logdet, row(0.5)[0])
    later = ScaleFunction("exp", order="scale-shift")
    y, _ = ops.affine_coupling(row(3.0, 1.0), row(0.5, 2.0), later)
    assert_close(y, row(3.0, e + 2.0))


@both
@pytest.mark.parametrize("raw", [-1e4, -120.0, 120.0, 1e4])
@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{s.kind} {s.order}")
def test_extreme_params(op, scale, raw, device):
    """logdet is exact even if s under- or overflows. Gradients are exact if s is in range."""
    inputs = sample(op, (2, 3, 2, 2), device=device)
    with torch.no_grad():
        inputs["params"][:, :2] = raw
    y, logdet = op.call(*inputs.values(), scale=scale)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    expected = op.expected(*exact.values(), scale=scale)
    # s near 1 rounds by eps even if its logarithm is near 0, so the scale of errors is 1.
    assert_close(logdet, expected[1], terms=8, scale=1.0)
    log_s = (expected[1] / 8).max().item()
    if log_s < 88:  # e^88 is the largest float32
        assert_close(y, expected[0], terms=2)
        grads = torch.autograd.grad((y.sum(), logdet.sum()), list(inputs.values()))
        wants = torch.autograd.grad((expected[0].sum(), expected[1].sum()), list(exact.values()))
        for name, got, want in zip(inputs, grads, wants, strict=True):
            assert_close(got, want, terms=2, name=f"d {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["tanh", "double-sigmoid"])
def test_scales_do_not_cancel_near_zero(kind, dtype, device):
    """Networks start near 0, where (1 - e^-2r) / (1 + e^-2r) and 2 / (1 + e^-r) lose all digits."""
    raw = torch.tensor([1e-12, 1e-7, -1e-5, 1e-3, -0.1, 0.49, 0.5, 0.51, -3.0, 0.0], dtype=dtype)
    params = torch.stack([raw, torch.zeros_like(raw)], dim=1).to(device)
    x = torch.ones(len(raw), 2, dtype=dtype, device=device)
    _, logdet = ops.affine_coupling(x, params, ScaleFunction(kind))
    r = raw.double()
    want = {"tanh": r.tanh(), "double-sigmoid": (r / 2).tanh().log1p()}[kind]
    torch.testing.assert_close(logdet.cpu().double(), want, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_the_gradient_of_a_ledger_entry_reaches_its_tile_alone(kernel_device):
    """An operator's public logdet gives all tiles of a sample the same gradient."""
    x, params = normal(2, 2, 1100, device=kernel_device), normal(2, 2, 1100, device=kernel_device)
    _, ledger = affine_coupling_op.eager(
        x, params.requires_grad_(), *ScaleFunction("exp").args, False
    )
    entries = ledger.sum(0).unbind()
    assert len(entries) > 1
    reached = [torch.autograd.grad(t, params, retain_graph=True)[0][:, 0] for t in entries]
    assert all(part.any() for part in reached)
    assert torch.equal(sum(reached), torch.ones_like(x[:, 0]))  # d log s / d raw of exp is 1


@pytest.mark.parametrize(
    ("field", "message"), [("kind", "log_scale: unknown scale function"), ("order", "'other'")]
)
def test_kernels_know_no_other_scale_function(field, message, kernel_device):
    scale = ScaleFunction("exp")
    object.__setattr__(scale, field, "other")
    x = torch.ones(2, 4, device=kernel_device)
    with pytest.raises((CompilationError, InterpreterError)) as raised:
        launch_coupling(x, x, scale, False)
    first: BaseException = raised.value  # Triton chains an error for each function that it was in
    while error := first.__cause__ or first.__context__:
        first = error
    assert str(first).endswith(message)
