"""Masked autoregressive maps: loop and kernel against D passes in plain torch, libraries, results
by hand; gradients of both directions; what is found in masks, kept, and refused."""

import math
from functools import partial

import pytest
import torch
from cases import normal, not_about_kernels
from torch import Tensor, nn

from mflow_kernels.ops import cpu
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.masked_autoregressive import (
    MaskedAutoregression,
    masked_autoregressive_inverse_ref,
    masked_autoregressive_ref,
    numbers_of,
    owners,
)
from mflow_kernels.ops.masked_network import (
    ACTIVATIONS,
    Activation,
    Add,
    AddContext,
    Affine,
    Degrees,
    Gate,
    Linear,
    Operation,
    Pick,
    tensors_of,
    with_tensors,
)
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.sorted_network import SortedNetwork
from mflow_kernels.ops.spline import Spline, SplineOptions
from mflow_kernels.testing import assert_close

SOFTPLUS = ScaleFunction("softplus", eps=1e-3, clamp=1e30, order="scale-shift")
# Gradients divide the rounding of a position by the size of its bin, in the reference too.
MILD: SplineOptions = {"min_width": 0.05, "min_height": 0.05, "min_slope": 0.1}
TRANSFORMS = {
    "softplus": SOFTPLUS,
    "softsign": ScaleFunction("softsign", clamp=-math.log(1e-3), order="scale-shift"),
    "tanh": ScaleFunction("tanh"),
    "linear tails": Spline(4, 3.0, **MILD),
    "circular tails": Spline(3, 3.0, tails="circular", **MILD),
    "bounded": Spline(5, (-9.0, 9.0), tails=None, kind="exp", **MILD),
}
FEATURES = 3 if KERNELS_ON_CPU else 5
loops = pytest.mark.skipif(cpu._C is None or KERNELS_ON_CPU, reason="csrc is not built")


def network(
    transform,
    features=FEATURES,
    width=2 * FEATURES - 1,
    kind="relu",
    contexts=0,
    dtype=torch.float64,
    seed=0,
) -> tuple[list[Operation], list[Tensor]]:
    """A network with every operation, whose variables have a random order, and contexts for it."""
    torch.manual_seed(seed)
    place = torch.randperm(features) + 1
    units = torch.randint(0, features, (width,))  # at random, so degrees of a sum differ
    owner = owners(transform, features)

    def linear(source: int, of: Tensor, to: Tensor, strict: bool = False) -> Linear:
        mask = to[:, None] > of if strict else to[:, None] >= of
        weight, bias = normal(len(to), len(of)) / len(of) ** 0.5, normal(len(to)) / 2
        mask = mask if seed % 2 else mask.to(dtype)
        return Linear(source, weight.to(dtype), mask, bias.to(dtype))

    made: list[Operation] = [linear(0, place, units)]
    if contexts:
        made += [AddContext(len(made), 0)]
    start = len(made)
    made += [Activation(len(made), kind, 0.5)]
    made += [linear(len(made), units, units)]
    if contexts:
        made += [Gate(len(made), 1)]
    made += [Activation(len(made), kind, 0.5), Add(start, len(made) + 1)]
    made += [Affine(len(made), 1 + normal(width).to(dtype) / 9, normal(width).to(dtype) / 9)]
    made += [Activation(len(made), "tanh")]
    order = torch.randperm(len(owner))  # the params come in another order from the last product
    made += [linear(len(made), units, place[owner[order]], strict=True)]
    made += [Pick(len(made), order.argsort())]
    return made, [normal(7, width).to(dtype) for _ in range(contexts)]


def leaves_of(operations: list[Operation], *others: Tensor) -> list[Tensor]:
    return [t.requires_grad_() for t in (*others, *tensors_of(operations))]


def both_ways(inverse: bool, given: Tensor, *how) -> tuple[Tensor, Tensor]:
    own = MaskedAutoregression()
    return own.inverse(given, *how) if inverse else own.forward(given, *how)


def reference(inverse: bool, given: Tensor, operations, transform, contexts=()):
    if not inverse:
        return masked_autoregressive_ref(given, operations, transform, contexts)
    degrees = Degrees(operations, given.shape[1], owners(transform, given.shape[1]))
    how = operations, transform, contexts, degrees
    return masked_autoregressive_inverse_ref(given, *how)


def compare(inverse: bool, given: Tensor, *how, contexts=(), terms: int = 64) -> None:
    """Values and gradients of all tensors are those of the reference, by autograd."""
    leaves = leaves_of(how[0], given, *contexts)
    got, want = (call(inverse, given, *how, contexts) for call in (both_ways, reference))
    weights = [normal(*y.shape).to(y.dtype) for y in want]
    grads = [torch.autograd.grad(y, leaves, weights) for y in (got, want)]
    for name, a, b in zip(("result", "logdet"), got, want, strict=True):
        assert_close(a, b, terms=terms, scale=max(1.0, b.abs().max().item()), name=name)
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_close(a, b, terms=16 * terms, scale=max(1.0, b.abs().max().item()), name=f"grad {i}")


