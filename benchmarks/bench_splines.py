"""Compare flows of spline couplings on vectors with the peers: the same networks and weights.

A flow has six couplings, and reverses the features between them. An accelerated flow is the peer's
own, after `accelerate`. "networks alone" runs the flows'
networks, forward and backward, on states that are given: no flow with these networks can be
faster.
"""

import copy
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness.measurements import Call
from benchmarks.harness.originals import train
from benchmarks.harness.session import Bench, Group, Measured, Missing, measured_row
from mflow_kernels import SplineCoupling
from mflow_kernels.interop import accelerate
from mflow_kernels.testing import assert_close

test_spline_flow = measured_row
ROUNDS = 7
COUPLINGS, BINS, BOUND = 6, 8, 3.0
TASKS = ("train", "forward", "sample")


class Vectors(NamedTuple):
    dims: int
    batch: int
    width: int

    def __str__(self) -> str:
        return f"{self.dims} dims, batch {self.batch:,}, width {self.width}"


def specs(size: str) -> list[Vectors]:
    if size == "tiny":
        return [Vectors(5, 4, 8)]
    return [Vectors(10, 256, 64), Vectors(64, 128, 64), Vectors(6, 1024, 128)]


Build = Callable[[list[nn.Module], Vectors], nn.Module]


class Flow(nn.Module):
    """Couplings with `layer(x)` and `layer.inverse(z)`; after each, the features are reversed."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, logdet = layer(x)
            x, total = x.flip(1), total + logdet
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = self._inverse(layer, z.flip(1))
        return z

    @staticmethod
    def _inverse(layer: Any, z: Tensor) -> Tensor:
        return layer.inverse(z)[0]


class ZukoFlow(Flow):
    """Couplings of zuko, which build a transform at each call."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, logdet = layer().call_and_ladj(x)
            x, total = x.flip(1), total + logdet
        return x, total

    @staticmethod
    def _inverse(layer: Any, z: Tensor) -> Tensor:
        return layer().inv(z)


def networks(spec: Vectors) -> list[nn.Module]:
    nets = importlib.import_module("nflows.nn.nets")
    c_a = spec.dims // 2
    outputs = (spec.dims - c_a) * (3 * BINS - 1)
    return [nets.ResidualNet(c_a, outputs, spec.width, num_blocks=2) for _ in range(COUPLINGS)]


def fused(nets: list[nn.Module], spec: Vectors, **options: Any) -> nn.Module:
    made: list[nn.Module] = [
        SplineCoupling(spec.dims, net, bins=BINS, bound=BOUND, **options) for net in nets
    ]
    return Flow(made)


def piecewise(module: str, name: str, nets: list[nn.Module], spec: Vectors) -> nn.Module:
    """Couplings of nflows or normflows, with networks of nflows."""
    coupling = getattr(importlib.import_module(module), name)
    mask = torch.arange(spec.dims) >= spec.dims // 2
    return Flow([
        coupling(mask.int(), lambda *_, net=net: net, num_bins=BINS, tails="linear",
                 tail_bound=BOUND)
        for net in nets
    ])  # fmt: skip


def accelerated(build: Build, nets: list[nn.Module], spec: Vectors) -> nn.Module:
    """A peer's flow after `accelerate`, which replaces all its couplings."""
    flow = build(nets, spec)
    report = accelerate(flow)
    if len(report.replaced) != COUPLINGS:
        raise ValueError(str(report))
    return flow


def compiled(nets: list[nn.Module], spec: Vectors) -> nn.Module:
    """nflows under `torch.compile`, whose graph breaks where a mask of elements decides."""
    torch.compiler.reset()
    flow = NFLOWS(nets, spec)
    flow.compile()
    return flow


def zuko_flow(nets: list[nn.Module], spec: Vectors) -> nn.Module:
    """Couplings of zuko, with networks of nflows."""
    lazy = importlib.import_module("zuko.flows.coupling").GeneralCouplingTransform
    spline = importlib.import_module("zuko.transforms").MonotonicRQSTransform
    layers: list[nn.Module] = []
    for net in nets:
        layers.append(
            lazy(
                spec.dims,
                mask=torch.arange(spec.dims) < spec.dims // 2,
                univariate=partial(spline, bound=BOUND),
                shapes=[(BINS,), (BINS,), (BINS - 1,)],
            )
        )
        layers[-1].hyper = net
    return ZukoFlow(layers)


NFLOWS = partial(piecewise, "nflows.transforms", "PiecewiseRationalQuadraticCouplingTransform")
NORMFLOWS = partial(
    piecewise, "normflows.flows.neural_spline.coupling", "PiecewiseRationalQuadraticCoupling"
)

