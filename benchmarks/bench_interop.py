"""Measure training steps of other libraries' models: original, accelerated, and reversible.

The models are built as the documentation of their libraries does.
"""

import copy
import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.harness.measurements import REPLAY, Call, interleaved, peak_of_step
from benchmarks.harness.models import Spec, assert_gradient_close
from benchmarks.harness.processes import in_fresh_processes
from benchmarks.harness.session import Bench, Measured, Missing, size_and_gpu, slug
from mflow_kernels.interop import accelerate
from mflow_kernels.testing import assert_close

ROUNDS = 7
SECONDS_PER_PEAK = 120  # time limit of a process that measures peak memory
VARIANTS = ("original", "mflow_kernels, accelerated", "mflow_kernels, accelerated reversibly")


def spec_of(size: str, gpu: bool) -> Spec:
    """Return one level: steps on 12 channels at half the image's side."""
    if size == "tiny":
        return Spec(side=8, levels=1, steps=2, width=8, batch=2)
    return Spec(side=128, levels=1, width=256, batch=32) if gpu else Spec(levels=1)


def normflows_glow(spec: Spec) -> nn.Module:
    nf = importlib.import_module("normflows")
    flows = [nf.flows.GlowBlock(12, spec.width) for _ in range(spec.steps)]
    base = nf.distributions.DiagGaussian((12, spec.side // 2, spec.side // 2))
    return nf.NormalizingFlow(base, [*flows, nf.flows.Squeeze()])


def nflows_glow(spec: Spec) -> nn.Module:
    nt = importlib.import_module("nflows.transforms")
    nets = importlib.import_module("nflows.nn.nets")
    net = partial(nets.ConvResidualNet, hidden_channels=spec.width, num_blocks=1)
    mask = torch.tensor([-1] * 6 + [1] * 6)
    steps = [nt.SqueezeTransform()]
    for _ in range(spec.steps):
        steps += [nt.ActNorm(12), nt.OneByOneConvolution(12), nt.AffineCouplingTransform(mask, net)]
    return nt.CompositeTransform(steps)


def freia_inn(spec: Spec) -> nn.Module:
    framework = importlib.import_module("FrEIA.framework")
    modules = importlib.import_module("FrEIA.modules")

    def net(c_in: int, c_out: int) -> nn.Module:
        width = spec.width
        first, last = nn.Conv2d(c_in, width, 3, padding=1), nn.Conv2d(width, c_out, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), last)

    inn = framework.SequenceINN(3, spec.side, spec.side)
    inn.append(modules.IRevNetDownsampling)
    for _ in range(spec.steps):
        inn.append(modules.AllInOneBlock, subnet_constructor=net, permute_soft=True)
    return inn


BUILDERS: dict[str, Callable[[Spec], nn.Module]] = {
    "normflows": normflows_glow,
    "nflows": nflows_glow,
    "FrEIA": freia_inn,
}


def build(library: str, spec: Spec, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return an initialized original with perturbed parameters, and images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = BUILDERS[library](spec)
        except ImportError as error:
            raise Missing(f"{library} is not installed ({error})") from None
        x = spec.images(torch.device("cpu"))
        loss_of(model, x)  # initializes actnorms
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape))
    return model.to(device), x.to(device)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the negative log-likelihood per image in nats, without its constant."""
    if hasattr(model, "forward_kld"):  # a model of normflows includes the base distribution
        return model.forward_kld(x)
    z, logdet = model(x)
    return (z.flatten(1).square().sum(1) / 2 - logdet).mean()


def variant_of(original: nn.Module, variant: str) -> nn.Module:
    model = copy.deepcopy(original)
    if variant != "original":
        report = accelerate(model, reversible="reversibly" in variant)
        assert report.replaced, str(report)
    return model


def train(model: nn.Module, x: Tensor) -> None:
    """Run forward and backward, without the optimizer step, which is the same for all."""
    model.zero_grad()
    loss_of(model, x).backward()


def check(model: nn.Module, original: nn.Module, x: Tensor, spec: Spec, name: str) -> None:
    """Assert that loss and gradient of the images equal those of the original in float64."""
    x, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    loss, want = loss_of(model, x), loss_of(copy.deepcopy(original).double(), wide)
    loss.backward()
    want.backward()
    size = x[0].numel()  # terms of the logdet are of order one and may cancel over pixels
    terms = max(spec.terms, spec.steps * size)
    assert_close(loss.detach(), want.detach(), terms=terms, scale=size**0.5, name=f"{name}: loss")
    assert x.grad is not None
    assert wide.grad is not None
    assert_gradient_close(x.grad, wide.grad, spec.terms, name)


def step_peak(job: tuple[str, Spec, str, str, int]) -> int:
    library, spec, variant, device_name, threads = job
    torch.set_num_threads(threads)
    original, x = build(library, spec, torch.device(device_name))
    model = variant_of(original, variant)
    return peak_of_step(model, partial(train, model, x), x.device)


def measure(bench: Bench, library: str, spec: Spec) -> Measured:
    measured = Measured()
    original, x = build(library, spec, bench.device)
    calls: dict[str, Call] = {}
    for variant in VARIANTS:
        try:
            model = variant_of(original, variant)
            check(model, original, x, spec, f"{library}, {variant}")
        except Exception as error:
            measured.fault(variant, error)
            continue
        calls[variant] = partial(train, model, x)
        measured.extra[variant] = {**spec._asdict(), "spec": str(spec), "library": library}
    if bench.check_only:
        return measured
    prepares = {variant: (lambda call=call: call) for variant, call in calls.items()}
    measured.seconds = interleaved(prepares, bench.rounds(ROUNDS), bench.device, bench.clock)
    jobs = [(library, spec, variant, str(bench.device), bench.threads) for variant in calls]
    measured.add_peaks(calls, in_fresh_processes(step_peak, jobs, 2, SECONDS_PER_PEAK))
    return measured


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    spec = spec_of(*size_and_gpu(metafunc.config))
    rows = [
        pytest.param(spec, library, variant, id=slug(library, *str(spec).split(), variant))
        for library in BUILDERS for variant in VARIANTS
    ]  # fmt: skip
    metafunc.parametrize(("spec", "library", "variant"), rows)


@pytest.mark.benchmark(timer=REPLAY)
def test_interop(
    bench: Bench, benchmark: BenchmarkFixture, spec: Spec, library: str, variant: str
) -> None:
    benchmark.group = f"{library}, {spec}"
    bench.record(benchmark, ("interop", library), variant, lambda: measure(bench, library, spec))