# The forward map has no kernel of its own, and Triton's interpreter is slow.
BOTH = {"inverse": True} if KERNELS_ON_CPU else {"forward": False, "inverse": True}
both = pytest.mark.parametrize("inverse", BOTH.values(), ids=BOTH)


@both
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform(name, inverse):
    transform = TRANSFORMS[name]
    operations, contexts = network(transform, contexts=2)
    compare(inverse, normal(7, FEATURES).double(), operations, transform, contexts=contexts)


@both
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_activation(kind, inverse):
    operations, _ = network(SOFTPLUS, kind=kind, seed=3)
    compare(inverse, normal(7, FEATURES).double(), operations, SOFTPLUS)


@not_about_kernels
@both
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_float32(kind, inverse):
    """float32 has loops of its own for exp, tanh and softplus; results equal those in float64."""
    operations, _ = network(SOFTPLUS, kind=kind, dtype=torch.float32)
    doubled = with_tensors(operations, [t.double() for t in tensors_of(operations)])
    x = normal(70, FEATURES)
    given = reference(False, x, operations, SOFTPLUS)[0].detach() if inverse else x
    for got, want in zip(
        both_ways(inverse, given, operations, SOFTPLUS),
        reference(inverse, given.double(), doubled, SOFTPLUS),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert_close(got, want, terms=5 * 64, scale=max(4.0, want.abs().max().item()))


@both
@pytest.mark.parametrize(
    ("samples", "features", "width"),
    [(1, 1, 3), (64, 2, 1), (65, 3, 7), *([] if KERNELS_ON_CPU else [(3, 17, 40), (1100, 4, 5)])],
)
def test_shapes(samples, features, width, inverse):
    """Blocks of samples that are not full, one variable, fewer units than variables, and gradients
    of weights in several parts."""
    operations, _ = network(SOFTPLUS, features, width)
    compare(inverse, normal(samples, features).double(), operations, SOFTPLUS, terms=samples * 64)


@both
def test_strided_states_and_contexts(inverse):
    operations, contexts = network(SOFTPLUS, contexts=2)
    given = normal(7, 2 * FEATURES).double().t().contiguous().t()[:, ::2]
    contexts[1] = contexts[1][:1].expand(7, -1)  # one context for all samples
    got, want = (
        call(inverse, given, operations, SOFTPLUS, contexts) for call in (both_ways, reference)
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, terms=64, scale=4.0)


def test_by_hand():
    """z_0 = 2 x_0 + 1, z_1 = e^x_0 x_1 - 3 x_0: one hidden unit that is x_0."""
    scale = ScaleFunction("exp", order="scale-shift")
    unit = Linear(0, torch.tensor([[1.0, 9.0]]), torch.tensor([[1, 0]]), torch.zeros(1))
    raw = torch.tensor([[9.0], [1.0], [9.0], [-3.0]])  # raw scales, then shifts; 9 is masked
    mask = torch.tensor([[0], [1], [0], [1]])
    last = Linear(1, raw, mask, torch.tensor([math.log(2), 0.0, 1.0, 0.0]))
    x = torch.tensor([[0.5, -1.0]])
    z, logdet = both_ways(False, x, [unit, last], scale)
    want = torch.tensor([[2.0, -math.exp(0.5) - 1.5]])
    assert_close(z, want.double(), terms=4)
    assert_close(logdet, torch.tensor([math.log(2) + 0.5]).double(), terms=4)
    back, minus = both_ways(True, want, [unit, last], scale)
    assert_close(back, x.double(), terms=4)
    assert_close(minus, -logdet.double(), terms=4)


@not_about_kernels
@both
def test_the_loop_is_not_needed(inverse, monkeypatch):
    """Without csrc, one graph gives the gradients of the inverse."""
    monkeypatch.setattr(cpu, "_C", None)
    for transform in (SOFTPLUS, Spline(3, 3.0)):
        operations, contexts = network(transform, contexts=2)
        compare(inverse, normal(7, FEATURES).double(), operations, transform, contexts=contexts)


@not_about_kernels
@both
def test_higher_derivatives_by_torch_func(inverse):
    operations, _ = network(SOFTPLUS, 3, 4)
    own, given = MaskedAutoregression(), normal(1, 3).double()

    def f(row: Tensor) -> Tensor:
        y, logdet = (own.inverse if inverse else own.forward)(row[None], operations, SOFTPLUS)
        return y.sum() + logdet.sum()

    hessian = torch.func.hessian(f)(given[0])
    rows = []
    for i in range(3):
        ends = []
        for sign in (-1, 1):
            moved = given.clone()
            moved[0, i] += sign * 1e-5
            moved.requires_grad_()
            ends.append(torch.autograd.grad(f(moved[0]), moved)[0][0])
        rows.append((ends[1] - ends[0]) / 2e-5)
    torch.testing.assert_close(hessian, torch.stack(rows), rtol=1e-6, atol=1e-7)
    leaf = given.requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf[0]), leaf, create_graph=False)
    assert grad.isfinite().all()


