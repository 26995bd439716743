import pytest
import torch
from cases import normal

from mflow_kernels import Squeeze


def test_each_block_becomes_four_channels():
    x = torch.arange(2 * 4 * 4).view(1, 2, 4, 4).float()
    z, logdet = Squeeze()(x)
    assert z.shape == (1, 8, 2, 2)
    assert torch.equal(z[0, :4, 0, 1], x[0, 0, :2, 2:].flatten())
    assert torch.equal(z[0, 4:, 1, 0], x[0, 1, 2:, :2].flatten())
    assert torch.equal(Squeeze().inverse(z)[0], x)
    assert torch.equal(logdet, torch.zeros(1))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 4, 5), (2, 3, 4), (2, 3)], ids=str)
def test_odd_or_flat_states(shape):
    with pytest.raises(
        ValueError, match=r"x: expected \(N, C, H, W\) with even H and W, got \(2, 3"
    ):
        Squeeze()(normal(*shape))


@pytest.mark.parametrize("shape", [(2, 6, 2, 2), (2, 4, 2)], ids=str)
def test_inverse_needs_channels_divisible_by_four(shape):
    with pytest.raises(ValueError, match=r"z: expected \(N, 4C, H, W\), got \(2, "):
        Squeeze().inverse(normal(*shape))
