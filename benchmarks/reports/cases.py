"""The operators and chains that the reports run, on states of chosen shape, layout and dtypes.

Only tensors with pixels (states, params, network inputs and their gradients) have four axes here.
The reports recognize them by that.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness.inputs import Draw
from benchmarks.harness.table import OPERATORS
from mflow_kernels.layers import FlowStep, ReversibleChain
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.ops.precision import accumulator

SHORT = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


# Number of products of C x C matrices that a kernel computes at each pixel.
CHANNEL_PRODUCTS = {
    "_conv1x1_kernel": 1,
    "_weight_gradient_kernel": 1,
    "_coupling_conv1x1_bwd_kernel": 1,
    "_rebuild_conv1x1_kernel": 3,
    "_rebuild_conv1x1_sliced_kernel": 3,
    "_rebuild_conv1x1_wide_kernel": 3,
}

CHAINS: dict[str, dict[str, Any]] = {  # what a chain stores for its backward pass
    "stored chain": {"reversible": False},
    "reversible chain": {"checkpoint_every": None},
    "checkpointed chain": {"checkpoint_every": 1},
}


@dataclass(frozen=True)
class Case:
    """One kind of state, and the dtype of its coupling networks."""

    c: int
    n: int = 2
    side: int = 64  # P = side * side
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    params_dtype: torch.dtype = torch.float32
    scale: ScaleFunction = ScaleFunction()  # noqa: RUF009 - frozen
    precision: str = "tf32x3"

    @property
    def p(self) -> int:
        return self.side * self.side

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    def tensor(self, channels: int, dtype: torch.dtype) -> Tensor:
        t = torch.full((self.n, channels, self.side, self.side), 0.5, dtype=dtype)
        return self.laid_out(t).requires_grad_()

    def laid_out(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout)


class Constant(nn.Module):
    """A coupling network that costs nothing, so that only the flow's launches remain."""

    def __init__(self, params: Tensor) -> None:
        super().__init__()
        self.params = nn.Parameter(params.detach().clone(memory_format=torch.preserve_format))

    def forward(self, x: Tensor) -> Tensor:
        return self.params


def chain(case: Case, steps: int, **options: Any) -> ReversibleChain:
    """Return a chain of `steps` steps with constant networks, in the case's dtypes."""
    channels = 2 * (case.c - case.c // 2)
    nets = [Constant(case.tensor(channels, case.params_dtype)) for _ in range(steps)]
    made = ReversibleChain([FlowStep(case.c, net, scale=case.scale) for net in nets], **options)
    return made if case.dtype != torch.float64 else made.double()


def autocast(case: Case) -> AbstractContextManager[object]:
    """Return the autocast that makes a chain cast its networks' inputs to `params_dtype`."""
    if case.params_dtype in (torch.float16, torch.bfloat16):
        return torch.autocast("cpu", case.params_dtype)
    return nullcontext()


class Operation(NamedTuple):
    """An operator or chain in one direction.

    `prepare()` runs the steps before it (the forward pass of a backward pass) and returns the
    function to observe.
    """

    name: str
    direction: str  # "forward", "inverse", "forward backward" or "inverse backward"
    prepare: Callable[[], Callable[[], object]]


def operations(case: Case) -> Iterator[Operation]:
    """Yield every operator on states and chains of two steps, forward, inverse and backward."""
    draw = Draw(
        (case.n, case.c, case.side, case.side),
        (case.dtype, case.params_dtype),
        torch.get_default_device(),
        layout=case.laid_out,
        numbers=lambda size: torch.full(size, 0.5, dtype=torch.float64),  # no report uses results
    )
    options = {"scale": case.scale, "precision": case.precision}
    table: list[tuple[str, str, Callable[..., object], list[Tensor]]] = []
    for operator in OPERATORS:
        if operator.maps_states:
            named = {name: options[name] for name in operator.options}
            inputs = [
                t
                if name in ("x", "params", "numbers", "numbers_b")
                else t.detach().to(accumulator(case.dtype)).requires_grad_()
                for name, t in operator.draw(draw).items()
            ]
            direction = "inverse" if operator.inverse else "forward"
            table.append((operator.name, direction, partial(operator.function, **named), inputs))
    x = case.tensor(case.c, case.dtype)
    for kind, how in CHAINS.items():
        two = chain(case, 2, **how)
        learned = [x, *(p for p in two.parameters() if p.requires_grad)]
        table.append((kind, "forward", lambda x, *_, two=two: two(x), learned))
        table.append((kind, "inverse", lambda x, *_, two=two: two.inverse(x), learned))
    for name, direction, function, inputs in table:
        run = partial(_run, case, partial(function, *inputs))
        yield Operation(name, direction, lambda run=run: torch.no_grad()(run))
        yield Operation(name, f"{direction} backward", partial(backward_of, run, inputs))


def _run(case: Case, function: Callable[[], object]) -> object:
    with autocast(case):
        return function()


def backward_of(run: Callable[[], object], inputs: list[Tensor]) -> Callable[[], object]:
    """Run the forward pass, and return a function that runs the backward pass.

    The gradients have the layouts of the outputs: those that `sum()` broadcasts have strides of
    zero and would be copied.
    """
    outputs = run()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [t for t in outputs if t.requires_grad]
    grads = [torch.full_like(t, 0.5, memory_format=torch.preserve_format) for t in outputs]
    return partial(torch.autograd.grad, outputs, inputs, grads, allow_unused=True)
