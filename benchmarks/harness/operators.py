"""Every operator with its reference in plain torch, its inputs and the fewest bytes it can move."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels import ops
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.ops.actnorm import actnorm_ref
from mflow_kernels.ops.conv1x1 import conv1x1_ref
from mflow_kernels.ops.coupling import affine_coupling_ref
from mflow_kernels.ops.logdet import accumulate_logdet_ref
from mflow_kernels.ops.masked_penalty import masked_penalty_ref
from mflow_kernels.ops.rebuild_conv1x1 import (
    RebuiltConv1x1,
    rebuild_conv1x1,
    rebuild_conv1x1_ref,
    rebuild_splits,
)
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling, rebuild_coupling_ref
from mflow_kernels.testing import assert_close

SCALE = ScaleFunction("tanh")
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
        return (
            f"{self.pixels}px level {self.level}: {self.n}x{self.c}x{self.side}x{self.side}{layout}"
        )


@dataclass(frozen=True)
class Operation:
    """An operator in one direction.

    Attributes:
        ours, reference: functions from the inputs to a tuple of tensors.
        inputs: float32 tensors on the device, and options.
        differentiated: whether to measure the backward pass, to the inputs that require gradients.
        fewest: the fewest bytes that it must read and write.
        terms: number of products in the longest sum behind one element of each result, in order.
            The last number applies to all further results.
    """

    name: str
    direction: str
    ours: Function
    reference: Function
    inputs: tuple[Any, ...]
    differentiated: bool
    fewest: int
    terms: tuple[int, ...]

    def prepare(self, function: Function) -> Callable[[], tuple[Tensor, ...]]:
        """Return the call to time: the function without autograd, or its backward pass.

        The forward pass of a backward pass runs here.
        """
        if not self.differentiated:
            return torch.no_grad()(partial(function, *self.inputs))
        learned = [t for t in self.inputs if isinstance(t, Tensor) and t.requires_grad]
        outputs = [t for t in function(*self.inputs) if t.requires_grad]
        # Give gradients the layout of the outputs; a broadcast gradient would have to be copied.
        grads = [torch.full_like(t, 0.5, memory_format=torch.preserve_format) for t in outputs]
        return partial(torch.autograd.grad, outputs, learned, grads)

    def exact(self) -> tuple[Tensor, ...]:
        """Return the results of the reference in float64."""
        wide = tuple(map(_widened, self.inputs))
        double = Operation(self.name, self.direction, self.ours, self.reference, wide,
                           self.differentiated, self.fewest, self.terms)  # fmt: skip
        return double.prepare(self.reference)()

    def check(self, function: Function, exact: Sequence[Tensor]) -> None:
        """Assert that the function's results equal `exact` up to the rounding of float32."""
        results = self.prepare(function)()
        assert len(results) == len(exact)
        for i, (result, expected) in enumerate(zip(results, exact, strict=True)):
            terms = self.terms[min(i, len(self.terms) - 1)]
            # The terms are of order one, and their sum may cancel to less.
            assert_close(result, expected, terms=terms, scale=1.0, name=f"{self.name}[{i}]")


def _widened(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_widened, value))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


@dataclass(frozen=True)
class Maker:
    """Draws inputs for states of one shape."""

    shape: Shape
    device: torch.device
    generator: torch.Generator

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.device).requires_grad_()

    def state(self, channels: int) -> Tensor:
        side = self.shape.side
        drawn = torch.randn(self.shape.n, channels, side, side, generator=self.generator)
        last = self.shape.channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        return drawn.to(self.device, memory_format=layout).requires_grad_()

    def rotation(self) -> Tensor:
        c = self.shape.c
        square = torch.randn(c, c, generator=self.generator, dtype=torch.float64)
        return torch.linalg.qr(square)[0].float().to(self.device).requires_grad_()


def operations(shape: Shape, device: torch.device) -> Iterator[Operation]:
    """Yield all operations, on inputs drawn from a fixed seed."""
    make = Maker(shape, device, torch.Generator().manual_seed(0))
    c, c_b, np = shape.c, shape.c - shape.c // 2, shape.n * shape.p
    state, params = 4 * np * c, 4 * np * 2 * c_b  # bytes
    half = 4 * np * c_b
    x, q, bias = make.state(c), make.state(2 * c_b), make.normal(c)
    weight, log_scale = make.rotation(), (0.5 * make.normal(c).detach()).requires_grad_()
    pairs: list[tuple[str, Function, Function, Function, Function, tuple[Any, ...]]] = [
        ("actnorm", ops.actnorm, ops.actnorm_inverse,
         partial(_actnorm, False), partial(_actnorm, True), (x, bias, log_scale)),
        ("conv1x1", _single(ops.conv1x1), _single(ops.conv1x1_inverse),
         _single(conv1x1_ref), _conv1x1_inverse, (x, weight, bias)),
        ("affine_coupling", ops.affine_coupling, ops.affine_coupling_inverse,
         partial(_coupling, False), partial(_coupling, True), (x, q)),
        ("coupling_conv1x1", ops.coupling_conv1x1, ops.coupling_inverse_conv1x1,
         partial(_coupling, False), partial(_coupling, True), (x, q, weight, bias)),
    ]  # fmt: skip
    couples = {"affine_coupling": params, "coupling_conv1x1": params}
    for name, ours, inverse, reference, inverse_reference, inputs in pairs:
        q_bytes = couples.get(name, 0)
        moved = 2 * state + q_bytes
        # The gradient of a coupling reads the changed half of x; that of a product reads all of x.
        back = moved + q_bytes + (half if name == "affine_coupling" else state)
        summed = 1 if name in ("actnorm", "affine_coupling") else c
        terms = (summed, c * shape.p)  # of y and logdet
        grads = (summed, summed if q_bytes else np * c)  # of x, params and the channels' parameters
        grads += (np * c,)
        yield Operation(name, "forward", ours, reference, inputs, False, moved, terms)
        yield Operation(name, "inverse", inverse, inverse_reference, inputs, False, moved, terms)
        yield Operation(name, "backward", ours, reference, inputs, True, back, grads)
    yield from _rest(make, x, q, weight, bias)


