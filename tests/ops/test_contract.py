"""Properties that every operator has, independent of its formula."""

from functools import cache

import pytest
import torch
from cases import (
    DIFFERENTIABLE,
    FLOW_OPERATORS,
    IN_PLACE,
    OPCHECKS,
    REBUILDING,
    Calls,
    allocated,
    compiles,
    learned,
    normal,
    options,
    perturbed,
    sample,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from benchmarks.harness.inputs import Draw
from mflow_kernels import Glow
from mflow_kernels.ops.coupling_network import coupling_network_op, supports
from mflow_kernels.ops.launch import KERNELS_ON_CPU, Walk, walking
from mflow_kernels.testing import assert_close

every = pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=lambda op: op.id)
every_flow = pytest.mark.parametrize("op", FLOW_OPERATORS.values(), ids=lambda op: op.id)
# A coupling network computes in the dtype of autocast.
every_exact = pytest.mark.parametrize(
    "op", [op for name, op in DIFFERENTIABLE.items() if name != "coupling_network"],
    ids=lambda op: op.id,
)  # fmt: skip
# A flat tile; a tail after whole tiles, in both formats; more channels than one block.
CASES = [
    ((3, 5), "contiguous"),
    ((2, 6, 17, 16), "contiguous"),
    ((2, 6, 17, 16), "channels_last"),
    ((1, 130, 3, 3), "contiguous"),
]


def run(op, inputs, function=None):
    """All outputs and gradients of the operator, or of `function` in its place. The cotangents
    depend only on the shapes."""
    outputs = tree_leaves((function or op.function)(*inputs.values(), **options(op)))
    torch.manual_seed(1)
    cotangents = [torch.randn_like(y) for y in outputs]
    leaves = learned(inputs)
    return [*outputs, *(torch.autograd.grad(outputs, leaves, cotangents) if leaves else ())]


@every
def test_gradcheck(op, device):
    inputs = sample(op, (2, 3, 2, 2), (torch.float64, torch.float64), device)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(
            lambda *given: op.call(*given, **options(op)), tuple(inputs.values()), fast_mode=True
        )


@compiles
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.bfloat16, "contiguous"),  # CPUs have no loop for it
    ],
    ids=str,
)
@every
def test_compiles_whole(op, dtype, layout, device):
    torch.compiler.reset()
    inputs = sample(op, (2, 5, 3, 4), (dtype, dtype), device, layout)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(op, inputs, compiled), run(op, inputs), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()


@pytest.mark.skipif(KERNELS_ON_CPU, reason="interpreters run one program after another")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", [*DIFFERENTIABLE.values(), *REBUILDING], ids=lambda op: op.id)
def test_same_bits_with_any_number_of_threads(op, layout, device):
    """The state is large enough for three threads; an element of a spline counts for many. The CPU
    runs torch's convolutions for a network, whose bits depend on that number."""
    shape = (3, 6, 64, 40) if op.adjust else (3, 6, 160, 160)
    inputs = sample(op, shape, device=device, layout=layout)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(1 if op.id == "coupling_network" else n)
            found.append(run(op, inputs))
    finally:
        torch.set_num_threads(threads)
    for first, second, third in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@every
def test_outputs_are_wholly_written(op, shape, layout, kernel_device):
    for result in run(op, sample(op, shape, device=kernel_device, layout=layout)):
        assert result.isfinite().all()


@pytest.mark.parametrize("layout", IN_PLACE)
@every_flow
def test_no_hidden_copy(op, layout, kernel_device):
    """Besides the results, nothing as large as half a state is allocated."""
    inputs = sample(op, (1, 4, 16, 16), device=kernel_device, layout=layout)
    slack = inputs["x"].numel() // 2 * inputs["x"].element_size()

    def size(results):
        return sum(t.untyped_storage().nbytes() for t in results)

    with walking(Walk(inputs["x"].is_cuda, lambda *_: None)):  # kernels compute nothing
        outputs, cost = allocated(lambda: op.call(*inputs.values(), **options(op)))
        assert cost < size(outputs) + slack
        # The cotangents have their outputs' layouts, like those from a next operator's backward.
        cotangents = [torch.randn_like(y) for y in outputs]
        grads, cost = allocated(lambda: torch.autograd.grad(outputs, learned(inputs), cotangents))
        assert cost < size(grads) + slack


def test_a_copy_would_be_seen():
    x = torch.randn(64, 64)
    _, cost = allocated(lambda: x.t().contiguous())
    assert cost >= x.numel() * 4


