import copy

import pytest
import torch
from cases import normal

from mflow_kernels import ActNorm


@pytest.mark.parametrize("shape", [(64, 3), (4, 3, 5, 6), (16, 3, 7)], ids=str)
def test_output_on_the_first_batch_is_standardized(shape, device):
    layer = ActNorm(3).to(device)
    scale = torch.tensor([0.1, 1.0, 30.0], device=device).view(1, 3, *(1,) * (len(shape) - 2))
    x = 5 + scale * normal(*shape, device=device)
    y, logdet = layer.initialize(x)
    samples = y.transpose(0, 1).flatten(1)
    torch.testing.assert_close(samples.mean(1), torch.zeros(3, device=device), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        samples.std(1, correction=0), torch.ones(3, device=device), atol=1e-4, rtol=0
    )
    pixels = x[0, 0].numel()
    torch.testing.assert_close(logdet, (pixels * layer.log_scale.sum()).expand(shape[0]))


def test_initializes_once_also_after_loading():
    layer = ActNorm(2)
    layer.initialize(normal(8, 2, 3))
    loaded, state = ActNorm(2), copy.deepcopy(layer.state_dict())
    loaded.load_state_dict(state)
    for one in (layer, loaded, copy.deepcopy(layer)):
        one.initialize(7 + 3 * normal(8, 2, 3))
        torch.testing.assert_close(one.state_dict(), state, rtol=0, atol=0)


def test_constant_channel_keeps_its_scale():
    x = normal(8, 3, 4)
    x[:, 1] = 0.3
    layer = ActNorm(3)
    y, _ = layer.initialize(x)
    assert layer.log_scale[1] == 0
    assert y.isfinite().all()
    assert y[:, 1].abs().max() < 1e-6
    assert (layer.log_scale[::2] != 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batch_that_is_not_finite(bad):
    layer = ActNorm(2)
    x = normal(4, 2, 3)
    x[0, 0, 0] = bad
    with pytest.raises(ValueError, match="x: expected finite values to initialize actnorm from"):
        layer.initialize(x)
    assert not layer.initialized
    layer.initialize(normal(4, 2, 3))
    assert layer.initialized
