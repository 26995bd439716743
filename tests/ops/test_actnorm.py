import torch
from cases import normal

from mflow_kernels import ops


def test_by_hand(device):
    x = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]], device=device)
    bias = torch.tensor([1.0, -1.0], device=device)
    log_scale = torch.tensor([2.0, 0.5], device=device).log()
    y, logdet = ops.actnorm(x, bias, log_scale)
    expected = torch.tensor([[[4.0, 6.0, 8.0], [-1.0, -0.5, 0.0]]], device=device)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(logdet, torch.zeros(1, device=device))  # 3 (log 2 - log 2)


def test_inverse_undoes(device):
    x, bias, log_scale = normal(2, 3, 4, device=device), normal(3, device=device), normal(3)
    log_scale = log_scale.to(device)
    y, logdet = ops.actnorm(x, bias, log_scale)
    back, negative = ops.actnorm_inverse(y, bias, log_scale)
    torch.testing.assert_close(back, x)
    assert torch.equal(negative, -logdet)