# Each flow, and the peer in float64 that it must agree with.
VARIANTS: dict[str, tuple[Build, str]] = {
    "mflow_kernels": (lambda nets, spec: fused(nets, spec, temperature=spec.width**0.5), "nflows"),
    "mflow_kernels, zuko's form": (
        lambda nets, spec: fused(nets, spec, kind="exp", min_width=0.0, min_height=0.0),
        "zuko",
    ),
    "nflows": (NFLOWS, "nflows"),
    "normflows": (NORMFLOWS, "nflows"),
    "zuko": (zuko_flow, "zuko"),
    "nflows, compiled": (compiled, "nflows"),
    "accelerated nflows": (partial(accelerated, NFLOWS), "nflows"),
    "accelerated normflows": (partial(accelerated, NORMFLOWS), "nflows"),
    "accelerated zuko": (partial(accelerated, zuko_flow), "zuko"),
}
ALONE = "networks alone"
COMPILED = "nflows, compiled"
NAMES = (*VARIANTS, ALONE)


def task_of(task: str, flow: Any, x: Tensor) -> Call:
    if task == "train":
        return partial(train, flow, x)
    return torch.no_grad()(partial(flow if task == "forward" else flow.inverse, x))


def alone(task: str, nets: nn.ModuleList, x: Tensor) -> Call:
    """All networks, each on the half of x that it would read.

    The first one's input needs no gradient.
    """
    x_a = x[:, : x.shape[1] // 2].contiguous()
    given = [x_a.clone().requires_grad_(task == "train" and i > 0) for i in range(len(nets))]
    with torch.no_grad():
        cotangent = torch.randn_like(nets[0](x_a))

    def step() -> None:
        nets.zero_grad()
        for net, one in zip(nets, given, strict=True):
            net(one).backward(cotangent)

    def run() -> None:
        for net, one in zip(nets, given, strict=True):
            net(one)

    return step if task == "train" else torch.no_grad()(run)


def check(flow: Any, exact: Any, x: Tensor, name: str) -> None:
    """Assert that results and gradients equal those of a float64 flow.

    A coupling rounds each element to the interval's precision, and its log-slope by eps times the
    bins' steepness; six of them add up. Peers do not use the bins' sizes but differences of knots.
    """
    terms = COUPLINGS * BINS**2
    wide = x.double()
    z, logdet = flow(x)
    want, want_logdet = exact(wide)
    assert_close(z, want, terms=terms, name=f"{name}: z")
    assert_close(logdet, want_logdet, terms=terms * x.shape[1], name=f"{name}: logdet")
    with torch.no_grad():
        assert_close(flow.inverse(z), wide, terms=4 * terms, name=f"{name}: inverse")
    train(flow, x)
    train(exact, wide)
    for (key, got), (_, grad) in zip(
        flow.named_parameters(), exact.named_parameters(), strict=True
    ):
        assert got.grad is not None
        assert grad.grad is not None
        assert_close(got.grad, grad.grad, terms=terms * len(x), name=f"{name}: d {key}")


def measure(bench: Bench, spec: Vectors, task: str, names: Sequence[str] = NAMES) -> Measured:
    measured = Measured()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            nets = networks(spec)
        except ImportError as error:
            raise Missing(f"nflows is not installed ({error})") from None
        x = torch.randn(spec.batch, spec.dims).to(bench.device)

    def make(variant: str) -> Callable[[], Call]:
        about: dict[str, Any] = {**spec._asdict(), "spec": str(spec), "task": task}
        measured.extra[variant] = about
        if variant == ALONE:
            call = alone(task, nn.ModuleList(copy.deepcopy(nets)).to(bench.device), x)
            return lambda: call
        build, peer = VARIANTS[variant]
        if variant == COMPILED and (task != "train" or bench.size == "tiny"):
            raise Missing("it is compiled for training steps only, not if tiny")
        began = time.perf_counter()
        try:
            flow = build(copy.deepcopy(nets), spec).to(bench.device)
            exact = VARIANTS[peer][0](copy.deepcopy(nets), spec).to(bench.device).double()
        except ImportError as error:
            raise Missing(f"{peer} is not installed ({error})") from None
        if variant == COMPILED:
            train(flow, x)
            about["compile_s"] = time.perf_counter() - began
        try:
            check(flow, exact, x, variant)
        except AssertionError as error:
            if variant != COMPILED:
                raise
            about["disagrees"] = str(error)  # wrong gradients, in torch 2.13
        return lambda: task_of(task, flow, x)

    measured.compare(bench, names, make, ROUNDS)
    return measured


def groups(size: str, gpu: bool) -> Iterator[Group]:
    for spec in specs(size):
        for task in TASKS:
            measured = partial(measure, spec=spec, task=task)
            yield Group(f"spline flow, {task}, {spec}", (str(spec), task), NAMES, measured)
