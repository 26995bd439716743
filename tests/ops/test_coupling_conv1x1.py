import importlib

import pytest
import torch
from cases import FLOW_OPERATORS, growth, launched, normal

from benchmarks.harness.inputs import params_shape, rotation
from mflow_kernels import ops
from mflow_kernels.ops import ScaleFunction, channel_products
from mflow_kernels.testing import assert_close

fused = importlib.import_module("mflow_kernels.ops.coupling_conv1x1")
DIRECTIONS = [FLOW_OPERATORS["coupling_conv1x1"], FLOW_OPERATORS["coupling_inverse_conv1x1"]]
both = pytest.mark.parametrize("op", DIRECTIONS, ids=lambda op: op.id)


@both
def test_without_bias(op, device):
    shape = (2, 5, 3, 4)
    x, params = normal(*shape, device=device), normal(*params_shape(shape), device=device)
    weight = rotation(5).to(device)
    zero = torch.zeros(5, device=device)
    bare, logdet = op.call(x, params, weight)
    biased, _ = op.call(x, params, weight, zero)
    assert torch.equal(bare, biased)
    assert logdet.shape == (2,)


def test_inverse_walks_a_chain_back(device):
    """coupling^-1 then W^-1 undoes W then coupling."""
    shape = (2, 6, 5, 3)
    x, params = normal(*shape, device=device), normal(*params_shape(shape), device=device)
    weight, bias = rotation(6).to(device), normal(6, device=device)
    z, logdet = ops.affine_coupling(ops.conv1x1(x, weight, bias), params)
    inverse = torch.linalg.inv(weight.double())
    back, negative = ops.coupling_inverse_conv1x1(
        z, params, inverse.float(), -(inverse @ bias.double()).float()
    )
    # The inverse multiplies the rounding of z by 1 / s.
    size = growth(params, ScaleFunction()) * z.abs().max().item()
    assert_close(back, x, terms=6, scale=size)
    assert_close(negative, -logdet, terms=45)


@pytest.mark.parametrize(("precision", "stages"), [("tf32", 1), ("tf32x3", 3)])
def test_unfenced_copies_are_not_pipelined(monkeypatch, precision, stages):
    """Before Triton 3.7.1 a tf32 product may read an asynchronous copy before it has arrived."""
    monkeypatch.setattr(channel_products, "FENCES_COPIES", False)
    seen = launched(channel_products, monkeypatch)
    # 128 channels take four turns of the loop, so that a pipeline has all its stages.
    x, weight, scale = torch.ones(2, 128, 2, 2), torch.ones(1, 128, 128), ScaleFunction("tanh")
    channel_products.launch_conv1x1(x, weight[0], None, precision)
    fused.launch_coupling_conv1x1_backward(
        x, None, x[:, :1, 0, 0], x, x, weight, precision, scale, False
    )
    for kernel in ("_conv1x1_kernel", "_coupling_conv1x1_bwd_kernel"):
        assert seen[kernel]["num_stages"] == stages
