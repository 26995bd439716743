"""Wrong arguments of models raise an error that names them."""

import math
from collections.abc import Callable

import pytest
import torch
from cases import normal
from torch import Tensor

from mflow_kernels import (
    ErrorBound,
    GaussianMixture,
    Glow,
    HierarchicalFlow,
    Jet,
    ManifoldFlow,
    ManifoldObjective,
    VectorFlow,
    WeightSchedule,
    estimate_intrinsic_dimension,
    latent_importance,
    local_dimension,
    manifold_mask_from_data,
)
from mflow_kernels.models.penalty_weight import Domain, Weight
from mflow_kernels.ops.penalty_functions import RHOS
from models.flows import Scale, hierarchy, image_flow

Rows = list[tuple[Callable[[], object], type[Exception], str]]
X = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
POINTS = torch.ones(2, 5, dtype=torch.float64)
NOT_FINITE = POINTS.where(torch.arange(10).view(2, 5) != 0, math.nan)
LINEAR = [0.01, 2.0, 0.02, 1.0, 0.015]
IMAGE, FINE, COARSE = (torch.zeros(2, *s) for s in ((1, 4, 4), (2, 2, 2), (8, 1, 1)))
SHAPES = r"z: expected latents of shapes \(\(2, 2, 2\), \(8, 1, 1\)\), got"
DTYPE = "expected the model's dtype float32, got"


def jet(**changes: object) -> Callable[[], Jet]:
    arguments = {"image_shape": (1, 8, 8), "patch": 2, "couplings": 2, "depth": 1, "width": 8}
    return lambda: Jet(**{**arguments, "heads": 2, **changes})


def classified(*names: str) -> ManifoldFlow:
    model = ManifoldFlow(VectorFlow(3, 1, 4, context_channels=2), 2)
    model.class_names = names
    return model


def masked(**arguments: object) -> Callable[[], ManifoldFlow]:
    return lambda: ManifoldFlow(Glow((1, 4, 4), 2, 1, 4), **arguments)


def ones(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.ones(shape, dtype=torch.bool) for shape in shapes)


def with_prior(prior: object) -> ManifoldFlow:
    return ManifoldFlow(VectorFlow(4, steps=1), 2, prior=prior)


def staged(*others: torch.nn.Module) -> HierarchicalFlow:
    return HierarchicalFlow([image_flow(dim=6), *others])


def dimension(x: Tensor = POINTS[:1, :3], scale: float = 1.0, **how: object) -> object:
    return local_dimension(VectorFlow(3, 1), x.float(), scale, **how)


def density(x: Tensor = X, dim: int = 5, **how: object) -> object:
    return image_flow(dim=dim).manifold_log_prob(x, **how)


def terms(x: Tensor = X, domain: Domain = "data", weight: Weight = 1.0) -> object:
    flow = image_flow()
    flow.objective = ManifoldObjective(domain, weight=weight)
    return flow.terms(x)


def without_gradient(call: Callable[[], object]) -> object:
    with torch.no_grad():
        return call()


