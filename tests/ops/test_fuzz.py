"""Every public operator on random shapes, dtypes and memory layouts. Values and gradients are
compared with the formula in float64. Case i depends only on i, and on TRITON_INTERPRET, which makes
states smaller. MFLOW_FUZZ=10000 runs cases 0 to 9,999, and MFLOW_FUZZ=4321:4322 runs one again."""

import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from cases import DTYPES, FLOW_OPERATORS, SCALES, eager_form
from torch import Tensor
from views import VIEWS, permuted

from benchmarks.harness.inputs import params_shape, rotation
from benchmarks.harness.table import Operator
from mflow_kernels import ops
from mflow_kernels.ops.conv1x1 import conv1x1_ref
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.layouts import dense_pixels
from mflow_kernels.ops.masked_penalty import masked_penalty_ref
from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.rational_quadratic import transform_ref
from mflow_kernels.ops.scale import log_scale_ref
from mflow_kernels.testing import assert_close, tolerance

CHANNELS = (1, 2, 3, 4, 5, 8, 12, 13, 33)
LENGTHS = (1, 1, 2, 3, 5, 7, 8, 16)
ELEMENTS = 300 if KERNELS_ON_CPU else 6000  # at most, of a state


def cases() -> range:
    default = "6" if KERNELS_ON_CPU else "600"
    first, _, last = os.environ.get("MFLOW_FUZZ", default).rpartition(":")
    return range(int(first or 0), int(last))


# Layers call these past the dispatcher, so that nothing resolves a view before their loops.
EAGER = () if KERNELS_ON_CPU else ("affine_coupling", "conv1x1", "coupling_conv1x1")


def shape_of_a_state(rng: random.Random, channels: int) -> tuple[int, ...]:
    while True:
        spatial = (rng.choice(LENGTHS) for _ in range(rng.randrange(4)))
        shape = (rng.choice((0, 1, 1, 2, 3, 7)), channels, *spatial)
        if math.prod(shape) <= ELEMENTS:
            return shape


