"""Masked networks (MADE, arXiv 1502.03509) as lists of operations, and the order of their degrees.

A network maps x (N, D) and contexts to params, some numbers for each of the D variables. Masks see
to it that the numbers of a variable depend on variables before it only, in some order. The value 0
is x, value i + 1 is the result of operation i, and the last one holds the params.

The *degree* of a variable is the length of the longest path of variables that it depends on: 0 if
its params are constant. Variables of one degree do not depend on each other. The degree of a hidden
unit is the smallest d so that all variables that it depends on have degrees below d. So a unit of
degree d can be computed as soon as the variables of degrees below d are known, and then never
changes. `Degrees` finds the degrees in the masks; they may come from any library.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops.launch import transformed

ActivationKind = Literal[
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "softplus",
    "identity",
    "sin",
    "cos",
    "wrap",
]


class Linear(NamedTuple):
    """y = x (weight * mask)^T + bias. A mask (out, in) of 0 and 1; None masks nothing."""

    source: int
    weight: Tensor
    mask: Tensor | None
    bias: Tensor | None


class Activation(NamedTuple):
    """An elementwise function. `constant` is the slope of "leaky_relu", alpha of "elu" and "celu",
    beta of "softplus", and B of "wrap", x mod 2 B - B."""

    source: int
    kind: ActivationKind
    constant: float = 1.0


class Add(NamedTuple):
    """y = x + other: two values."""

    source: int
    other: int


class Affine(NamedTuple):
    """y = weight * x + bias, both (units,): a batch norm in evaluation."""

    source: int
    weight: Tensor
    bias: Tensor


class AddContext(NamedTuple):
    """y = x + contexts[context], which is (N, units)."""

    source: int
    context: int


class Gate(NamedTuple):
    """y = x * sigmoid(contexts[context]), as a gated linear unit; the context is (N, units)."""

    source: int
    context: int


class Pick(NamedTuple):
    """y = x[:, units]: another order of the units. A unit may be picked more than once."""

    source: int
    units: Tensor


Operation = Linear | Activation | Add | Affine | AddContext | Gate | Pick

ACTIVATIONS: dict[ActivationKind, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda x, _: F.relu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "elu": lambda x, alpha: F.elu(x, alpha),
    "selu": lambda x, _: F.selu(x),
    "celu": lambda x, alpha: F.celu(x, alpha),
    "tanh": lambda x, _: x.tanh(),
    "sigmoid": lambda x, _: x.sigmoid(),
    "silu": lambda x, _: F.silu(x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "softplus": lambda x, beta: F.softplus(x, beta),
    "identity": lambda x, _: x,
    "sin": lambda x, _: x.sin(),
    "cos": lambda x, _: x.cos(),
    "wrap": lambda x, bound: torch.remainder(x, 2 * bound) - bound,
}


class _Mask(torch.autograd.Function):
    """All weights times their masks, in one operation."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        ctx.masks = tensors[count:]
        return tuple(torch._foreach_mul(tensors[:count], tensors[count:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch._foreach_mul(grads, ctx.masks), *(None for _ in ctx.masks))


def masked_weights(operations: Sequence[Operation]) -> list[Tensor]:
    """The weights of all linear operations, in order, with zeros where their masks have zeros."""
    linear = [o for o in operations if isinstance(o, Linear)]
    pairs = [(o.weight, o.mask) for o in linear if o.mask is not None]
    if torch.compiler.is_compiling() or transformed():
        masked = iter([weight * mask for weight, mask in pairs])
    else:
        weights, masks = zip(*pairs, strict=True) if pairs else ((), ())
        masked = iter(_Mask.apply(*weights, *masks) if pairs else ())
    return [o.weight if o.mask is None else next(masked) for o in linear]


def network_ref(
    operations: Sequence[Operation],
    x: Tensor,
    contexts: Sequence[Tensor] = (),
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """The params of x, in plain torch.

    Args:
        weights: `masked_weights(operations)`, to compute them once for several calls.
    """
    masked = iter(masked_weights(operations) if weights is None else weights)
    values = [x]
    for o in operations:
        value = values[o.source]
        match o:
            case Linear():
                value = F.linear(value, next(masked), o.bias)
            case Activation():
                value = ACTIVATIONS[o.kind](value, o.constant)
            case Add():
                value = value + values[o.other]
            case Affine():
                value = o.weight * value + o.bias
            case AddContext():
                value = value + contexts[o.context]
            case Gate():
                value = value * contexts[o.context].sigmoid()
            case Pick():
                value = value.index_select(1, o.units)
        values.append(value)
    return values[-1]


def tensors_of(operations: Sequence[Operation]) -> list[Tensor]:
    """The tensors that have gradients."""
    found = []
    for o in operations:
        if isinstance(o, (Linear, Affine)):
            found.append(o.weight)
            if o.bias is not None:
                found.append(o.bias)
    return found


def with_tensors(operations: Sequence[Operation], tensors: Sequence[Tensor]) -> list[Operation]:
    """The operations with these in place of `tensors_of(operations)`."""
    rest = iter(tensors)
    made = []
    for o in operations:
        new = {n: next(rest) for n in ("weight", "bias") if getattr(o, n, None) is not None}
        made.append(o._replace(**new) if new else o)  # type: ignore[arg-type]
    return made


class Degrees:
    """The degrees of a masked network's variables and units, found in its masks.

    Args:
        operations: the network. Of linear operations without a mask, each unit depends on all.
        features: D.
        owner: the variable of each of the params, (params,) integers.

    Attributes:
        count: number of different degrees of variables: how many passes the inverse takes if each
            pass computes the whole network.
        variables: the degree of each variable, (D,).
        units: the degree of each unit, of each value; for the params, the degree of their variable.

    Raises:
        ValueError: the params of a variable depend on the variable itself, or through others.
    """

    def __init__(self, operations: Sequence[Operation], features: int, owner: Tensor) -> None:
        depends = [torch.eye(features, dtype=torch.bool)]  # of each unit, on each variable
        for o in operations:
            rows = depends[o.source]
            if isinstance(o, Linear):
                if o.mask is None:
                    rows = rows.any(0).expand(len(o.weight), -1)
                else:
                    rows = (o.mask.detach().cpu() != 0).float() @ rows.float() > 0
            elif isinstance(o, Add):
                rows = rows | depends[o.other]
            elif isinstance(o, Pick):
                rows = rows[o.units.cpu()]
            depends.append(rows)
        if len(depends[-1]) != len(owner):
            raise ValueError(
                f"operations: expected {len(owner)} params, got {len(depends[-1])} of them"
            )
        needs = torch.zeros(features, features, dtype=torch.float32)
        needs = needs.index_add_(0, owner, depends[-1].float()) > 0
        self.variables = _degrees(needs)
        self.count = int(self.variables.max()) + 1
        self.units = [torch.where(rows, self.variables + 1, 0).amax(1) for rows in depends[:-1]] + [
            self.variables[owner]
        ]


def _degrees(needs: Tensor) -> Tensor:
    """The length of the longest path to each variable; needs[i, j] says that i depends on j."""
    degrees = torch.zeros(len(needs), dtype=torch.int64)
    for _ in range(len(needs)):
        longer = torch.where(needs, degrees + 1, 0).amax(1)
        if torch.equal(longer, degrees):
            return degrees
        degrees = longer
    raise ValueError(
        "masks: expected them to be triangular in some order of the variables, but the params of a "
        "variable depend on the variable itself"
    )