FLOWS: Rows = [
    *((lambda a=a: Glow(*a), error, words) for a, error, words in (
        (((1, 28, 28), 3, 1, 4), ValueError, r"2 \*\* levels = 8, got 28x28"),
        (((1, 8, 6), 2, 1, 4), ValueError, "image_shape: .* = 4, got 8x6"),
        (((1, 0, 8), 1, 1, 4), ValueError, "H: expected at least 1, got 0"),
        (((8, 8), 1, 1, 4), ValueError, r"image_shape: expected \(C, H, W\), got \(8, 8\)"),
        ((8, 1, 1, 4), ValueError, r"image_shape: expected \(C, H, W\), got 8"),
        (((0, 8, 8), 1, 1, 4), ValueError, "C: expected at least 1, got 0"),
        (((1, 8, 8), 0, 1, 4), ValueError, "levels: expected at least 1, got 0"),
        (((1, 8, 8), 32, 1, 4), ValueError, "levels: expected at most 31, got 32"),
        (((1, 8, 8), 1, 0, 4), ValueError, "steps: expected at least 1, got 0"),
        (((1, 8, 8), 1, 1, 0), ValueError, "width: expected at least 1, got 0"),
        (((1, 8, 8.0), 1, 1, 4), TypeError, "W: expected a whole number, got float"),
    )),
    *((lambda s=s: Glow((1, 4, 4), 1, 1, 2)(normal(*s)), ValueError, r"x: .*\(N, 1, 4, 4\), got \(")
      for s in ((2, 1, 4, 6), (2, 3, 4, 4), (1, 4, 4), (2, 16))),
    *((call, ValueError, f"context: expected {words}") for call, words in (
        (lambda: classified().sample(1, context="circle"), "no name without class_names, got 'cir"),
        (lambda: classified().distribution("circle"), "no name without class_names, got 'circle'"),
        (lambda: classified("circle", "square").sample(1, context="cube"),
         "one of circle, square, got 'cube'"),
        (lambda: classified("circle", "square").sample(2, context=["circle", "cube"]),
         "one of circle, square, got 'cube'"),
        (lambda: classified("circle", "square").sample(3, context=["circle", "square"]),
         "one class for each of 3 samples, got"),
    )),
    (lambda: VectorFlow(3, 1, 4)(normal(2, 16)), ValueError, r"x: .*\(N, 3\), got \(2, 16\)"),
    (lambda: VectorFlow(1, 1, 4), ValueError, "dim: expected at least 2, got 1"),
    (lambda: VectorFlow(3, 0, 4), ValueError, "steps: expected at least 1, got 0"),
    (lambda: VectorFlow(3, 1, 0), ValueError, "width: expected at least 1, got 0"),
    (lambda: VectorFlow(3, 1.0, 4), TypeError, "steps: expected a whole number, got float"),
    (jet(image_shape=(8, 8)), ValueError, r"image_shape: expected \(C, H, W\), got \(8, 8\)"),
    (jet(image_shape=(1, 8, 6)), ValueError, "width divisible by 2 .* = 4, got 8x6"),
    (jet(image_shape=(1, 7, 8)), ValueError, "height divisible by patch = 2 .* got 7x8"),
    (jet(patch=3), ValueError, "patch: expected a power of 2, got 3"),
    (jet(patch=0), ValueError, "patch: expected at least 1, got 0"),
    (jet(patch=1), ValueError, "patch: expected at least 2 for images with one channel, got 1"),
    (jet(couplings=0), ValueError, "couplings: expected at least 1, got 0"),
    (jet(depth=1.0), TypeError, "depth: expected a whole number, got float"),
    (jet(heads=3), ValueError, "width: expected a multiple of heads = 3, got 8"),
    (jet(context_channels=-1), ValueError, "context_channels: expected at least 0, got -1"),
    (lambda: jet()()(normal(2, 1, 8, 6)), ValueError, r"x: expected shape \(N, 1, 8, 8\), got \("),
    *((lambda c=c: jet(context_channels=3)()(normal(2, 1, 8, 8), *c), error, f"context: {words}")
      for c, error, words in (
        ((), TypeError, r"expected classes, vectors \(N, 3\) or maps"),
        ((torch.tensor([1, 3]),), ValueError, "expected classes from 0 to 2, got 1 to 3"),
    )),
    *((lambda n=n, s=s: getattr(Glow((1, 4, 4), 2, 1, 2), n)(s), error, words)
      for n, s, error, words in (
        ("inverse", (COARSE, FINE), ValueError, SHAPES),
        ("inverse", (FINE,), ValueError, SHAPES),
        ("inverse", (FINE[:1], COARSE), ValueError, r"z\[0\]: expected shape \(2, 2, 2, 2\), got"),
        ("inverse", FINE, TypeError, "z: expected a tuple of 2 latents, got Tensor"),
        ("inverse", (FINE, COARSE.double()), TypeError, rf"z\[1\]: {DTYPE} float64"),
        ("inverse", (FINE, COARSE.bfloat16()), TypeError, rf"z\[1\]: {DTYPE} bfloat16"),
        ("forward", IMAGE.byte(), TypeError, r"x: expected dtype float.*got uint8"),
        ("forward", IMAGE.numpy(), TypeError, r"x: expected a torch.Tensor, got ndarray"),
        ("forward", IMAGE.to("meta"), ValueError, "x: expected the model's device cpu, got meta"),
        ("initialize", IMAGE.double(), TypeError, f"x: {DTYPE} float64"),
        ("initialize", IMAGE.half(), TypeError, f"x: {DTYPE} float16"),
    )),
]  # fmt: skip

