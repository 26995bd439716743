"""Values, gradients, dtypes and layouts of every operator that maps a state, against its reference.

`test_conv1x1.py` tests the inverse of a 1x1 convolution: its error depends on the inverted matrix.
"""

import pytest
import torch
from cases import (
    DTYPES,
    FLOW_OPERATORS,
    IMAGES,
    LAYOUTS,
    SCALES,
    SHAPES,
    assert_matches,
    normal,
    sample,
)

TESTED = [op for name, op in FLOW_OPERATORS.items() if name != "conv1x1_inverse"]
every = pytest.mark.parametrize("op", TESTED, ids=lambda op: op.id)
every_coupling = pytest.mark.parametrize(
    "op", [op for op in TESTED if "scale" in op.options], ids=lambda op: op.id
)
every_product = pytest.mark.parametrize(
    "op", [op for op in TESTED if "weight" in op.inputs], ids=lambda op: op.id
)
every_other = pytest.mark.parametrize(
    "op", [op for op in TESTED if not op.couples], ids=lambda op: op.id
)


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(op, shape, device):
    assert_matches(op, sample(op, shape, device=device))


@every_other
def test_one_channel(op, device):
    assert_matches(op, sample(op, (2, 1, 3), device=device))


@every
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_layouts(op, shape, layout, device):
    assert_matches(op, sample(op, shape, device=device, layout=layout))


@every
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(op, dtypes, device):
    assert_matches(op, sample(op, (2, 5, 3, 4), dtypes, device))


@every_coupling
@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{s.kind} {s.order}")
def test_scales(op, scale, device):
    assert_matches(op, sample(op, (2, 5, 3, 4), device=device), scale)
    double = (torch.float64, torch.float64)
    assert_matches(op, sample(op, (2, 5, 3, 4), double, device), scale)


@every_product
def test_bias_in_any_layout(op, device):
    """A long run of the fuzz found this: kernels assumed that the bias is dense."""
    inputs = sample(op, (2, 5, 3, 3), device=device)
    for bias in (normal(10, device=device)[::2], normal(1, device=device).expand(5)):
        assert_matches(op, inputs | {"bias": bias.requires_grad_()})


@every_product
def test_a_gradient_of_bias_keeps_the_precision_of_bias(op, device):
    """A bfloat16 weight must not round the float32 bias."""
    inputs = sample(op, (2, 5, 3, 4), (torch.float32, torch.bfloat16), device)
    assert_matches(op, inputs | {"bias": normal(5, device=device).requires_grad_()})
