"""The interface of invertible layers."""

from typing import Any

from torch import Tensor, nn


class Bijection(nn.Module):
    """`z, logdet = layer(x)` and `x, logdet = layer.inverse(z)`.

    Layers with a network pass further arguments to it: `layer(x, context)`.

    States are (N, C, *spatial). Log-determinants are per sample, (N,), in nats, float32 (float64
    for float64 states). The logdet of `inverse` is minus that of `forward`.
    """

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        """Initialize actnorms from a first batch, and return `forward(x, *context)`."""
        return self(x, *context)