def test_each_unit_is_computed_once():
    """The sorted network has each unit of each value in one degree, and all its inputs before."""
    operations, _ = network(SOFTPLUS, 6, 11)
    owner = owners(SOFTPLUS, 6)
    degrees = Degrees(operations, 6, owner)
    assert degrees.count == 6
    plan = SortedNetwork(operations, degrees, owner).plan.tolist()
    features, count, made, order, _ = plan[:5]
    assert (features, count, made) == (6, 6, len(operations))
    assert sorted(plan[order : order + 6]) == list(range(6))
    kind, units, source, starts, known = plan[5:10]
    assert (kind, source) == (0, 0)
    useful = (degrees.units[1] < 6).sum().item()
    assert units == useful
    rows = plan[starts : starts + 7]
    assert rows == sorted(rows)
    assert rows[-1] == useful
    # A unit of degree d reads the d variables before.
    assert plan[known : known + 6] == [0, 1, 2, 3, 4, 5]


def test_degrees_of_masks_in_blocks():
    """Variables that do not depend on each other have one degree, as in zuko's couplings."""
    hidden = torch.tensor([[1, 0, 1, 0]])
    last = torch.tensor([[0], [1], [0], [1]]).repeat(2, 1)
    made = [Linear(0, torch.ones(1, 4), hidden, None), Linear(1, torch.ones(8, 1), last, None)]
    degrees = Degrees(made, 4, owners(SOFTPLUS, 4))
    assert degrees.count == 2
    assert degrees.variables.tolist() == [0, 1, 0, 1]
    assert degrees.units[1].tolist() == [1]


def test_masks_that_are_not_triangular_are_refused():
    full = [Linear(0, torch.ones(4, 2), None, None)]
    cycle = [Linear(0, torch.ones(4, 2), torch.tensor([[0, 1], [1, 0]]).repeat(2, 1), None)]
    for operations in (full, cycle):
        with pytest.raises(ValueError, match=r"masks: expected .* triangular in some order"):
            both_ways(True, torch.zeros(1, 2), operations, SOFTPLUS)


def test_changes_of_tensors_are_seen():
    """Sorted weights and masks are kept until a tensor changes, in place or by another one."""
    operations, _ = network(SOFTPLUS)
    own, z = MaskedAutoregression(), normal(7, FEATURES).double()

    def check(changed: list[Operation]) -> None:
        want = reference(True, z, changed, SOFTPLUS)
        assert_close(own.inverse(z, changed, SOFTPLUS)[0], want[0], terms=64, scale=4.0)

    check(operations)
    tensors_of(operations)[0].mul_(1.5)
    check(operations)
    tensors_of(operations)[-1].data = tensors_of(operations)[-1] + 1.0
    last = operations[-2]
    check([*operations[:-2], last._replace(weight=last.weight * 2), operations[-1]])
    last.mask.zero_()  # all params are constant now
    check(operations)
    assert own.degrees.count == 1


@loops
def test_threads_change_no_bit(monkeypatch):
    operations, _ = network(SOFTPLUS, 8, 64)
    given = normal(3000, 8).double()
    leaves = leaves_of(operations, given)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for inverse in (False, True):
            y, logdet = both_ways(inverse, given, operations, SOFTPLUS)
            found.append((y, logdet, *torch.autograd.grad(y.sum() + logdet.sum(), leaves)))
    for one, other in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, one, other))


@loops
@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, 4, "other features"),
        (1, 0, "1 to D degrees"),
        (2, 10**6, "number of operations"),
        (5, 9, "unknown operation"),
        (7, 1, "earlier value"),
        (8, 10**6, "inside the plan"),
        (9, -1, "inside the plan"),
        (10, 10**9, "inside the numbers"),
    ],
)
def test_the_loop_checks_its_plan(place, value, words):
    operations, _ = network(SOFTPLUS)
    owner = owners(SOFTPLUS, FEATURES)
    found = SortedNetwork(operations, Degrees(operations, FEATURES, owner), owner)
    z = normal(2, FEATURES).double()
    numbers, plan = found.numbers(tensors_of(operations), z), found.plan.clone()
    cpu.masked_map(z, plan, numbers, (), SOFTPLUS.args, True)
    plan[place] = value
    with pytest.raises(ValueError, match=words):
        cpu.masked_map(z, plan, numbers, (), SOFTPLUS.args, True)
    with pytest.raises(ValueError, match="state's dtype"):
        cpu.masked_map(z, found.plan, numbers.float(), (), SOFTPLUS.args, True)


