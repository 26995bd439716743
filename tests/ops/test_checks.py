"""Bad input raises an error before any kernel runs. The error names the argument, the expected
value and the given one."""

import re
from typing import Any

import pytest
import torch
from cases import FLOW_OPERATORS

from benchmarks.harness.table import Operator

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
    message = f"expected one of sigmoid, double-sigmoid, softplus, exp, tanh, atan, got {scale!r}"
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
