import pytest
import torch
from cases import FLOW_OPERATORS, normal

from benchmarks.harness.inputs import params_shape, rotation

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
