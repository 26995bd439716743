"""Squeeze: trade resolution for channels."""

from torch import Tensor

from mflow_kernels.layers.chain_layer import ChainLayer
from mflow_kernels.ops.checks import check_state
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.reversible.program import Instruction, SpaceToDepth


class Squeeze(ChainLayer):
    """(N, C, H, W) -> (N, 4C, H/2, W/2): each 2x2 block of a channel becomes four channels.

    The log-determinant is 0. The order of the channels is that of `F.pixel_unshuffle`.
    """

    def instructions(self) -> list[Instruction]:
        return [SpaceToDepth(inverse=False)]

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return SpaceToDepth(inverse=False)(check_state("x", x)), self._zero(x)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return SpaceToDepth(inverse=True)(check_state("z", z)), self._zero(z)

    @staticmethod
    def _zero(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], dtype=accumulator(x.dtype))
