"""Values, gradients, dtypes and layouts of the operators on states, against their references.

`test_conv1x1.py` tests the inverse of a 1x1 convolution: its error depends on the inverted matrix.
"""

import pytest
import torch
from cases import (
    DIFFERENTIABLE,
    DTYPES,
    FLOW_OPERATORS,
    IMAGES,
    LAYOUTS,
    LONG_SHAPES,
    PARTED_SHAPES,
    SCALES,
    SHAPES,
    assert_matches,
    eager_form,
    normal,
    options,
    sample,
    skip_if_slow,
)

from benchmarks.harness.table import Operator
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.testing import assert_close

TESTED = [op for name, op in FLOW_OPERATORS.items() if name != "conv1x1_inverse"]


def each(operators: list[Operator]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("op", operators, ids=lambda op: op.id)


every_coupling = each([op for op in TESTED if "scale" in op.options])
every_product = each([op for op in TESTED if "weight" in op.inputs])
PENALTY = [] if KERNELS_ON_CPU else [DIFFERENTIABLE["masked_penalty"]]  # it has no Triton kernel
every = each([*TESTED, *PENALTY])
# An interpreter takes seconds for a case. There an operator and its inverse, which have one kernel,
# share the shapes, and a layout has one of two shapes.
PAIRED = "in interpreters, an operator and its inverse share these cases"
# A penalty may also have other axes, and parts of a sample that are summed apart.
PENALTY_SHAPES = [(1000, 2), (2, 3, 129, 131), (1, 300_001), (2, 2, 3, 2, 3, 2)]


@every
@pytest.mark.parametrize("shape", SHAPES + LONG_SHAPES + PARTED_SHAPES, ids=str)
def test_shapes(op, shape, device):
    if "weight" in op.inputs and shape[1] > 130:
        pytest.skip("as 130 channels, and slow")
    skip_if_slow(op, shape)
    if KERNELS_ON_CPU and op.inverse and SHAPES.index(shape) % 2:
        pytest.skip(PAIRED)
    assert_matches(op, sample(op, shape, device=device))
    if shape in LONG_SHAPES:
        assert_matches(op, sample(op, shape, (torch.float64, torch.float64), device))


@each([op for op in TESTED if not op.couples] + PENALTY)
def test_one_channel(op, device):
    assert_matches(op, sample(op, (2, 1, 3), device=device))


@each(PENALTY)
@pytest.mark.parametrize("shape", PENALTY_SHAPES, ids=str)
def test_shapes_of_penalties(op, shape, device):
    assert_matches(op, sample(op, shape, device=device))


@every
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", IMAGES + [s for s in LONG_SHAPES if len(s) == 4], ids=str)
def test_layouts(op, shape, layout, device):
    skip_if_slow(op, shape)
    if KERNELS_ON_CPU and IMAGES.index(shape) != ([*LAYOUTS].index(layout) + op.inverse) % 2:
        pytest.skip(PAIRED)
    assert_matches(op, sample(op, shape, device=device, layout=layout))


@each(
    [
        op
        for op in [*TESTED, *PENALTY]
        if {"params", "numbers", "numbers_b", "target"} & {*op.inputs}
    ]
)
def test_layouts_of_state_and_params_may_differ(op, device):
    inputs = sample(op, (2, 5, 4, 3), device=device)
    name = op.inputs[1]
    params = inputs[name].detach().contiguous(memory_format=torch.channels_last)
    assert_matches(op, inputs | {name: params.requires_grad_()})


@every
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(op, dtypes, device):
    if KERNELS_ON_CPU and "numbers" in op.inputs:
        pytest.skip("the kernels are those of the spline couplings")
    if KERNELS_ON_CPU and "numbers_b" in op.inputs and op.inverse == DTYPES.index(dtypes) % 2:
        pytest.skip(PAIRED)
    assert_matches(op, sample(op, (2, 5, 3, 4), dtypes, device))


@every_coupling
@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{s.kind} {s.order}")
def test_scales(op, scale, device):
    if KERNELS_ON_CPU and "weight" in op.inputs and scale not in (SCALES[0], SCALES[-1]):
        pytest.skip("the function of the couplings without a product")
    assert_matches(op, sample(op, (2, 5, 3, 4), device=device), scale)
    double = (torch.float64, torch.float64)
    assert_matches(op, sample(op, (2, 5, 3, 4), double, device), scale)


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5, 6), (1, 130, 3, 3)], ids=str)
@every_product
def test_network_input(op, shape, net_dtype, device):
    """A product also returns the input of the next network, and takes its gradient."""
    if KERNELS_ON_CPU and shape[1] > 100 and net_dtype == torch.float32:
        pytest.skip("the dtype is that of a store, which the other shapes test")
    for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        inputs = sample(op, shape, device=device, layout=layout)
        y, *_, net = eager_form(op, net_dtype)(*inputs.values(), **options(op))
        assert torch.equal(y, op.call(*inputs.values(), **options(op))[0])
        assert torch.equal(net, y[:, : net.shape[1]].to(net_dtype))
        dy, dnet = torch.randn_like(y), torch.randn_like(net)
        grads = torch.autograd.grad((y, net), list(inputs.values()), (dy, dnet))
        exact = [t.detach().double().requires_grad_() for t in inputs.values()]
        dy = dy.double()
        dy[:, : net.shape[1]] += dnet
        wants = torch.autograd.grad(op.expected(*exact, **options(op))[0], exact, dy)
        terms = op.terms(shape[0], shape[1], pixels(y))
        for name, got, want in zip(inputs, grads, wants, strict=True):
            assert_close(got, want, terms=terms[name], name=f"d {name}")


@every_product
def test_without_bias(op, device):
    inputs = sample(op, (2, 5, 3, 4), device=device)
    inputs["bias"] = torch.zeros(5, device=device)
    biased = op.call(*inputs.values(), **options(op))
    del inputs["bias"]
    for a, b in zip(op.call(*inputs.values(), **options(op)), biased, strict=True):
        assert torch.equal(a, b)


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
