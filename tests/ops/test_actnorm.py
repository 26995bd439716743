import torch

from mflow_kernels import ops


def test_by_hand(device):
    x = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]], device=device)
    bias = torch.tensor([1.0, -1.0], device=device)
    log_scale = torch.tensor([2.0, 0.25], device=device).log()
    y, logdet = ops.actnorm(x, bias, log_scale)
    expected = torch.tensor([[[4.0, 6.0, 8.0], [-0.5, -0.25, 0.0]]], device=device)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(logdet.exp(), torch.tensor([(2 / 4) ** 3], device=device))
    back, negative = ops.actnorm_inverse(y, bias, log_scale)
    torch.testing.assert_close(back, x)
    assert torch.equal(negative, -logdet)
