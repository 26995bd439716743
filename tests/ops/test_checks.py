"""Bad input raises an error before any kernel runs. The error names the argument, the expected
value and the given one."""

import pytest
import torch
from cases import FLOW_OPERATORS, options, sample

every = pytest.mark.parametrize("op", FLOW_OPERATORS.values(), ids=lambda op: op.id)
couplings = [op for op in FLOW_OPERATORS.values() if "scale" in op.options]
with_conv1x1 = [op for op in FLOW_OPERATORS.values() if "weight" in op.inputs]


def fails(op, error, message, **changes):
    """Assert that a call fails with one input changed; "x" is "y" in the errors of inverses."""
    inputs = {name: t.detach() for name, t in sample(op, (2, 4, 3, 5)).items()}
    extra = {k: v for k, v in changes.items() if k not in inputs}
    inputs |= {k: v for k, v in changes.items() if k in inputs}
    if message.startswith("x:") and "inverse" in op.id:
        message = "y" + message[1:]
    with pytest.raises(error, match=f"^{message}"):
        op.call(*inputs.values(), **options(op) | extra)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.ones(2, 4, 3, 5, dtype=torch.int64),
            TypeError,
            "x: expected dtype float.*got int64",
        ),
        (torch.ones(2, 4, 3, 5, dtype=torch.cfloat), TypeError, "x: .*got complex64"),
        ([[1.0, 2.0]], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.ones(4), ValueError, r"x: expected shape \(N, C, \*spatial\), got \(4,\)"),
        (torch.ones(2, 4, 0, 5), ValueError, r"x: expected no empty .*axis, got \(2, 4, 0, 5\)"),
        (torch.ones(2, 0, 3, 5), ValueError, r"x: expected no empty channel.*got \(2, 0, 3, 5\)"),
    ],
)
@every
def test_state(op, x, error, message):
    fails(op, error, message, x=x)


@every
def test_another_device(op):
    for name in op.inputs[1:]:
        value = sample(op, (2, 4, 3, 5))[name].detach().to("meta")
        fails(op, ValueError, f"{name}: expected device cpu, got meta", **{name: value})


@every
def test_another_dtype(op):
    for name in op.inputs[1:]:
        value = sample(op, (2, 4, 3, 5))[name].detach().long()
        fails(op, TypeError, f"{name}: expected dtype float.*got int64", **{name: value})


@every
def test_no_tensor(op):
    for name in op.inputs[1:]:
        fails(op, TypeError, f"{name}: expected a torch.Tensor, got float", **{name: 1.0})


@pytest.mark.parametrize("op", couplings, ids=lambda op: op.id)
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 4, 5, 3), (1, 4, 3, 5), (2, 4, 3)], ids=str)
def test_params_shape(op, shape):
    message = rf"params: expected shape \(2, 4, 3, 5\), got \{str(shape)[:-1]}\)"
    fails(op, ValueError, message, params=torch.ones(shape))


@pytest.mark.parametrize("op", couplings, ids=lambda op: op.id)
def test_one_channel(op):
    with pytest.raises(ValueError, match=r"x: expected at least 2 channels .*\(2, 1, 3\)"):
        op.call(*[t.detach() for t in sample(op, (2, 1, 3)).values()])


@pytest.mark.parametrize("op", couplings, ids=lambda op: op.id)
@pytest.mark.parametrize("scale", ["relu", None, 1.0])
def test_scale(op, scale):
    message = f"scale: expected one of sigmoid, exp, tanh, atan, got {scale!r}"
    fails(op, ValueError, message, scale=scale)


@pytest.mark.parametrize("op", with_conv1x1, ids=lambda op: op.id)
@pytest.mark.parametrize("shape", [(4, 3), (5, 5), (4, 4, 1), (4,)], ids=str)
def test_weight_shape(op, shape):
    message = rf"weight: expected shape \(4, 4\), got \{str(shape)[:-1]}\)"
    fails(op, ValueError, message, weight=torch.ones(shape))


@pytest.mark.parametrize(
    "op", [op for op in FLOW_OPERATORS.values() if "bias" in op.inputs], ids=lambda op: op.id
)
def test_bias_shape(op):
    fails(op, ValueError, r"bias: expected shape \(4,\), got \(4, 1\)", bias=torch.ones(4, 1))


@pytest.mark.parametrize(
    "op", [FLOW_OPERATORS["actnorm"], FLOW_OPERATORS["actnorm_inverse"]], ids=lambda op: op.id
)
def test_log_scale_shape(op):
    fails(op, ValueError, r"log_scale: expected shape \(4,\), got \(3,\)", log_scale=torch.ones(3))


@pytest.mark.parametrize("op", with_conv1x1, ids=lambda op: op.id)
def test_precision(op):
    fails(op, ValueError, "precision: expected one of tf32x3, tf32, got 'fp8'", precision="fp8")
