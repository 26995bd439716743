"""The launch of kernels that compute each element of a state by itself."""

from typing import Any

from torch import Tensor

from mflow_kernels.ops.launch import launch
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.ops.precision import TL_DTYPE, accumulator
from mflow_kernels.ops.tiles import elementwise_tile, tile_columns


def launch_elementwise(
    kernel: Any, x: Tensor, *tensors: Any, tile: tuple[int, int] | None = None, **constants: Any
) -> None:
    """Launch one program for each tile of columns of a state like x.

    The kernel takes `tensors`, N, P, `constants`, DTYPE, BLOCK_C and COLUMNS, and loops over blocks
    of channels. Without `tile`, tiles are those of `elementwise_tile`.
    """
    n, p = x.shape[0], pixels(x)
    block_c, block_p = tile or elementwise_tile(x)
    tiles = tile_columns(n, p, block_p)
    if n:
        launch(
            kernel,
            (tiles.programs,),
            *(*tensors, n, p),
            **constants,
            DTYPE=TL_DTYPE[accumulator(x.dtype)],
            BLOCK_C=block_c,
            COLUMNS=tiles.columns,
        )
