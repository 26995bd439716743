"""Bad input raises an error before any kernel runs. The error names the argument, the expected
value and the given one."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from cases import FLOW_OPERATORS

from benchmarks.harness.table import Operator
from mflow_kernels import ops
from mflow_kernels.ops.scale import Kind

KINDS = ", ".join(get_args(Kind))
# Right shapes of the inputs.
SHAPES: dict[str, tuple[int, ...]] = {
    "x": (2, 4, 3, 5),
    "params": (2, 4, 3, 5),
    "numbers": (2, 92, 3, 5),
    "numbers_b": (2, 46, 3, 5),
    "weight": (4, 4),
    "bias": (4,),
    "log_scale": (4,),
}
# Argument, value, error, and message after the name of the argument.
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("x", torch.ones(2, 4, 3, 5, dtype=torch.cfloat), TypeError, "expected dtype .*got complex64"),
    ("x", torch.ones(4), ValueError, r"expected shape \(N, C, \*spatial\), got \(4,\)"),
    ("x", torch.ones(2, 4, 0, 5), ValueError, r"expected no empty .*axis, got \(2, 4, 0, 5\)"),
    ("x", torch.ones(0, 4, 0, 5), ValueError, r"expected no empty .*axis, got \(0, 4, 0, 5\)"),
    ("x", torch.ones(2, 0, 3, 5), ValueError, r"expected no empty channel.*got \(2, 0, 3, 5\)"),
    ("precision", "fp8", ValueError, "expected one of tf32x3, tf32, got 'fp8'"),
]
for scale in ("relu", None, 1.0):
    message = f"expected one of {KINDS}, got {scale!r}"
    BAD.append(("scale", scale, ValueError, message))
for name, shape in SHAPES.items():
    BAD += [
        (name, 1.0, TypeError, "expected a torch.Tensor, got float"),
        (name, torch.ones(shape).long(), TypeError, "expected dtype float.*got int64"),
    ]
    if name != "x":
        elsewhere = torch.ones(shape, device="meta")
        BAD.append((name, elsewhere, ValueError, "expected device cpu, got meta"))
for name in ("params", "numbers", "numbers_b"):
    message = "expected a dtype no wider .*float32, got float64"
    BAD.append((name, torch.ones(SHAPES[name]).double(), TypeError, message))
for name, wrong in {
    "params": [(2, 6, 3, 5), (2, 4, 5, 3), (1, 4, 3, 5), (2, 4, 3)],
    "numbers": [(2, 46, 3, 5), (2, 92, 5, 3)],
    "numbers_b": [(2, 92, 3, 5), (1, 46, 3, 5)],
    "weight": [(4, 3), (5, 5), (4, 4, 1), (4,)],
    "bias": [(4, 1)],
    "log_scale": [(3,)],
}.items():
    for shape in wrong:
        message = re.escape(f"expected shape {SHAPES[name]}, got {shape}")
        BAD.append((name, torch.ones(shape), ValueError, message))

CASES = [
    pytest.param(op, *bad, id=f"{op.id}: {bad[0]}: {bad[3]}")
    for op in FLOW_OPERATORS.values()
    for bad in BAD
    if bad[0] in (*op.inputs, *op.options)
]


@pytest.mark.parametrize(("op", "argument", "value", "error", "message"), CASES)
def test_bad_input(
    op: Operator, argument: str, value: Any, error: type[Exception], message: str
) -> None:
    given = {name: torch.ones(SHAPES[name]) for name in op.inputs} | {argument: value}
    inputs = [given.pop(name) for name in op.inputs]
    name = "y" if argument == "x" and op.inverse else argument
    name = "params" if "numbers" in name else name  # raw numbers of splines
    with pytest.raises(error, match=f"^{name}: {message}"):
        op.call(*inputs, **given)


@pytest.mark.parametrize(
    "op", [op for op in FLOW_OPERATORS.values() if op.couples], ids=lambda op: op.id
)
def test_one_channel(op: Operator) -> None:
    sizes = SHAPES | {
        "x": (2, 1, 3),
        "params": (2, 2, 3),
        "numbers_b": (2, 23, 3),
        "weight": (1, 1),
        "bias": (1,),
    }
    state = "y" if op.inverse else "x"
    with pytest.raises(ValueError, match=rf"^{state}: expected at least 2 channels .*\(2, 1, 3\)"):
        op.call(*(torch.ones(sizes[name]) for name in op.inputs))


# Functions of other arguments than states: the argument that is wrong, the error and its message.
ONES = torch.ones(2, 3, 4, 4)
LEARNED = ONES.clone().requires_grad_()
OTHERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "penalty": (ops.masked_penalty, {"input": ONES}),
    "logdet": (ops.accumulate_logdet, {"ledger": torch.ones(2, 3), "constant": torch.ones(())}),
    "scale": (ops.ScaleFunction, {}),
    "spline": (partial(ops.rational_quadratic, torch.ones(2, 3), torch.ones(2, 69)),
               {"bins": 8, "bound": 3.0}),
}  # fmt: skip
BAD_OTHERS: dict[str, list[tuple[dict[str, Any], type[Exception], str]]] = {
    "penalty": [
        ({"input": ONES.long()}, TypeError, r"input: expected dtype .*got int64"),
        ({"input": [1.0]}, TypeError, r"input: expected a torch.Tensor, got list"),
        ({"input": torch.ones(3)}, ValueError, r"input: expected shape \(N, C"),
        ({"input": torch.ones(2, 0)}, ValueError, r"input: .*\(2, 0\)"),
        ({"target": ONES[0]}, ValueError, r"target: .*\(2, 3, 4, 4\), got \(3,"),
        ({"target": ONES.double()}, TypeError, r"target: .*float32, got float64"),
        ({"target": ONES.to("meta")}, ValueError, r"target: .*cpu, got meta"),
        ({"mask": ONES.long()}, TypeError, r"mask: .*bool.*got int64"),
        ({"mask": True}, TypeError, r"mask: expected a torch.Tensor, got bool"),
        ({"mask": torch.ones(2)}, ValueError, r"mask: .*broadcasts.*got \(2,\)"),
        ({"mask": ONES.to("meta")}, ValueError, r"mask: .*cpu, got meta"),
        ({"mask": LEARNED}, ValueError, r"mask: .*constant"),
        ({"weight": LEARNED}, ValueError, r"weight: .*const"),
        ({"weight": torch.ones(2, 4)}, ValueError, r"weight: .*broadcasts"),
        ({"weight": ONES.long()}, TypeError, r"weight: .*got int64"),
        ({"weight": "1"}, TypeError, r"weight: expected a number or"),
        ({"weight": True}, TypeError, r"weight: expected a number or"),
        ({"weight": -1}, ValueError, r"weight: .*got -1"),
        ({"weight": math.inf}, ValueError, r"weight: .*got inf"),
        ({"weight": -ONES}, ValueError, r"weight: .*from -1.0 to -1.0"),
        ({"weight": ONES * math.inf}, ValueError, r"weight: .*to inf"),
        ({"rho": "l3"}, ValueError, "rho: expected one of l2, l1, huber, got 'l3'"),
        ({"delta": "1"}, TypeError, r"delta: expected a number, got str"),
        ({"delta": 0}, ValueError, r"delta: .*got 0"),
    ],
    "logdet": [
        ({"ledger": torch.ones(2, 3, 4)}, ValueError, r"ledger: expected shape \(N, T\), got"),
        ({"constant": torch.ones(2)}, ValueError, r"constant: expected shape \(\), got \(2,\)"),
        ({"constant": torch.ones(()).double()}, TypeError, "constant: .*float64"),
        ({"ledger": torch.ones(2, 3).half()}, TypeError, "ledger: .*got float16"),
        ({"constant": torch.ones((), device="meta")}, ValueError, "constant: .*cpu, got meta"),
        ({"constant": 1.0}, TypeError, "constant: expected a torch.Tensor, got float"),
    ],
    "scale": [
        ({"kind": "relu"}, ValueError, f"kind: expected one of {KINDS}, got 'relu'"),
        ({"order": "both"}, ValueError, "order: expected one of shift-scale, scale-shift, got"),
        ({"eps": -1e-3}, ValueError, "eps: expected a finite number >= 0, got -0.001"),
        ({"eps": math.nan}, ValueError, "eps: .* got nan"),
        ({"clamp": 0.0}, ValueError, "clamp: expected a finite number > 0, got 0.0"),
        ({"clamp": math.inf}, ValueError, "clamp: .* got inf"),
        ({"offset": math.inf}, ValueError, "offset: expected a finite number, got inf"),
        ({"offset": math.nan}, ValueError, "offset: .* got nan"),
    ],
    "spline": [
        ({"bins": 1}, ValueError, "bins: expected 2 to 64, got 1"),
        ({"bins": 8.0}, TypeError, "bins: expected a whole number, got float"),
        ({"bound": 0.0}, ValueError, "bound: expected a positive number, got 0.0"),
        ({"bound": (1.0, 1.0)}, ValueError, "bound: expected low < high, got"),
        ({"bound": (1.0, 2.0, 3.0)}, ValueError, r"bound: expected a number or \(low, high\), got"),
        ({"bound": "3"}, TypeError, "bound: expected a number, got str"),
        ({"tails": "none"}, ValueError, "tails: expected 'linear', 'circular' or None, got 'none'"),
        ({"kind": "relu"}, ValueError, "kind: expected one of softplus, exp, got 'relu'"),
        ({"min_width": 0.125}, ValueError, "min_width: expected a number from 0 to 1 / bins"),
        ({"min_height": -0.1}, ValueError, "min_height: expected a number from 0 to 1 / bins"),
        ({"min_slope": 0.0}, ValueError, "min_slope: expected between 0 and 1, got 0.0"),
        ({"temperature": 0}, ValueError, "temperature: expected a positive number, got 0"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [(name, *bad) for name, table in BAD_OTHERS.items() for bad in table],
    ids=lambda value: str(value)[:60],
)
def test_bad_input_of_others(
    name: str, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    function, right = OTHERS[name]
    with pytest.raises(error, match=rf"^(scale\.)?{message}"):
        function(**right | wrong)
