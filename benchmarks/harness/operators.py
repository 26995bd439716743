"""The table of operators at the states of Glow's levels, as benchmarks run and check it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.inputs import Draw
from benchmarks.harness.table import OPERATORS, Operator
from benchmarks.reports.cases import backward_of
from mflow_kernels.ops.coupling_network import layer, layer_backward
from mflow_kernels.testing import assert_close, tolerance

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
        slack: dict[str, Tensor] = {}
        if self.name == "coupling_network" and self.differentiated:
            slack = relu_slack(self.inputs)
        for name, result, expected in zip(self.results, results, exact, strict=True):
            # The terms are of order one, and their sum may cancel to less.
            label, flips = f"{self.name}, {name}", slack.get(name)
            assert_close(result, expected, terms=terms[name], scale=1.0, slack=flips, name=label)


def relu_slack(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return by how much ReLUs may change each gradient of a coupling network, by input.

    A hidden unit within rounding of zero may be positive in one computation and negative in
    another, and then passes its whole gradient or nothing. No bound on the rounding of sums covers
    that. Here, each unit within `tolerance` of zero counts as undecided. The slack is the root of
    the sum of the squares of what undecided units pass on. Rounding errors are a small part of
    `tolerance`, so that few undecided units differ, of either sign. k units that differ change a
    gradient by at most sqrt(k) times that root. w3 and b3 get no gradient through a ReLU.

    The gradient of params is 0.5, as in `backward_of`.
    """
    dtype = inputs["x_a"].dtype
    x, w1, b1, w2, b2, w3, b3 = (t.detach().double() for t in inputs.values())

    def undecided(z: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        size = layer(x.square(), w.square(), b.square()).sqrt()
        return (z.abs() <= tolerance(dtype, w[0].numel()) * size).double()

    z1 = layer(x, w1, b1)
    h1 = z1.relu()
    z2 = layer(h1, w2, b2)
    params = layer(z2.relu(), w3, b3)
    dh2 = layer_backward(torch.full_like(params, 0.5), z2, w3, False)[0]
    dh1 = layer_backward(dh2 * (z2 > 0), h1, w2, False)[0]
    # The squares pass through the layers with squared weights.
    squares = undecided(z2, h1, w2, b2) * dh2.square()
    squares, in_w2, in_b2 = layer_backward(squares, h1.square(), w2.square(), True)
    squares = undecided(z1, x, w1, b1) * dh1.square() + (z1 > 0) * squares
    in_x, in_w1, in_b1 = layer_backward(squares, x.square(), w1.square(), True)
    found = {"x_a": in_x, "w1": in_w1, "b1": in_b1, "w2": in_w2, "b2": in_b2}
    return {name: t.sqrt() for name, t in found.items() if t is not None}


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