def of_nflows(made: nn.Module, features: int, affine: bool) -> tuple[list[Operation], int]:
    """An nflows MADE with context as operations; params are reordered for our affine transform."""
    net: list[Operation] = []

    def linear(layer) -> None:
        net.append(Linear(len(net), layer.weight, layer.mask, layer.bias))

    linear(made.initial_layer)
    net.append(AddContext(len(net), 0))
    for i, block in enumerate(made.blocks):
        start = len(net)
        net.append(Activation(len(net), "relu"))
        linear(block.linear_layers[0])
        net.append(AddContext(len(net), 1 + i))
        net.append(Activation(len(net), "relu"))
        linear(block.linear_layers[1])
        net.append(Add(start, len(net)))
    linear(made.final_layer)
    if affine:
        net.append(Pick(len(net), torch.arange(2 * features).view(-1, 2).t().reshape(-1)))
    return net, len(made.blocks)


@not_about_kernels
@both
@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_nflows(kind, inverse):
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(0)
    if kind == "affine":
        make = transforms.MaskedAffineAutoregressiveTransform
        ours = SOFTPLUS
    else:
        name = "MaskedPiecewiseRationalQuadraticAutoregressiveTransform"
        make = partial(getattr(transforms, name), num_bins=8, tails="linear", tail_bound=3.0)
        ours = Spline(8, 3.0)
    layer = make(6, 20, context_features=3).double()
    for parameter in layer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    made = layer.autoregressive_net
    operations, _ = of_nflows(made, 6, kind == "affine")
    given = normal(40, 6).double().requires_grad_()
    context = normal(40, 3).double().requires_grad_()
    want = layer.inverse(given, context) if inverse else layer(given, context)
    contexts = [
        made.context_layer(context).relu(),
        *(b.context_layer(context) for b in made.blocks),
    ]
    got = both_ways(inverse, given, operations, ours, contexts)
    leaves = [given, context, *layer.parameters()]
    weights = [normal(*y.shape).double() for y in want]
    grads = [torch.autograd.grad(y, leaves, weights) for y in (got, want)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@not_about_kernels
@both
@pytest.mark.parametrize("passes", [None, 2], ids=["all", "coupling"])
def test_zuko(passes, inverse):
    flows = pytest.importorskip("zuko.flows")
    torch.manual_seed(0)
    lazy = flows.MaskedAutoregressiveTransform(
        5, context=2, passes=passes, order=torch.randperm(5), hidden_features=(16, 12)
    ).double()
    layers = list(lazy.hyper)
    net: list[Operation] = []
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            net.append(Activation(len(net), "relu"))
            continue
        # The context is among the inputs of the first product.
        first = len(net) == 0
        columns = slice(0, 5) if first else slice(None)
        net.append(Linear(len(net), layer.weight[:, columns], layer.mask[:, columns], layer.bias))
        if first:
            net.append(AddContext(len(net), 0))
    net.append(Pick(len(net), torch.cat([torch.arange(1, 10, 2), torch.arange(0, 10, 2)])))
    given, context = normal(9, 5).double(), normal(9, 2).double()
    contexts = [context @ (layers[0].weight * layers[0].mask)[:, 5:].t()]
    transform = lazy(context)
    if inverse:
        result = transform.inv(given)
        want = result, -transform.log_abs_det_jacobian(result, given)
    else:
        want = transform.call_and_ladj(given)
    ours = ScaleFunction("softsign", clamp=-math.log(1e-3), order="scale-shift")
    own = MaskedAutoregression()
    got = (own.inverse if inverse else own.forward)(given, net, ours, contexts)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if cpu._C is not None:
        assert own.degrees.count == (passes or 5)
    leaves = list(lazy.parameters())
    grads = [torch.autograd.grad(y[0].sum() + y[1].square().sum(), leaves) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_numbers_of_a_variable():
    assert [numbers_of(t) for t in TRANSFORMS.values()] == [2, 2, 2, 11, 9, 16]
    assert owners(SOFTPLUS, 2).tolist() == [0, 1, 0, 1]
    assert owners(Spline(2, 1.0), 2).tolist() == [0] * 5 + [1] * 5