FINE_AND_COARSE = (2, 2, 2), (8, 1, 1)
MANIFOLDS: Rows = [
    (masked(), ValueError, "manifold_dim, mask: expected at least one of them, got neither"),
    (masked(manifold_dim=2, mask=(torch.eye(2) > 0, *ones((8, 1, 1)))), ValueError,
     "the same dimension, got manifold_dim=2 and a mask with 12"),
    (masked(manifold_dim=2.5), TypeError, "manifold_dim: expected a whole number, got float"),
    (masked(manifold_dim=0), ValueError, "manifold_dim: expected 1 to 16, got 0"),
    (masked(manifold_dim=17), ValueError, "manifold_dim: expected 1 to 16, got 17"),
    (masked(mask=ones((2, 2, 2))), ValueError, r"mask: .*got \(\(2, 2, 2\),\)"),
    (masked(mask=ones((2, 3), (8, 1, 1))), ValueError, r"mask: .*got \(\(2, 3\), \(8"),
    (masked(mask=ones((8, 1, 1))[0]), TypeError, "mask: expected a tuple of .*got Tensor"),
    (masked(mask=tuple(m.float() for m in ones(*FINE_AND_COARSE))), TypeError,
     "mask: expected dtype bool, got .*float32"),
    (lambda: ManifoldFlow(torch.nn.Linear(2, 2), 1), TypeError, "flow: .*got Linear"),
    (lambda: ManifoldFlow(VectorFlow(2, 1, 2), 1, objective="data"), TypeError,
     "objective: expected a ManifoldObjective, got str"),
    (lambda: image_flow().decode(normal(2, 4)), ValueError, r"u: .*\(N, 5\), got \(2, 4\)"),
    (lambda: image_flow().decode(torch.zeros(1, 5).long()), TypeError, "u: .*got int64"),
    (lambda: image_flow().sample(2.0), TypeError, "n: expected a whole number, got float"),
    (lambda: image_flow().lift(X.new_zeros(1, 5), temperature=-1.0), ValueError,
     "temperature: expected a finite number >= 0, got"),
    (lambda: image_flow().inpaint(X, torch.ones(4, 4), 0.1), TypeError, "known: .*dtype bool, got"),
    (lambda: image_flow().inpaint(X, *ones((3,)), 0.1), ValueError, "known: .*broadcasts to"),
    (lambda: image_flow().inpaint(X, *ones((4,)), 0.0), ValueError, "deviation: .*> 0, got 0"),
    *((lambda call=call, make=make: call(make()), error, words)
      for make in (image_flow, lambda: hierarchy(6, 4)) for call, error, words in (
        (lambda m: m.interpolate(X, X, 1), ValueError, "steps: expected at least 2, got 1"),
        (lambda m: m.interpolate(X, X, 2.0), TypeError, "steps: .*whole number, got float"),
        (lambda m: m.interpolate(X, X[:2], 3), ValueError,
         r"x1: expected the shape of x0 \(3, 1, 4, 4\), got \(2,"),
        (lambda m: m.ood_score(X), TypeError, r"got none; \w+Flow.deviation\(training_data\)"),
        *((lambda m, d=d: m.ood_score(X, d), ValueError, "deviation: .*finite number > 0, got")
          for d in (0.0, -1.0, math.inf, math.nan)),
        (lambda m: m.deviation(X[:0]), ValueError, "x: expected at least one sample, got shape"),
        *((lambda m, n=n: getattr(m, n)(X.long()), TypeError, "x: expected dtype .* got int64")
          for n in ("encode", "log_prob", "distance", "manifold_log_prob")),
    )),
    (lambda: HierarchicalFlow([]), ValueError, "stages: expected at least one ManifoldFlow"),
    (lambda: staged(VectorFlow(6, 1, 4)), TypeError, r"stages\[1\]: .*got VectorFlow"),
    (lambda: staged(ManifoldFlow(VectorFlow(5, 1, 4), 2)), ValueError,
     r"stages\[1\]: expected a flow on \(6,\), .* got one on \(5,\)"),
    *((lambda call=call, n=n: getattr(hierarchy(6, 4), call)(X, stages=n), ValueError,
       f"stages: expected .* 2, got {n}")
      for call in ("encode", "project", "log_prob") for n in (-1, 3)),
    *((lambda call=call, n=n: getattr(hierarchy(6, 4), call)(X, stage=n), ValueError,
       f"stage: expected 0 to 1, got {n}") for call in ("terms", "initialize") for n in (-1, 2)),
    (lambda: hierarchy(6, 4).log_prob(X, stages=0), ValueError, "stages: expected 1 to 2, got 0"),
    (lambda: hierarchy(6, 4).sample(2, stages=0), ValueError, "stages: expected 1 to 2, got 0"),
    (lambda: hierarchy(6, 4).encode(X, stages=1.0), TypeError, "stages: .*got float"),
    (lambda: GaussianMixture(3, 0), ValueError, "components: expected"),
    (lambda: GaussianMixture(0, 3), ValueError, "dim: expected"),
    (lambda: GaussianMixture(3, 2).log_prob(torch.zeros(2, 4)), ValueError, "u: expected shape"),
    (lambda: GaussianMixture(3, 2).fit(torch.zeros(1, 3)), ValueError, "at least 2 samples"),
    (lambda: GaussianMixture(3, 2).fit(torch.full((2, 3), torch.nan)), ValueError, "finite"),
    (lambda: GaussianMixture(3, 2).sample(0), ValueError, "n: expected"),
    (lambda: with_prior(GaussianMixture(3, 2)), ValueError, "prior: expected the 2 dimensions"),
    (lambda: with_prior(torch.zeros(3)), TypeError, "prior: expected a GaussianMixture"),
]  # fmt: skip