class Case:
    """The random draws of one case, and its description if it fails."""

    def __init__(self, index: int) -> None:
        self.rng = random.Random(index)
        self.generator = torch.Generator().manual_seed(index)
        self.notes: list[str] = []

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(dtype)

    def view(self, name: str, x: Tensor) -> Tensor:
        made = self.rng.choices(VIEWS, k=self.rng.choice((0, 1, 1, 2))) if x.dim() else []
        for make in made:
            x = make(x, self.rng)
        how = " ".join(make.__name__ for make in made)
        self.notes.append(f"{name} {tuple(x.shape)} {x.dtype} {x.stride()} {how}")
        return x.detach()

    def leaf(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.view(name, self.normal(*shape, dtype=dtype)).requires_grad_()


def assert_matches(
    case: Case,
    names: list[str],
    leaves: list[Tensor],
    got: tuple[Tensor, ...],
    reference: Callable[..., tuple[Tensor, ...]],
    magnitude: Callable[..., tuple[Tensor, ...]],
    terms: dict[str, int],
) -> None:
    """Compare values and gradients with `reference` in float64.

    `magnitude` is the reference with absolute values: the rounding errors of a sum depend on the
    size of its terms, which may cancel.
    """
    exact, positive = ([t.detach().double().requires_grad_() for t in leaves] for _ in range(2))
    want, sizes = reference(*exact), magnitude(*positive)
    cotangents = [case.view("gradient", case.normal(*y.shape, dtype=y.dtype)) for y in got]
    grads = torch.autograd.grad(got, leaves, cotangents, allow_unused=True)
    wants = torch.autograd.grad(want, exact, [g.double() for g in cotangents], allow_unused=True)
    gradient_sizes = torch.autograd.grad(
        sizes, positive, [g.double().abs() for g in cotangents], allow_unused=True
    )
    outputs = zip(("y", "sum"), got, want, sizes, strict=False)
    gradients = zip(names, grads, wants, gradient_sizes, strict=True)
    for name, a, b, size in (*outputs, *gradients):
        if size is not None and size.numel():
            assert_close(a, b, terms=terms.get(name, 1), scale=size.abs().max().item(), name=name)
        assert a.shape == b.shape, name


SPLINES = [op for op in FLOW_OPERATORS.values() if op.adjust]
PLAIN = [op for op in FLOW_OPERATORS.values() if not op.adjust]


def run_spline(case: Case) -> None:
    """Compare with the reference at x, and at two states that lie as far apart as knots round.

    Rounding may put an element into the next bin, where the gradient of its logdet is another.
    """
    rng = case.rng
    op: Operator = rng.choice(SPLINES)
    function = getattr(ops, op.id)
    state, other = rng.choice(DTYPES)
    c = rng.choice([c for c in CHANNELS if c > 1 or not op.couples])
    shape = shape_of_a_state(rng, c)
    tails, kind = rng.choice(("linear", "circular", None)), rng.choice(("softplus", "exp"))
    bins = rng.choice((2, 3, 4, 5, 8, 13) if KERNELS_ON_CPU else (2, 3, 4, 5, 8, 10, 13, 32, 64))
    bound = rng.choice((1.0, 3.0)) if tails else (-2.0, 2.0)  # a view may negate x
    spline = ops.Spline(
        bins, bound, tails, rng.choice((1e-3, 0.3 / bins)), rng.choice((1e-3, 0.3 / bins)),
        rng.choice((1e-3, 0.1)), rng.choice((1.0, 3.0)), kind
    )  # fmt: skip
    case.notes.append(f"{op.id} {spline}")
    values = 2 * case.normal(*shape, dtype=torch.float64)
    if tails is None:
        values = spline.low + (spline.high - spline.low) * (0.05 + 0.9 * values.sigmoid())
    x = case.view("x", values.to(state)).requires_grad_()
    cut = c // 2 if op.couples else 0
    params = case.leaf("params", shape[0], (c - cut) * spline.numbers, *shape[2:], dtype=other)
    rest = {f.name: getattr(spline, f.name) for f in fields(spline)[2:]}
    got = function(x, params, bins, bound, **rest)
    cotangents = [case.view("gradient", case.normal(*y.shape, dtype=y.dtype)) for y in got]
    got = (*got, *torch.autograd.grad(got, (x, params), cotangents))

    def reference(shift: float) -> tuple[Tensor, ...]:
        leaves = (x.detach().double() + shift).requires_grad_(), params.detach().double()
        leaves[1].requires_grad_()
        y, ledger = transform_ref(*leaves, spline, cut, op.inverse)
        results = y, ledger[:, 0]
        return *results, *torch.autograd.grad(results, leaves, [g.double() for g in cotangents])

    eps = torch.finfo(accumulator(state)).eps
    shift = 2 * bins**0.5 * eps * (spline.high - spline.low)
    above, below = reference(shift), reference(-shift)
    terms = {"y": 8, "logdet": math.prod(shape[1:]) * 20, "x": 20**2, "params": 20**2}
    for name, a, b, *near in zip(terms, got, reference(0.0), above, below, strict=True):
        assert a.shape == b.shape, name
        if not a.numel():
            continue
        spread = torch.stack([(one - b).abs() for one in near]).amax(0)
        # The terms are of the size of the gradients of the results, and may cancel.
        size = max(1.0, b.abs().max().item(), *(g.abs().max().item() for g in cotangents))
        excess = ((a.double() - b).abs() - spread).max().item()
        bound_of_rounding = tolerance(a.dtype, terms[name]) * size
        assert excess <= bound_of_rounding, f"{name}: {excess:.2e}, not {bound_of_rounding:.2e}"


def run_flow_operator(case: Case) -> None:
    rng = case.rng
    op: Operator = rng.choice(PLAIN)
    state, other = rng.choice(DTYPES)
    c = rng.choice([c for c in CHANNELS if c > 1 or not op.couples])
    shape = shape_of_a_state(rng, c)
    scale = rng.choice(SCALES)
    case.notes.append(f"{op.id} {scale if 'scale' in op.options else ''}")
    turned = rotation_of(case, c)
    made = {
        "x": lambda: case.leaf("x", *shape, dtype=state),
        "params": lambda: case.leaf("params", *params_shape(shape), dtype=other),
        "weight": lambda: turned.to(other).requires_grad_(),
        "bias": lambda: case.leaf("bias", c, dtype=other),
        "log_scale": lambda: case.leaf("log_scale", c, dtype=other),
    }
    inputs = {name: made[name]() for name in op.inputs}
    rest = {"scale": scale} if "scale" in op.options else {}
    inverse, call = op.inverse, op.call
    if op.id in EAGER and rng.random() < 0.5:
        call = eager_form(op, None)

    def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        return op.expected(*tensors, **rest)

    def magnitude(*tensors: Tensor) -> tuple[Tensor, ...]:
        # Every product and sum of the formula with positive terms. An inverse subtracts its shift.
        of = dict(zip(op.inputs, tensors, strict=True))
        sign = -1 if inverse else 1
        of["x"] = of["x"].abs()
        if op.id == "conv1x1_inverse":
            inverted = torch.linalg.inv(of["weight"]).abs()
            shifted = of["x"] + of["bias"].abs().view(-1, *(1,) * (of["x"].dim() - 2))
            return (conv1x1_ref(shifted, inverted, None),)
        if "weight" in of:
            of["weight"] = of["weight"].abs()
        if "bias" in of:
            of["bias"] = of["bias"].abs() * (1 if "weight" in op.inputs else sign)
        if "log_scale" in of:
            y, _ = op.expected(*of.values())
            return y, math.prod(shape[2:]) * of["log_scale"].abs().sum().expand(shape[0])
        if "params" not in of:
            return op.expected(*of.values())
        raw, shift = of["params"].chunk(2, 1)
        of["params"] = torch.cat([raw, sign * shift.abs()], 1)
        y, _ = op.expected(*of.values(), **rest)
        # s is rounded before its logarithm is taken.
        rounded = 1 if scale.kind in ("sigmoid", "softplus") else 0
        return y, (log_scale_ref(raw, scale).abs() + rounded).flatten(1).sum(1)

    got = call(*inputs.values(), **rest)[: len(op.results)]
    assert got[0].dtype == state
    assert got[0].stride() == torch.empty_like(dense_pixels(inputs["x"])).stride()
    n, p, summed_channels = shape[0], math.prod(shape[2:]), c if "weight" in op.inputs else 1
    terms = {"y": summed_channels, "sum": c * p, "x": summed_channels, "params": summed_channels}
    terms |= dict.fromkeys(("weight", "bias", "log_scale"), max(1, n * p * c))
    assert_matches(case, list(inputs), list(inputs.values()), got, reference, magnitude, terms)


def rotation_of(case: Case, channels: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.rng.randrange(2**31))
        weight = rotation(channels, torch.float64)
    return permuted(weight, case.rng)


def run_masked_penalty(case: Case) -> None:
    rng = case.rng
    dtype = rng.choice(DTYPES)[0]
    shape = shape_of_a_state(rng, rng.choice(CHANNELS))
    if rng.random() < 0.1:
        shape = (*shape, *rng.choices((1, 2, 3), k=3))
    names = ["input", "target"][: rng.choice((1, 2))]
    leaves = [case.leaf(name, *shape, dtype=dtype) for name in names]

    def broadcast(name: str) -> Tensor:
        axes = shape[rng.randrange(len(shape) + 1) :]
        small = [length if rng.random() < 0.6 else 1 for length in axes]
        return case.view(name, case.normal(*small).abs().clamp(max=1).to(rng.choice(DTYPES)[0]))

    mask = None if rng.random() < 0.2 else broadcast("mask")
    if mask is not None and rng.random() < 0.6:
        mask = case.view("mask", mask > 0.5)
    weight: Any = rng.choice((0, 0.3, 2)) if rng.random() < 0.5 else broadcast("weight").abs()
    rho, delta = rng.choice(RHOS), rng.choice((0.1, 1.0, 3))
    case.notes.append(f"masked_penalty {rho} {delta} weight {weight}")
    got = ops.masked_penalty_gaussian(*leaves, mask=mask, weight=weight, rho=rho, delta=delta)

    def reference(input: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        number, tensor = (1.0, weight) if isinstance(weight, Tensor) else (weight, None)
        return masked_penalty_ref(input, target, mask, tensor, number, rho, delta)

    terms = {"y": max(1, math.prod(shape[1:])), "sum": max(1, math.prod(shape[1:]))}
    terms |= {"input": 4, "target": 4}

    def magnitude(*tensors: Tensor) -> tuple[Tensor, ...]:
        penalty, gaussian = reference(*tensors)
        return penalty, -gaussian  # so that the gradients of both have the sign of e

    assert_matches(case, names, leaves, got, reference, magnitude, terms)


def run_logdet(case: Case) -> None:
    dtype = case.rng.choice((torch.float32, torch.float64))
    n, t = case.rng.choice((0, 1, 3, 40)), case.rng.choice((1, 2, 17, 1100))
    ledger, constant = case.leaf("ledger", n, t, dtype=dtype), case.leaf("constant", dtype=dtype)
    case.notes.append("accumulate_logdet")
    got = (ops.accumulate_logdet(ledger, constant),)
    assert_matches(
        case, ["ledger", "constant"], [ledger, constant], got,
        lambda ledger, constant: (ledger.sum(1) + constant,),
        lambda ledger, constant: (ledger.abs().sum(1) + constant.abs(),),
        {"y": t + 1, "constant": max(1, n)},
    )  # fmt: skip


RUNS = (run_flow_operator, run_spline, run_masked_penalty, run_logdet)


def failures() -> Iterator[str]:
    for index in cases():
        case = Case(index)
        run = case.rng.choices(RUNS, (12, 6, 12, 1))[0]
        try:
            run(case)
        except Exception as error:
            notes = "\n    ".join(case.notes)
            yield f"case {index}: {type(error).__name__}: {error}\n    {notes}"


@pytest.mark.parametrize("csrc", [True] if KERNELS_ON_CPU else [True, False])
def test_random_shapes_and_layouts(csrc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without csrc, the references stand in for its loops."""
    if not csrc:
        for module in ("cpu", "masked_penalty"):
            monkeypatch.setattr(sys.modules[f"mflow_kernels.ops.{module}"], "_C", None)
    found = list(failures())
    assert not found, f"{len(found)} of {len(cases())} cases failed\n" + "\n".join(found[:20])
