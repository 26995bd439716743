from pathlib import Path

import pytest
import torch
from cases import DTYPES, FLOW_OPERATORS, assert_matches, normal, on_tensor_cores, sample

from benchmarks.harness.inputs import rotation
from mflow_kernels import ops
from mflow_kernels.ops.conv1x1 import conv1x1_op, invert, spread
from mflow_kernels.ops.partial_sums import unbind_weights
from mflow_kernels.testing import assert_close

CONV, INVERSE = FLOW_OPERATORS["conv1x1"], FLOW_OPERATORS["conv1x1_inverse"]


@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d[0] == d[1]], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (2, 7, 3, 4)], ids=str)
def test_inverse(shape, dtypes, device):
    assert_matches(INVERSE, sample(INVERSE, shape, dtypes, device))


def test_gradients_of_a_group_of_weights(device):
    """The weights of several steps share memory for their gradients. A weight may be used twice or
    never, and a second backward pass must not change the gradients of the first."""
    x = normal(2, 6, 3, 4, device=device)
    weights = torch.stack([rotation(6) for _ in range(3)]).to(device).requires_grad_()
    weight, bias = spread(weights, normal(3, 6, device=device), x)
    rows = list(zip(unbind_weights(weight), bias.unbind(), strict=True))
    used = {1.0: 0, 2.0: 2, 3.0: 0}  # the row that each factor multiplies
    y = sum(k * conv1x1_op.eager(x, *rows[i], "tf32x3", None)[0] for k, i in used.items())
    exact = weights.detach().double().requires_grad_()
    expected = sum(k * torch.einsum("oc,nchw->nohw", exact[i], x.double()) for k, i in used.items())
    found = []
    for _ in range(2):
        dy = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, weights, dy, retain_graph=True)
        want = torch.autograd.grad(expected, exact, dy.double(), retain_graph=True)
        found.append((got, *want))
    for got, want in found:
        assert_close(got, want, terms=2 * 2 * 12, scale=4 * want.abs().max().item())


def test_inverse_undoes_an_ill_conditioned_weight(device):
    """With W^-1 from float64, a round trip is off by one rounding of y times the norm of W^-1."""
    weight = rotation(8, torch.float64)
    weight = (weight @ torch.diag(torch.logspace(0, -4, 8, dtype=torch.float64))).float()
    norm = torch.linalg.matrix_norm(torch.linalg.inv(weight.double()), 2).item()
    x, weight = normal(4, 8, 5, device=device), weight.to(device)
    y = ops.conv1x1(x, weight)
    size = norm * y.abs().max().item()
    assert_close(ops.conv1x1_inverse(y, weight), x.double(), terms=8, scale=size)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3, 3),
        torch.zeros(3, 3),
        torch.full((3, 3), float("nan")),
        torch.diag(torch.tensor([1.0, float("inf"), 1.0])),
    ],
    ids=["rank one", "zero", "nan", "infinite"],
)
def test_a_weight_without_an_inverse(weight, device):
    x = normal(2, 3, 4, device=device)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"weight: expected an invertible matrix, got"),
    ):
        ops.conv1x1_inverse(x, weight.to(device))
    # If gradients are recorded, a check would make training wait for the device.
    weight = weight.to(device).requires_grad_()
    assert ops.conv1x1_inverse(x, weight).isnan().all()


def test_no_inverse_makes_training_wait(monkeypatch):
    """By default, torch 2.9 inverts a batch of 32 matrices by MAGMA, which waits for the device."""
    library, used = ["default"], []

    def prefer(name=None):
        library.append(name or library[-1])
        return library[-1]

    def inv_ex(weight):
        used.append(library[-1])
        return weight, weight

    class OnCard(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.backends.cuda, "preferred_linalg_library", prefer)
    monkeypatch.setattr(torch.linalg, "inv_ex", inv_ex)
    invert(torch.eye(2).as_subclass(OnCard))
    assert used == ["cusolver"]
    assert library[-1] == "default"
    invert(torch.eye(2))
    assert used == ["cusolver", "default"]
    package = Path(ops.__file__).parents[1]
    inverting = [p.name for p in package.rglob("*.py") if "linalg.inv_ex" in p.read_text()]
    assert inverting == ["conv1x1.py"]


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
def test_precision(precision, channels, device):
    """tf32 rounds factors to 10 bits on tensor cores, and is exact elsewhere."""
    x = normal(2, channels, 7, 13, device=device).requires_grad_()
    weight = rotation(channels).to(device).requires_grad_()
    y = ops.conv1x1(x, weight, precision=precision)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.einsum("oc,nchw->nohw", exact[1], exact[0])
    dy = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, [x, weight], dy)]
    want = [expected, *torch.autograd.grad(expected, exact, dy.double())]
    for a, b, terms in zip(got, want, [channels, channels, 2 * 91 * channels], strict=True):
        if precision == "tf32" and on_tensor_cores(device):
            assert (a - b).abs().max() < 2**-10 * b.abs().max() * 4
        else:
            assert_close(a, b, terms=terms)
