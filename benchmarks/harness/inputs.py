"""Random inputs of the operators in `table.py`, for a state of one shape."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.spline import Spline, SplineOptions

Numbers = Callable[[tuple[int, ...]], Tensor]
# The least bin is a twentieth of the interval, so rounding moves x by few eps of its bin.
SPLINE_OPTIONS: SplineOptions = {"min_width": 0.05, "min_height": 0.05, "min_slope": 0.1}
SPLINE = Spline(8, 3.0, **SPLINE_OPTIONS)


def normal_numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rotation(
    channels: int, dtype: torch.dtype = torch.float32, numbers: Numbers = normal_numbers
) -> Tensor:
    """A (C, C) matrix near a rotation, whose inverse is accurate in float32."""
    q = torch.linalg.qr(numbers((channels, channels)))[0]
    return (q + 0.1 * numbers((channels, channels)) / channels).to(dtype)


def params_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a coupling's params for a state of `shape`."""
    n, c, *spatial = shape
    return (n, 2 * (c - c // 2), *spatial)


def numbers_shape(shape: tuple[int, ...], identity: int) -> tuple[int, ...]:
    """The shape of the raw numbers of splines for a state of `shape`."""
    n, c, *spatial = shape
    return (n, (c - identity) * SPLINE.numbers, *spatial)


@dataclass(frozen=True)
class Draw:
    """Draws the inputs of operators for a state x of one shape.

    Attributes:
        shape: of x, (N, C, *spatial).
        dtypes: of states, and of params, weights and biases.
        device: of all inputs.
        layout: converts a state to its memory layout.
        numbers: draws float64 numbers of a given shape; all inputs are made from them.
        width: hidden channels of the coupling network.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    device: torch.device | str = "cpu"
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous
    numbers: Numbers = field(default=normal_numbers)
    width: int = 32

    @property
    def c(self) -> int:
        return self.shape[1]

    def state(self, channels: int, dtype: torch.dtype) -> Tensor:
        n, _, *spatial = self.shape
        return self.layout(self.numbers((n, channels, *spatial)).to(self.device, dtype))

    def other(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * self.numbers(shape)).to(self.device, self.dtypes[1])

    def weight(self, rows: int, columns: int, side: int) -> Tensor:
        """The weight of a layer of a coupling network, whose results are of order one."""
        kernel = (side, side) if len(self.shape) == 4 else ()
        return self.other(rows, columns, *kernel, scale=(columns * math.prod(kernel)) ** -0.5)


# How to draw each input. `Operator.draw` makes them require gradients.
INPUTS: dict[str, Callable[[Draw], Tensor]] = {
    "x": lambda draw: draw.state(draw.c, draw.dtypes[0]),
    "dx": lambda draw: draw.state(draw.c, draw.dtypes[0]),
    "params": lambda draw: draw.state(params_shape(draw.shape)[1], draw.dtypes[1]),
    "numbers": lambda draw: draw.state(numbers_shape(draw.shape, 0)[1], draw.dtypes[1]),
    "numbers_b": lambda draw: draw.state(numbers_shape(draw.shape, draw.c // 2)[1], draw.dtypes[1]),
    "weight": lambda draw: rotation(draw.c, draw.dtypes[1], draw.numbers).to(draw.device),
    "bias": lambda draw: draw.other(draw.c),
    "log_scale": lambda draw: draw.other(draw.c, scale=0.5),
    # A coupling changes the second half, z_b.
    "z_b": lambda draw: draw.state(draw.c - draw.c // 2, draw.dtypes[0]),
    "dz_b": lambda draw: draw.state(draw.c - draw.c // 2, draw.dtypes[0]),
    "dlogdet": lambda draw: _wide(draw, draw.shape[0]),
    "ledger": lambda draw: _wide(draw, draw.shape[0], max(1, math.prod(draw.shape[2:]) // 64)),
    "constant": lambda draw: _wide(draw),
    "target": lambda draw: draw.state(draw.c, draw.dtypes[0]),
    "mask": lambda draw: draw.numbers(draw.shape[2:]).to(draw.device) < 0,
    # The coupling network reads the first half of x.
    "x_a": lambda draw: draw.state(max(1, draw.c // 2), draw.dtypes[0]),
    "w1": lambda draw: draw.weight(draw.width, max(1, draw.c // 2), 3),
    "b1": lambda draw: draw.other(draw.width),
    "w2": lambda draw: draw.weight(draw.width, draw.width, 1),
    "b2": lambda draw: draw.other(draw.width),
    "w3": lambda draw: draw.weight(params_shape(draw.shape)[1], draw.width, 3),
    "b3": lambda draw: draw.other(params_shape(draw.shape)[1]),
}


def _wide(draw: Draw, *shape: int) -> Tensor:
    return draw.numbers(shape).to(draw.device, accumulator(draw.dtypes[0]))
