import math

import pytest
import torch
from cases import normal

from mflow_kernels import bits_per_dimension


def test_bits_per_dimension():
    """A uniform density on [0, 1)^D has n_bits bits per dimension."""
    assert bits_per_dimension(torch.zeros(2), 12, 5).tolist() == [5, 5]
    # A density of 2^D on half of the range has one bit per dimension less.
    likelihood = torch.full((1,), 12 * math.log(2), dtype=torch.float64)
    assert bits_per_dimension(likelihood, 12, 8).item() == pytest.approx(7)
    for arguments, message in (((0, 8), "dimensions: .* 1, got 0"), ((12, 0), "n_bits: .* 1, got")):
        with pytest.raises(ValueError, match=message):
            bits_per_dimension(likelihood, *arguments)


def test_bits_per_dimension_bound_the_entropy_of_levels():
    """Under the density that drew them, 5-bit values cost slightly more than their entropy."""
    y = (0.1 * normal(1_000_000, dtype=torch.float64)).clamp(-0.499, 0.499)
    level = ((y + 0.5) * 32).floor()
    x = (level + torch.rand_like(y)) / 32 - 0.5
    share = level.long().bincount() / len(y)
    entropy = -torch.special.xlogy(share, share).sum().item() / math.log(2)
    log_p = -(x / 0.1).square() / 2 - math.log(0.1) - math.log(2 * math.pi) / 2
    bits = bits_per_dimension(log_p, 1, 5).mean().item()
    # To first order, levels of width h add (h / sigma)^2 / 24 nats, or 0.0059 bits. Both sides use
    # the same draws.
    assert 0 < bits - entropy < 2 * (1 / 3.2) ** 2 / 24 / math.log(2)