@pytest.mark.parametrize("dtypes", [torch.float32, torch.bfloat16], ids=str)
@every_exact
def test_autocast_changes_no_bit(op, dtypes, device):
    """Under autocast, only networks compute in bfloat16; operators keep the state's precision."""
    inputs = sample(op, (2, 6, 4, 3), (torch.float32, dtypes), device)
    expected = run(op, inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        results = run(op, inputs)
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 3, 2)], ids=str)
@every
def test_empty_batch(op, shape, device):
    inputs = sample(op, shape, device=device)
    outputs = op.call(*inputs.values(), **options(op))
    assert all(len(result) == 0 for result in outputs)
    grads = torch.autograd.grad(outputs, learned(inputs), [torch.ones_like(y) for y in outputs])
    for given, grad in zip(learned(inputs), grads, strict=True):
        assert grad.shape == given.shape
        assert not grad.any()


def network_op(*inputs):
    """As compilers call it; `coupling_network` bypasses the registered operator elsewhere."""
    how = True, supports(inputs[0], inputs[1], inputs[5])
    return coupling_network_op.registered(*inputs, *how)[0]


@cache
def recorded_calls(device: torch.device) -> dict[str, list[tuple]]:
    """Calls of every operator by its name, as the public functions and a flow make them."""
    with Calls() as calls:
        network = DIFFERENTIABLE["coupling_network"]
        for op in [op for op in DIFFERENTIABLE.values() if op is not network]:
            layout = "contiguous" if "inverse" in op.id else "second half, channels_last"
            run(op, sample(op, (2, 4, 5, 4), device=device, layout=layout))
        for shape in ((3, 4), (2, 4, 2, 3)):
            dtypes = torch.bfloat16, torch.bfloat16
            inputs = network.draw(Draw(shape, dtypes, device, width=16))
            run(network, inputs, network_op)
            frozen = {name: t.requires_grad_(name == "x_a") for name, t in inputs.items()}
            run(network, frozen, network_op)
        glow = Glow((1, 6, 4), levels=1, steps=2, width=3).to(device)
        z, logdet = glow(normal(2, 1, 6, 4, device=device))
        back, negative = glow.inverse(z)
        (back.sum() + negative.sum() + logdet.sum()).backward()
    by_name: dict[str, list[tuple]] = {}
    for func, args in calls.found:
        by_name.setdefault(func._schema.name, []).append((func, args))
    return by_name


REGISTERED = sorted(
    name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mflow::")
)


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, device):
    calls = recorded_calls(device).get(name)
    assert calls, f"{name} is registered, but nothing here calls it"
    looks = {}
    for func, args in calls:
        look = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
        looks[str(look)] = func, args
    for func, args in looks.values():
        # A backward operator has no derivative of its own.
        leaves = [
            a.detach().requires_grad_("_backward" not in name and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(func, leaves, **OPCHECKS)


def tangents(call, inputs, directions):
    """Tangents of all results; None for a result without one."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, directions, strict=True)]
        return [forward_ad.unpack_dual(y).tangent for y in call(*duals)]


@every
def test_operators_carry_tangents(op, device):
    """Kernels have no forward mode, so the references carry the tangents."""
    inputs = sample(op, (2, 6, 3, 5), (torch.float64, torch.float64), device)
    given = [value.detach() for value in learned(inputs)]
    fixed = list(inputs.values())[len(given) :]
    directions = [torch.randn_like(value) for value in given]
    got = tangents(lambda *args: op.call(*args, *fixed, **options(op)), given, directions)
    want = tangents(lambda *args: op.expected(*args, *fixed, **options(op)), given, directions)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, terms=1000)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_flows_carry_tangents(reversible, grad, device):
    """Tangents agree with gradients: w . (J v) = (J^T w) . v."""
    flow = perturbed(Glow((2, 4, 4), 2, 1, 4, reversible=reversible).double().to(device))
    x = normal(3, 2, 4, 4, dtype=torch.float64, device=device).requires_grad_()
    v = torch.randn_like(x)

    def outputs(x):
        z, logdet = flow(x)
        back, _ = flow.inverse(tuple(2 * part for part in z))
        return *z, logdet, back

    weights = [torch.randn_like(y) for y in outputs(x)]
    (pulled,) = torch.autograd.grad(outputs(x), x, weights)
    with torch.set_grad_enabled(grad):
        pushed = tangents(outputs, [x], [v])
        _, functorch = torch.func.jvp(outputs, (x,), (v,))
    assert all(t.requires_grad == grad for t in pushed)
    for tangent, other, weight in zip(pushed, functorch, weights, strict=True):
        assert_close(other, tangent, terms=1000)
        assert tangent.shape == weight.shape
    total = sum((t * w).sum() for t, w in zip(pushed, weights, strict=True))
    assert_close(total, (pulled * v).sum(), terms=10_000, scale=(pulled * v).abs().sum().item())
