import pytest
import torch
from cases import normal

from mflow_kernels import ops
from mflow_kernels.testing import assert_close


# T is 0, one column, a few, a whole block (1,024) and one more than a block.
@pytest.mark.parametrize("shape", [(3, 0), (1, 1), (2, 3), (4, 1024), (2, 1025)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_each_sample(shape, dtype, device):
    ledger = normal(*shape, dtype=dtype, device=device).requires_grad_()
    constant = normal(1, dtype=dtype, device=device)[0].requires_grad_()
    total = ops.accumulate_logdet(ledger, constant)
    terms = max(1, shape[1])
    assert total.dtype == dtype
    # Random signs cancel, so a sum of T terms is about sqrt(T) in size.
    exact = ledger.double().sum(1) + constant.double()
    assert_close(total, exact, terms=terms, scale=terms**0.5)
    g = torch.randn_like(total)
    dledger, dconstant = torch.autograd.grad(total, [ledger, constant], g)
    assert torch.equal(dledger, g[:, None].expand(shape))
    assert_close(dconstant, g.sum(), terms=shape[0])


def test_strided_ledger(device):
    ledger = normal(5, 3, device=device).t()
    constant = torch.ones((), device=device)
    assert_close(ops.accumulate_logdet(ledger, constant), ledger.double().sum(1) + 1, terms=5)
