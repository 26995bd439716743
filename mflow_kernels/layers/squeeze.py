"""Squeeze: trade resolution for channels."""

from torch import Tensor

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.ops.checks import check_state
from mflow_kernels.ops.launch import accumulator
from mflow_kernels.reversible.program import Squeezing


class Squeeze(Bijection):
    """(N, C, H, W) -> (N, 4C, H/2, W/2), each 2x2 block of a channel to four channels; logdet 0."""

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return Squeezing(inverse=False)(check_state("x", x)), self._zero(x)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return Squeezing(inverse=True)(check_state("z", z)), self._zero(z)

    @staticmethod
    def _zero(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], dtype=accumulator(x.dtype))