def _rest(make: Maker, x: Tensor, q: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Operation]:
    """Yield the two launches of a reversible backward pass, the logdet sum and the penalty."""
    shape, (n, c) = make.shape, x.shape[:2]
    c_a, np = c // 2, n * shape.p
    state, params = 4 * np * c, 4 * np * 2 * (c - c_a)
    half = 4 * np * (c - c_a)
    x, q, weight, bias = (t.detach() for t in (x, q, weight, bias))
    dx, dlogdet = make.state(c).detach(), make.normal(n).detach()
    back = (x[:, c_a:], dx[:, c_a:], dlogdet, q, SCALE, False, False)
    yield Operation("rebuild_coupling", "backward", rebuild_coupling, rebuild_coupling_ref, back,
                    False, 4 * half + 2 * params, (1,))  # fmt: skip
    halves = (x[:, :c_a], x[:, c_a:]), (dx[:, :c_a], dx[:, c_a:])
    back = (*halves, None, weight, weight.t().contiguous(), bias, None, shape.channels_last)
    yield Operation("rebuild_conv1x1", "backward", _rebuild_conv1x1, _rebuild_conv1x1_ref, back,
                    False, 4 * state, (c, c, c, c, np, np))  # fmt: skip
    tiles = max(1, shape.p // 64)
    partial_sums, constant = make.normal(n, tiles), make.normal(1).detach()[0]
    yield Operation("accumulate_logdet", "forward", _single(ops.accumulate_logdet),
                    _single(accumulate_logdet_ref), (partial_sums, constant), False,
                    4 * n * (tiles + 1), (tiles,))  # fmt: skip
    target = make.state(c).detach()
    x.requires_grad_()
    mask = torch.rand(shape.side, shape.side, generator=make.generator) < 0.5
    inputs = (x, target, mask.to(x.device))
    name, ours = "masked_penalty", _masked(ops.masked_penalty_gaussian)
    yield Operation(name, "forward", ours, _masked_ref, inputs, False, 2 * state, (c * shape.p,))
    yield Operation(name, "backward", ours, _masked_ref, inputs, True, 3 * state, (1,))


def _single(function: Callable[..., Tensor]) -> Function:
    return lambda *inputs: (function(*inputs),)


def _actnorm(inverse: bool, x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    logdet = (-1 if inverse else 1) * x[0, 0].numel() * log_scale.sum()
    return actnorm_ref(x, bias, log_scale, inverse), logdet.expand(x.shape[0])


def _conv1x1_inverse(y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    inverse = torch.linalg.inv(weight)
    return (conv1x1_ref(y, inverse, -(inverse @ bias)),)


def _coupling(
    inverse: bool,
    x: Tensor,
    params: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    y, log_s = affine_coupling_ref(x, params, SCALE, inverse)
    return y if weight is None else conv1x1_ref(y, weight, bias), log_s.sum(1)


def _rebuild_conv1x1(*inputs: Any) -> tuple[Tensor, ...]:
    """The backward pass of one 1x1 convolution whose input is the output of a coupling."""
    (_, y_b), bias = inputs[0], inputs[5]
    splits, c = rebuild_splits(y_b, len(bias)), len(bias)
    sums = bias.new_empty(splits, c, c), bias.new_empty(splits, c)
    return _summed(rebuild_conv1x1(*inputs, True, *sums))


def _rebuild_conv1x1_ref(*inputs: Any) -> tuple[Tensor, ...]:
    return _summed(rebuild_conv1x1_ref(*inputs))


def _summed(rebuilt: RebuiltConv1x1) -> tuple[Tensor, ...]:
    """The halves of x and dx, and the two partial sums, added up."""
    x, dx, _, _, *partial_sums = rebuilt
    assert x is not None
    return (*x, *dx, *(sums.sum(0) for sums in partial_sums))


def _masked(function: Function) -> Function:
    return lambda x, target, mask: function(x, target, mask=mask)


def _masked_ref(x: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return masked_penalty_ref(x, target, mask, None, 1.0, "huber", 1.0)
