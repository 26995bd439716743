"""The contract that every invertible layer keeps."""

from typing import Any

from torch import Tensor, nn


class Bijection(nn.Module):
    """`z, logdet = layer(x)` and `x, logdet = layer.inverse(z)`.

    Layers with a network take further inputs of it after the state: `layer(x, context)`.

    States are (N, C, *spatial). Log-determinants are per sample, (N,), natural log, float32
    (float64 for float64 states); the two are each other's negative.
    """

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        """Set what is to be set from a first batch (actnorm), and return what `forward` does."""
        return self(x, *context)