NUMBERS = "finite numbers >= 0, not all 0, got numbers in"
LATENT = "a number or a map in the latent domain, got"
WEIGHTS = [
    ("data", 0.0, ValueError, "a finite number > 0, got 0.0"),
    ("data", math.inf, ValueError, "a finite number > 0, got inf"),
    ("data", None, TypeError, "a number, got NoneType"),
    ("data", "std", ValueError, "a number, a map or 'variance', got 'std'"),
    ("latent", "variance", ValueError, f"{LATENT} 'variance': the weight"),
    ("latent", ErrorBound(0.1), ValueError, f"{LATENT} ErrorBound: the weight"),
    ("latent", WeightSchedule(2, 1, 3), ValueError, f"{LATENT} WeightSchedule: the weight"),
    ("latent", torch.ones(3), TypeError, "a tuple .* latent domain, got a Tensor"),
    ("latent", (torch.tensor([1.0, 0.0]),), ValueError, "finite numbers > 0, .* .0.0, 1.0."),
    ("data", (torch.ones(3),), TypeError, "one map .* in the data domain, got a tuple"),
    ("data", torch.tensor([-1.0, 0.0]), ValueError, f"{NUMBERS} .-1.0, 0.0."),
    ("data", torch.zeros(3), ValueError, f"{NUMBERS} .0.0, 0.0."),
    ("data", torch.tensor([1.0, math.nan]), ValueError, f"{NUMBERS} .nan, nan."),
    ("data", torch.ones(0), ValueError, "a map that is not empty"),
    ("data", torch.ones(3).int(), TypeError, ".*got int32"),
]
OBJECTIVES: Rows = [
    *((lambda d=domain, w=weight: ManifoldObjective(d, weight=w), error,
       rf"^weight(\[0\])?: expected {words}") for domain, weight, error, words in WEIGHTS),
    (lambda: ManifoldObjective("pixel"), ValueError, "domain: .* latent, data, got 'pixel'"),
    (lambda: ManifoldObjective(rho="l3"), ValueError, f"rho: .* {', '.join(RHOS)}, got 'l3'"),
    (lambda: ManifoldObjective(delta=0), ValueError, "delta: .* finite number > 0, got 0"),
    (lambda: ManifoldObjective(sigma=math.nan), ValueError, "sigma: .* number > 0, got nan"),
    (lambda: image_flow(ManifoldObjective(weight=torch.ones(3, 4))), ValueError,
     r"weight: .* broadcasts to \(1, 4, 4\), got \(3, 4\)"),
    (lambda: terms(domain="latent", weight=(torch.ones(2, 1, 1),)), ValueError,
     "weight: expected one map for each of 2 latents, got 1"),
    (lambda: terms(domain="latent", weight=(torch.ones(2, 1, 1),) * 2), ValueError,
     r"weight\[1\]: .* broadcasts to \(8, 1, 1\), got \(2, 1, 1\)"),
    *((lambda x=x, d=d: terms(x, d), error, words)
      for d in ("latent", "data") for x, error, words in (
        (X.long(), TypeError, "x: expected dtype .* got int64"),
        (X[:0], ValueError, r"x: expected at least one sample, got shape \(0, 1, 4"),
        (X[..., :2], ValueError, r"x: expected shape \(N, 1, 4, 4\), got \(3, 1, 4, 2\)"),
    )),
    (lambda: ErrorBound(0.0), ValueError, "error: expected a finite number > 0, got 0.0"),
    (lambda: ErrorBound(0.1, math.inf), ValueError, "start: expected a finite number > 0"),
    (lambda: WeightSchedule(1, -1, 5), ValueError, "end: expected a finite number > 0, got -1"),
    (lambda: WeightSchedule(1, 2, 0), ValueError, "steps: expected at least 1, got 0"),
    (lambda: WeightSchedule(1, 2, 0.6), TypeError, "steps: expected a whole number, got float"),
]  # fmt: skip

