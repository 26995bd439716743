"""The table of operators, each with its reference in plain torch.

Tests, benchmarks and the reports without a GPU run every row, so a new operator needs one row here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.inputs import INPUTS, SPLINE, SPLINE_OPTIONS, Draw
from mflow_kernels.ops.actnorm import actnorm, actnorm_inverse, actnorm_ref
from mflow_kernels.ops.conv1x1 import conv1x1, conv1x1_inverse, conv1x1_ref
from mflow_kernels.ops.coupling import affine_coupling, affine_coupling_inverse, affine_coupling_ref
from mflow_kernels.ops.coupling_conv1x1 import coupling_conv1x1, coupling_inverse_conv1x1
from mflow_kernels.ops.coupling_network import coupling_network, coupling_network_ref
from mflow_kernels.ops.layouts import is_channels_last, pixels
from mflow_kernels.ops.logdet import accumulate_logdet, accumulate_logdet_ref
from mflow_kernels.ops.masked_penalty import masked_penalty_gaussian, masked_penalty_ref
from mflow_kernels.ops.rational_quadratic import rational_quadratic, rational_quadratic_inverse
from mflow_kernels.ops.rebuild_conv1x1 import (
    Halves,
    RebuiltConv1x1,
    rebuild_conv1x1,
    rebuild_conv1x1_ref,
    rebuild_splits,
)
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling, rebuild_coupling_ref
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import bins_ref, spline_ref
from mflow_kernels.ops.spline_coupling import spline_coupling, spline_coupling_inverse

DEFAULT_SCALE = ScaleFunction("tanh")
Terms = Callable[[int, int, int], dict[str, int]]


@dataclass(frozen=True)
class Operator:
    """One direction of an operator.

    Attributes:
        name: the operator's name, the same for both directions.
        function: takes `inputs` by position and `options` by name.
        reference: the same function in plain torch, differentiable.
        inputs: names in INPUTS (`inputs.py`).
        results: names of the results. A result "y" is a state like x.
        terms: called with N, C and P. Returns, by name, the number of products in the longest sum
            behind one element of each result, and of the gradient of each input.
        options: the names of its options, out of "scale" and "precision".
        inverse: whether the row is the operator's inverse.
        differentiable: False for operators that are themselves a part of a backward pass.
        reads_half: whether the backward pass reads only the second half of x.
        dtype: dtype of states in benchmarks.
        adjust: changes the drawn inputs, to avoid points at which rounding decides the gradient.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    terms: Terms
    options: tuple[str, ...] = ()
    inverse: bool = False
    differentiable: bool = True
    reads_half: bool = False
    dtype: torch.dtype = torch.float32
    adjust: Callable[[dict[str, Tensor]], None] | None = None

    @property
    def id(self) -> str:
        """The name of the operator, or of its inverse if the row is the inverse."""
        return self.function.__name__ if self.inverse else self.name

    @property
    def maps_states(self) -> bool:
        return self.inputs[0] == "x" and self.results[0] == "y"

    @property
    def couples(self) -> bool:
        """Whether the operator needs two channels, because one half passes through."""
        return "params" in self.inputs or "numbers_b" in self.inputs

    def draw(self, draw: Draw) -> dict[str, Tensor]:
        """Inputs by name. Floating-point tensors require gradients if the operator has them."""
        made = {name: INPUTS[name](draw) for name in self.inputs}
        if self.adjust is not None:
            self.adjust(made)
        return {
            name: t.requires_grad_(self.differentiable and t.is_floating_point())
            for name, t in made.items()
        }

    def call(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The results of the function, always as a tuple."""
        return _as_tuple(self.function(*inputs, **options))

    def expected(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The results of the reference, always as a tuple."""
        return _as_tuple(self.reference(*inputs, **options))

    def fewest_bytes(self, inputs: dict[str, Tensor], backward: bool = False) -> int:
        """The fewest bytes that a call, or its backward pass, can read and write."""
        with torch.no_grad():
            results = self.call(*inputs.values())
        moved = sum(map(_bytes, (*inputs.values(), *results)))
        if backward:
            moved += sum(_bytes(t) for t in inputs.values() if t.requires_grad)
            moved -= _bytes(inputs["x"][:, : inputs["x"].shape[1] // 2]) if self.reads_half else 0
        return moved


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


# References with the arguments and results of the public functions.


def _actnorm(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    logdet = pixels(x) * log_scale.sum()
    return actnorm_ref(x, bias, log_scale, False), logdet.expand(x.shape[0])


def _actnorm_inverse(y: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    logdet = -pixels(y) * log_scale.sum()
    return actnorm_ref(y, bias, log_scale, True), logdet.expand(y.shape[0])


def _conv1x1_inverse(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    inverse = torch.linalg.inv(weight)
    return conv1x1_ref(y, inverse, -(inverse @ bias))


def _coupling(inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def reference(
        x: Tensor,
        params: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        scale: ScaleFunction = DEFAULT_SCALE,
    ) -> tuple[Tensor, Tensor]:
        y, log_s = affine_coupling_ref(x, params, scale, inverse)
        y = y if weight is None else conv1x1_ref(y, weight, bias)
        return y, log_s.flatten(1).sum(1)

    return reference


def _spline(call: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = call(x, numbers, SPLINE.bins, SPLINE.bound, **SPLINE_OPTIONS)
        return y, logdet

    run.__name__ = call.__name__
    return run


def _spline_ref(coupling: bool, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def reference(x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        cut = x.shape[1] // 2 if coupling else 0
        y, log_slope = spline_ref(x[:, cut:], numbers, SPLINE, inverse)
        return torch.cat([x[:, :cut], y], dim=1), log_slope.flatten(1).sum(1)

    return reference


def _away_from_knots(inverse: bool) -> Callable[[dict[str, Tensor]], None]:
    """Move x to the middle four fifths of its bin, or well outside the interval.

    At a knot the gradient of a log-determinant jumps, and rounding decides between its two values.
    """

    def adjust(inputs: dict[str, Tensor]) -> None:
        x, numbers = inputs.values()
        cut = x.shape[1] - numbers.shape[1] // SPLINE.numbers
        position, sizes = x[:, cut:].double(), bins_ref(numbers.double(), SPLINE)[inverse]
        knots = F.pad(sizes.cumsum(-1), (1, 0)) + SPLINE.low
        index = (position.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)
        start, size = (part.gather(-1, index).squeeze(-1) for part in (knots[..., :-1], sizes))
        inside = position.abs() < SPLINE.high
        x[:, cut:] = torch.where(
            inside, start + 0.1 * size + 0.8 * (position - start), 1.1 * position
        )

    return adjust


def _masked_penalty(x: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return masked_penalty_gaussian(x, target, mask=mask)


def _masked_penalty_ref(x: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return masked_penalty_ref(x, target, mask, None, 1.0, "huber", 1.0)


def _rebuild_coupling(rebuild: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda z_b, dz_b, dlogdet, params: tuple(
        rebuild(z_b, dz_b, dlogdet, params, DEFAULT_SCALE, False)
    )


def _rebuild_conv1x1(y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    c = len(bias)
    splits = rebuild_splits(y[:, c // 2 :], c)
    sums = bias.new_empty(splits, c, c), bias.new_empty(splits, c)
    return _joined(rebuild_conv1x1(*_halves(y, dy, weight, bias), True, *sums))


def _rebuild_conv1x1_ref(y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return _joined(rebuild_conv1x1_ref(*_halves(y, dy, weight, bias)))


def _halves(
    y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Halves, Halves, None, Tensor, Tensor, Tensor, None, bool]:
    """Arguments of rebuild_conv1x1 after a coupling, without a network input."""
    cut = y.shape[1] // 2
    inverse, last = weight.t().contiguous(), is_channels_last(y)
    halves = (y[:, :cut], y[:, cut:]), (dy[:, :cut], dy[:, cut:])
    return (*halves, None, weight, inverse, bias, None, last)


def _joined(rebuilt: RebuiltConv1x1) -> tuple[Tensor, ...]:
    """The halves of x and of dx, and the two partial sums, added up."""
    x, dx, _, _, *partial_sums = rebuilt
    assert x is not None
    return (*x, *dx, *(sums.sum(0) for sums in partial_sums))


def _network_ref(x: Tensor, *parameters: Tensor) -> Tensor:
    return coupling_network_ref(x, *parameters)[0]


def _elementwise(n: int, c: int, p: int) -> dict[str, int]:
    own = dict.fromkeys(("y", "x", "params"), 1)
    return own | {"logdet": c * p, "bias": n * p, "log_scale": n * p}


def _splined(n: int, c: int, p: int) -> dict[str, int]:
    """Knots are sums of 8 bins. A bin is at least a twentieth of the interval, and dividing by it
    multiplies the error of a knot by up to 20, in gradients and in the logarithm of a slope. The
    slope multiplies the error of x less a knot: at most 13, the height of one bin beside seven of
    least height, over the least width."""
    gradients = dict.fromkeys(("x", "numbers", "numbers_b"), 20**2)
    return gradients | {"y": 8 * 13**2, "logdet": 20 * c * p}


def _splined_inverse(n: int, c: int, p: int) -> dict[str, int]:
    """An inverse divides by slopes of at least a tenth."""
    return {name: terms * 10**2 for name, terms in (_splined(n, c, p) | {"y": 8}).items()}


def _product(n: int, c: int, p: int) -> dict[str, int]:
    own = dict.fromkeys(("y", "x", "params"), c)
    return own | {"logdet": c * p, "bias": n * p * c, "weight": n * p * c}


def _sums(n: int, c: int, p: int) -> dict[str, int]:
    sums = dict.fromkeys(("penalty", "gaussian"), c * p)
    return sums | {"logdet": p + 1, "x": 1, "target": 1, "ledger": 1, "constant": n}


def _network_terms(n: int, c: int, p: int) -> dict[str, int]:
    """For up to 512 hidden channels, which the benchmarks draw on a GPU."""
    names = ("params", "x_a", "w1", "b1", "w2", "b2", "w3", "b3")
    return dict.fromkeys(names, 9 * 512 + n * p)


def _rebuilt(n: int, c: int, p: int) -> dict[str, int]:
    states = dict.fromkeys(("x_a", "x_b", "dx_a", "dx_b", "dparams"), c)
    return states | dict.fromkeys(("dweight", "dbias"), n * p)


def _both(
    name: str,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inverse: Callable[..., Any],
    inverse_reference: Callable[..., Any],
    inputs: tuple[str, ...],
    results: tuple[str, ...],
    terms: Terms,
    **others: Any,
) -> tuple[Operator, Operator]:
    """Return the rows of an operator and of its inverse."""
    return (
        Operator(name, function, reference, inputs, results, terms, **others),
        Operator(name, inverse, inverse_reference, inputs, results, terms, **others, inverse=True),
    )


def _splines(
    name: str, function: Callable[..., Any], inverse: Callable[..., Any], numbers: str
) -> Iterator[Operator]:
    """Yield the rows of an operator of splines and of its inverse."""
    couples = numbers == "numbers_b"
    for call, terms, backward in ((function, _splined, False), (inverse, _splined_inverse, True)):
        yield Operator(
            name,
            _spline(call),
            _spline_ref(couples, backward),
            ("x", numbers),
            STATE,
            terms,
            inverse=backward,
            reads_half=couples,
            adjust=_away_from_knots(backward),
        )


STATE = ("y", "logdet")
CHANNELWISE = ("x", "bias", "log_scale")
COUPLED = ("x", "params", "weight", "bias")
NETWORK = ("x_a", "w1", "b1", "w2", "b2", "w3", "b3")

OPERATORS = (
    *_both("actnorm", actnorm, _actnorm, actnorm_inverse, _actnorm_inverse, CHANNELWISE, STATE,
           _elementwise),
    *_both("conv1x1", conv1x1, conv1x1_ref, conv1x1_inverse, _conv1x1_inverse,
           ("x", "weight", "bias"), ("y",), _product, options=("precision",)),
    *_both("affine_coupling", affine_coupling, _coupling(False), affine_coupling_inverse,
           _coupling(True), ("x", "params"), STATE, _elementwise, options=("scale",),
           reads_half=True),
    *_both("coupling_conv1x1", coupling_conv1x1, _coupling(False), coupling_inverse_conv1x1,
           _coupling(True), COUPLED, STATE, _product, options=("scale", "precision")),
    *_splines("rational_quadratic", rational_quadratic, rational_quadratic_inverse, "numbers"),
    *_splines("spline_coupling", spline_coupling, spline_coupling_inverse, "numbers_b"),
    Operator("accumulate_logdet", accumulate_logdet, accumulate_logdet_ref, ("ledger", "constant"),
             ("logdet",), _sums),
    Operator("masked_penalty", _masked_penalty, _masked_penalty_ref, ("x", "target", "mask"),
             ("penalty", "gaussian"), _sums),
    Operator("coupling_network", coupling_network, _network_ref, NETWORK, ("params",),
             _network_terms, dtype=torch.bfloat16),
    Operator("rebuild_coupling", _rebuild_coupling(rebuild_coupling),
             _rebuild_coupling(rebuild_coupling_ref), ("z_b", "dz_b", "dlogdet", "params"),
             ("x_b", "dx_b", "dparams"), _rebuilt, differentiable=False),
    Operator("rebuild_conv1x1", _rebuild_conv1x1, _rebuild_conv1x1_ref,
             ("x", "dx", "weight", "bias"), ("x_a", "x_b", "dx_a", "dx_b", "dweight", "dbias"),
             _rebuilt, differentiable=False),
)  # fmt: skip
