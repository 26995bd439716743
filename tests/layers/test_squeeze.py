import pytest
import torch
import torch.nn.functional as F

from mflow_kernels import Squeeze
from mflow_kernels.ops.layouts import is_channels_last
from mflow_kernels.reversible.rearrangements import SpaceToDepth


def test_each_block_becomes_four_channels():
    x = torch.arange(2 * 4 * 4).view(1, 2, 4, 4).float()
    z, logdet = Squeeze()(x)
    assert z.shape == (1, 8, 2, 2)
    assert torch.equal(z[0, :4, 0, 1], x[0, 0, :2, 2:].flatten())
    assert torch.equal(z[0, 4:, 1, 0], x[0, 1, 2:, :2].flatten())
    assert torch.equal(Squeeze().inverse(z)[0], x)
    assert torch.equal(logdet, torch.zeros(1))


@pytest.mark.parametrize("shape", [(2, 4, 6, 4), (2, 4, 2, 2), (1, 1, 4, 6)], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_the_copy_and_the_kernel_of_torch_agree(monkeypatch, shape, inverse):
    """Torch's kernel keeps channels_last on a CPU. On a GPU it does not, and a copy follows."""
    n, c, h, w = shape
    x = torch.randn((n, 4 * c, h, w) if inverse else shape).to(memory_format=torch.channels_last)

    def run():
        given = x.detach().requires_grad_()
        z = SpaceToDepth(inverse).apply(given)
        return z, *torch.autograd.grad(z.square().sum(), given)

    by_kernel = run()
    name = "pixel_shuffle" if inverse else "pixel_unshuffle"
    kernel = getattr(F, name)
    monkeypatch.setattr(F, name, lambda x, factor: kernel(x, factor).contiguous())
    by_copy = run()
    assert is_channels_last(by_kernel[0])
    for a, b in zip(by_kernel, by_copy, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