FINITE = "x: expected data that the flow maps to finite numbers"
DIAGNOSTICS: Rows = [
    *((lambda s=s: dimension(scale=s), ValueError, "scale: expected a finite number > 0")
      for s in (0.0, -1.0, math.inf, math.nan)),
    (lambda: dimension(POINTS[:0, :3]), ValueError, "x: expected at least one sample"),
    (lambda: local_dimension(image_flow(), X[:0], 1.0), ValueError, "x: .*at least one sample"),
    (lambda: dimension(max_bytes=71), ValueError, "max_bytes: expected at least 72"),
    (lambda: dimension(method="random"), ValueError, "method: expected"),
    (lambda: dimension(method="hutchinson", probes=1), ValueError, "probes: expected"),
    *((lambda dim=dim: density(dim=dim, method="exakt"), ValueError,
       "method: expected one of exact, hutchinson, got 'exakt'")
      for dim in (5, 16)),  # also if no method is needed
    (lambda: density(method="hutchinson", probes=1), ValueError, "probes: .*at least 2, got 1"),
    (lambda: density(method="hutchinson", iterations=0), ValueError, "iterations: .*got 0"),
    (lambda: density(max_bytes=1000), ValueError,
     "at least 1,920 for .* 16 x 5 .*3 at once.*got 1,000; method='hutchinson' estimates"),
    (lambda: without_gradient(lambda: density(max_bytes=639)), ValueError,
     "at least 640 for .*one at a time.*got 639"),
    (lambda: manifold_mask_from_data(Scale(LINEAR), POINTS, 6), ValueError,
     "manifold_dim: expected 1 to 5, got 6"),
    (lambda: latent_importance(Scale(LINEAR), POINTS, probes=0), ValueError,
     "probes: expected at least 1, got 0"),
    *((lambda call=call: call(Scale(LINEAR), POINTS[:0]), ValueError,
       r"x: expected at least one sample, got shape \(0, 5\)")
      for call in (latent_importance, estimate_intrinsic_dimension)),
    (lambda: estimate_intrinsic_dimension(Scale(LINEAR), POINTS, max_bytes=199), ValueError,
     "max_bytes: .* least 200 for .* 5 x 5 .*got 199"),
    (lambda: estimate_intrinsic_dimension(Scale([1.0]), POINTS[:, :1]), ValueError,
     "flow: expected two dimensions or more, got 1"),
    (lambda: manifold_mask_from_data(Scale(LINEAR), NOT_FINITE, 2), ValueError, FINITE),
    (lambda: estimate_intrinsic_dimension(Scale([1.0, math.inf]), POINTS[:, :2]), ValueError,
     FINITE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "words"), [*FLOWS, *MANIFOLDS, *OBJECTIVES, *DIAGNOSTICS]
)
def test_arguments(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
