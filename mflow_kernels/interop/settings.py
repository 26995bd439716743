"""What layers that are set from their first batch share."""

from torch import Tensor


def per_channel(x: Tensor) -> Tensor:
    """(N, C, *spatial) as (C, N * P)."""
    return x.transpose(0, 1).flatten(1)


def standard_deviation(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """The deviation of each channel, and which channels are constant up to their own rounding."""
    samples = per_channel(x)
    std = samples.std(1, correction=correction)
    return std, ~(std > 1e-6 * (1 + samples.mean(1).abs()))
