import math

import pytest
import torch

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
