"""The table of operators at the states of Glow's levels, as benchmarks run and check it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.table import OPERATORS, Draw, Operator
from benchmarks.reports.cases import backward_of
from mflow_kernels.testing import assert_close

Function = Callable[..., tuple[Tensor, ...]]


class Shape(NamedTuple):
    """The shape of the states in one level of Glow."""

    pixels: int  # side of the image
    level: int
    n: int
    channels_last: bool

    @property
    def c(self) -> int:
        return 12 * 2 ** (self.level - 1)

    @property
    def side(self) -> int:
        return self.pixels // 2**self.level

    @property
    def p(self) -> int:
        return self.side**2

    @property
    def id(self) -> str:
        return f"{self.pixels}px-level{self.level}" + ("" if self.channels_last else "-nchw")

    def __str__(self) -> str:
        layout = "" if self.channels_last else " contiguous"
        size = f"{self.n}x{self.c}x{self.side}x{self.side}"
        return f"{self.pixels}px level {self.level}: {size}{layout}"


@dataclass(frozen=True)
class Operation:
    """An operator in one direction: forward, inverse or backward.

    Attributes:
        function: maps the inputs to a tuple of tensors.
        inputs: by name, on the device.
        differentiated: whether to measure the backward pass of `function`.
    """

    operator: Operator
    direction: str
    shape: Shape
    function: Function
    inputs: dict[str, Tensor]
    differentiated: bool

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def fewest(self) -> int:
        """The fewest bytes that it can read and write."""
        return self.operator.fewest_bytes(self.inputs, self.differentiated)

    @property
    def results(self) -> list[str]:
        """Names of the tensors that it computes."""
        if self.differentiated:
            return [name for name, t in self.inputs.items() if t.requires_grad]
        return list(self.operator.results)

    def prepare(
        self, function: Function, inputs: dict[str, Tensor] | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """Return the call to time: the function without autograd, or its backward pass.

        The forward pass of a backward pass runs here. `inputs` replaces the operation's own.
        """
        inputs = self.inputs if inputs is None else inputs
        run = partial(function, *inputs.values())
        if not self.differentiated:
            return torch.no_grad()(run)
        return backward_of(run, [t for t in inputs.values() if t.requires_grad])

    def exact(self) -> tuple[Tensor, ...]:
        """Return the results of the reference in float64."""
        wide = {name: _widened(t) for name, t in self.inputs.items()}
        return self.prepare(self.operator.expected, wide)()

    def check(self, function: Function, exact: Sequence[Tensor]) -> None:
        """Assert that the function's results equal `exact` up to the rounding of their dtype."""
        terms = self.operator.terms(self.shape.n, self.shape.c, self.shape.p)
        results = self.prepare(function)()
        for name, result, expected in zip(self.results, results, exact, strict=True):
            # The terms are of order one, and their sum may cancel to less.
            label = f"{self.name}, {name}"
            assert_close(result, expected, terms=terms[name], scale=1.0, name=label)


def _widened(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def directions(operator: Operator) -> tuple[str, ...]:
    if not operator.differentiable:
        return ("backward",)
    return ("inverse",) if operator.inverse else ("forward", "backward")


def operations(shape: Shape, device: torch.device) -> Iterator[Operation]:
    """Yield all operations, on inputs drawn from a fixed seed."""
    for operator in OPERATORS:
        inputs = operator.draw(draw(operator, shape, device))
        for direction in directions(operator):
            differentiated = operator.differentiable and direction == "backward"
            yield Operation(operator, direction, shape, operator.call, inputs, differentiated)


def draw(operator: Operator, shape: Shape, device: torch.device) -> Draw:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format
    return Draw(
        (shape.n, shape.c, shape.side, shape.side),
        (operator.dtype, operator.dtype),
        device,
        lambda x: x.contiguous(memory_format=layout),
        lambda size: torch.randn(size, generator=generator, dtype=torch.float64),
        width=512 if device.type == "cuda" else 32,
    )
