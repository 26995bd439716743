from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FLOW_OPERATORS, assert_matches, launched, normal, on_tensor_cores, sample
from torch.torch_version import TorchVersion

from benchmarks.harness.inputs import rotation
from mflow_kernels import ops
from mflow_kernels.ops import channel_products
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.conv1x1 import conv1x1_eager, invert, spread
from mflow_kernels.ops.partial_sums import unbind_weights
from mflow_kernels.testing import assert_close

CONV, INVERSE = FLOW_OPERATORS["conv1x1"], FLOW_OPERATORS["conv1x1_inverse"]


@triton.jit
def _places_kernel(places, C: tl.constexpr, BLOCK_O: tl.constexpr):
    tile, block = channel_products.tile_and_block(C, BLOCK_O)
    tl.store(places + 2 * tl.program_id(0), tile)
    tl.store(places + 2 * tl.program_id(0) + 1, block)


def test_blocks_of_one_tile_run_next_to_each_other(kernel_device):
    """Above C = 128 each block of output channels reads the tile's state. Neighbouring programs run
    at about the same time, so the second finds it in the L2 cache."""
    places = torch.empty(3 * 2, 2, dtype=torch.int32, device=kernel_device)
    _places_kernel[(6,)](places, C=200, BLOCK_O=channel_products.conv1x1_tile(200).block_o)
    assert places.tolist() == [[tile, block] for tile in range(3) for block in range(2)]


@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d[0] == d[1]], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (2, 7, 3, 4)], ids=str)
def test_inverse(shape, dtypes, device):
    assert_matches(INVERSE, sample(INVERSE, shape, dtypes, device))


def test_without_bias_and_with_a_transposed_weight(device):
    x = normal(2, 6, 3, 4, device=device).requires_grad_()
    weight = rotation(6).to(device).t().requires_grad_()
    y = ops.conv1x1(x, weight)
    exact = F.conv2d(x.double(), weight.double()[:, :, None, None])
    assert_close(y, exact, terms=6)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, weight], g)
    want = torch.autograd.grad(exact, [x, weight], g.double())
    assert_close(got[0], want[0], terms=6)
    assert_close(got[1], want[1], terms=2 * 12)


def test_gradients_of_a_group_of_weights(device):
    """The weights of several steps share memory for their gradients. A weight may be used twice or
    never, and a second backward pass must not change the gradients of the first."""
    x = normal(2, 6, 3, 4, device=device)
    weights = torch.stack([rotation(6) for _ in range(3)]).to(device).requires_grad_()
    weight, bias = spread(weights, normal(3, 6, device=device), x)
    rows = list(zip(unbind_weights(weight), bias.unbind(), strict=True))
    used = [rows[i] for i in (0, 2, 0)]
    y = sum(conv1x1_eager(x, *row, "tf32x3", None)[0] for row in used)
    exact = weights.detach().double().requires_grad_()
    expected = sum(torch.einsum("oc,nchw->nohw", exact[i], x.double()) for i in (0, 2, 0))
    found = []
    for _ in range(2):
        dy = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, weights, dy, retain_graph=True)
        want = torch.autograd.grad(expected, exact, dy.double(), retain_graph=True)
        found.append((got, *want))
    for got, want in found:
        assert_close(got, want, terms=2 * 2 * 12)


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


def test_no_product_is_a_batch_of_one_before_triton_3_9():
    """It would spill up to 8 KB a thread."""
    tile = channel_products.weight_gradient_tile(48, torch.float32)
    assert (tile.groups is None) == (TorchVersion(triton.__version__) < "3.9")


@pytest.mark.parametrize(("precision", "stages"), [("tf32", 1), ("tf32x3", 2)])
def test_dweight_is_not_pipelined_where_its_product_is_asynchronous(monkeypatch, precision, stages):
    """A second stage overwrites dy while the product of sm_90 reads it (PTX shows the race)."""
    seen = launched(channel_products, monkeypatch)
    x = torch.ones(2, 96, 4, 4)
    channel_products.launch_weight_gradient(x, None, x, x.new_empty(1, 96, 96), precision)
    assert seen["_weight_gradient_kernel"]["num_stages"] == stages
