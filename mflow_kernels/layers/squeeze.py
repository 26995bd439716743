"""Squeeze: trade resolution for channels."""

from torch import Tensor

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.moves import Squeezing
from mflow_kernels.ops._launch import accumulator


class Squeeze(Bijection):
    """(N, C, H, W) -> (N, 4C, H/2, W/2), each 2x2 block of a channel to four channels; logdet 0."""

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x: expected (N, C, H, W) with even H and W, got {tuple(x.shape)}")
        return Squeezing(inverse=False)(x), self._zero(x)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"z: expected (N, 4C, H, W), got {tuple(z.shape)}")
        return Squeezing(inverse=True)(z), self._zero(z)

    @staticmethod
    def _zero(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], dtype=accumulator(x.dtype))
