"""Measure training steps of other libraries' models: original, accelerated, and reversible.

The models are built as the documentation of their libraries does.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import originals
from benchmarks.harness.models import Spec
from benchmarks.harness.originals import Original, loss_of
from benchmarks.harness.session import Bench, Group, Measured, Missing, measured_row
from mflow_kernels.interop import accelerate
from mflow_kernels.interop.subclasses import is_accelerated

test_interop = measured_row
VARIANTS = ("original", "mflow_kernels, accelerated", "mflow_kernels, accelerated reversibly")


def specs_of(size: str, gpu: bool) -> list[tuple[str, Spec]]:
    """Return systems with their sizes. Glows have one level: steps on 12 channels at half the
    image's side. The side of vectors is 1."""
    if size == "tiny":
        glow = Spec(side=8, levels=1, steps=2, width=8, batch=2)
        vectors = {"levels": 1, "steps": 2, "batch": 2}
        return [
            *((library, glow) for library in GLOWS),
            ("FastFlow", glow._replace(channels=4)),
            ("CFLOW-AD", Spec(channels=4, side=1, width=8, **vectors)),
            *((s, Spec(channels=2, side=1, width=8, **vectors)) for s in ("two moons", *OF_NFLOWS)),
        ]
    glow = Spec(side=128, levels=1, width=256, batch=32) if gpu else Spec(levels=1)
    fast, vectors = {"levels": 1, "steps": 8}, {"side": 1, "levels": 1}
    return [
        *((library, glow) for library in GLOWS),
        *(("FastFlow", Spec(c, side, width=c // 2, **fast)) for c, side in FAST_FLOWS),
        *(("CFLOW-AD", Spec(c, steps=8, width=c, batch=256, **vectors)) for c in (256, 512)),
        ("two moons", Spec(2, steps=32, width=64, batch=512, **vectors)),
        *((s, Spec(3, steps=5, width=50, batch=200, **vectors)) for s in OF_NFLOWS),
    ]


FAST_FLOWS = [(64, 16), (256, 8), (512, 8)]  # channels and side


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


def fast_flow(spec: Spec) -> nn.Module:
    """The flow that FastFlow trains on one layer of features; `anomalib` has the same code."""
    framework, modules = map(importlib.import_module, ("FrEIA.framework", "FrEIA.modules"))

    def net(kernel: int, c_in: int, c_out: int) -> nn.Module:
        first = nn.Conv2d(c_in, c_in, kernel, padding="same")
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(c_in, c_out, kernel, padding="same"))

    inn = framework.SequenceINN(spec.channels, spec.side, spec.side)
    for i in range(spec.steps):
        subnet = partial(net, 1 if i % 2 else 3)
        inn.append(modules.AllInOneBlock, subnet_constructor=subnet, affine_clamping=2.0)
    return inn


class Conditioned(nn.Module):
    """CFLOW-AD's decoder of features at one position, given the encoding of that position."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        framework, modules = map(importlib.import_module, ("FrEIA.framework", "FrEIA.modules"))

        def net(c_in: int, c_out: int) -> nn.Module:
            return nn.Sequential(nn.Linear(c_in, 2 * c_in), nn.ReLU(), nn.Linear(2 * c_in, c_out))

        self.inn = framework.SequenceINN(spec.channels)
        for _ in range(spec.steps):
            self.inn.append(
                modules.AllInOneBlock,
                cond=0,
                cond_shape=(128,),
                subnet_constructor=net,
                affine_clamping=1.9,
                global_affine_type="SOFTPLUS",
            )
        self.register_buffer("condition", torch.randn(spec.batch, 128))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.inn(x, [self.condition])
        return z, log_det


def two_moons(spec: Spec) -> nn.Module:
    """The model of normflows' README."""
    nf = importlib.import_module("normflows")
    flows = []
    for _ in range(spec.steps):
        net = nf.nets.MLP([1, spec.width, spec.width, 2], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(2, mode="swap")]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)


class Posterior(nn.Module):
    """sbi's estimator `nsf` of parameters, given the data x."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        posterior_nn = importlib.import_module("sbi.neural_nets").posterior_nn
        self.register_buffer("theta", torch.randn(spec.batch, spec.channels))
        options = {"hidden_features": spec.width, "num_transforms": spec.steps}
        x = torch.randn(spec.batch, spec.channels)
        self.estimator = posterior_nn("nsf", **options)(self.theta, x)

    def forward_kld(self, x: Tensor) -> Tensor:
        return self.estimator.loss(self.theta, x).mean()


def glasflow_splines(spec: Spec) -> nn.Module:
    flows = importlib.import_module("glasflow.flows")
    return flows.CouplingNSF(spec.channels, spec.steps, n_neurons=spec.width, num_bins=8)


GLOWS: dict[str, Callable[[Spec], nn.Module]] = {
    "normflows": normflows_glow,
    "nflows": nflows_glow,
    "FrEIA": freia_inn,
}
BUILDERS: dict[str, Callable[[Spec], nn.Module]] = {
    **GLOWS,
    "FastFlow": fast_flow,
    "CFLOW-AD": Conditioned,
    "two moons": two_moons,
    "sbi": Posterior,
    "glasflow": glasflow_splines,
}
OF_NFLOWS = ("sbi", "glasflow")  # built of nflows' transforms, or of those of its fork


def build(library: str, spec: Spec, device: torch.device) -> Original:
    """Return an initialized original with perturbed parameters, and images or vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = BUILDERS[library](spec)
        except ImportError as error:
            raise Missing(f"{library} is not installed ({error})") from None
        x = spec.images(torch.device("cpu"))
        x = x.flatten(1) if spec.side == 1 else x
        loss_of(model, x)  # initializes actnorms
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape))
    size = x[0].numel()  # terms of the logdet are of order one and may cancel
    how = {"terms": max(spec.terms, spec.steps * size), "scale": size**0.5}
    return Original(model.to(device), (x.to(device),), spec.terms, how)


def variant_of(original: nn.Module, variant: str) -> nn.Module:
    model = copy.deepcopy(original)
    if variant != "original":
        accelerate(model, reversible="reversibly" in variant)
    return model


def measure(bench: Bench, library: str, spec: Spec, variants: Sequence[str] = VARIANTS,
            memory: bool = True) -> Measured:  # fmt: skip
    def about(model: nn.Module, variant: str) -> dict[str, Any]:
        left = not any(map(is_accelerated, model.modules())) and variant != "original"
        described = f"{spec}, left as it is" if left else str(spec)
        return {**spec._asdict(), "spec": described, "library": library}

    built = partial(build, library, spec)
    return originals.measure(bench, variants, built, variant_of, about, workers=2, memory=memory)


def groups(size: str, gpu: bool) -> Iterator[Group]:
    for library, spec in specs_of(size, gpu):
        measured = partial(measure, library=library, spec=spec)
        words = (library, *str(spec).split())
        yield Group(f"{library}, {spec}", words, VARIANTS, measured)
