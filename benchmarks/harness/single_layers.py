"""Each layer alone, as a drop-in user calls it: this package's, plain torch's and the peers'.

All of them share weights and networks. The plain layers are the few lines that one writes without a
package; the 1x1 convolution has a full matrix.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.measurements import Call
from benchmarks.harness.models import Spec, assert_gradient_close, nll
from benchmarks.harness.peer_models import (
    BUILDERS,
    Adapted,
    backwards,
    first_of,
    normflows_net,
    package,
)
from benchmarks.harness.plain_glow import Coupling, with_torch_networks
from benchmarks.harness.session import Bench, Measured
from mflow_kernels import ActNorm, FlowStep, InvertibleConv1x1, SplineCoupling
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.ops.spline import spline_ref
from mflow_kernels.testing import assert_close

LAYERS = ("ActNorm", "InvertibleConv1x1", "AffineCoupling", "FlowStep", "SplineCoupling")
BINS = 8


class Size(NamedTuple):
    channels: int
    side: int
    width: int
    batch: int

    def __str__(self) -> str:
        return f"B={self.batch} {self.channels}x{self.side}x{self.side} W={self.width}"


class PlainActNorm(nn.Module):
    def __init__(self, layer: ActNorm) -> None:
        super().__init__()
        self.bias = nn.Parameter(layer.bias.detach().clone().view(1, -1, 1, 1))
        self.log_scale = nn.Parameter(layer.log_scale.detach().clone().view(1, -1, 1, 1))

    def _logdet(self, x: Tensor) -> Tensor:
        return (x.shape[2] * x.shape[3] * self.log_scale.sum()).expand(len(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + self.bias) * self.log_scale.exp(), self._logdet(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp() - self.bias, -self._logdet(z)


class PlainConv1x1(nn.Module):
    def __init__(self, layer: InvertibleConv1x1) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight().detach().clone())

    def _logdet(self, x: Tensor) -> Tensor:
        pixels = x.shape[2] * x.shape[3]
        return (pixels * torch.linalg.slogdet(self.weight).logabsdet).expand(len(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, self.weight[:, :, None, None]), self._logdet(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(z, torch.linalg.inv(self.weight)[:, :, None, None]), -self._logdet(z)


class PlainStep(nn.Module):
    def __init__(self, layer: FlowStep) -> None:
        super().__init__()
        parts = (
            PlainActNorm(layer.actnorm),
            PlainConv1x1(layer.conv),
            plain_coupling(layer.coupling),
        )
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for part in self.parts:
            x, change = part(x)
            logdet = logdet + change
        return x, logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logdet = z.new_zeros(len(z))
        for part in reversed(self.parts):
            z, change = part.inverse(z)  # type: ignore[operator]
            logdet = logdet + change
        return z, logdet


class PlainSpline(nn.Module):
    """The formula of the operators' tests."""

    def __init__(self, layer: SplineCoupling) -> None:
        super().__init__()
        self.net, self.spline = torch_network(layer.net), layer.spline

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        x_a, x_b = x.chunk(2, dim=1)
        y_b, log_slope = spline_ref(x_b, self.net(x_a), self.spline, inverse)
        return torch.cat([x_a, y_b], dim=1), log_slope.flatten(1).sum(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(z, True)


def torch_network(net: nn.Module) -> nn.Module:
    """Return a copy that torch's layers alone run."""
    holder = nn.ModuleList([copy.deepcopy(net)])
    with_torch_networks(holder)
    return holder[0].to(memory_format=torch.contiguous_format)


def plain_coupling(layer: Any, scale: ScaleFunction | None = None) -> Coupling:
    made = Coupling(torch_network(layer.net), scale or layer.scale)
    return made.to(memory_format=torch.contiguous_format)


PLAIN: dict[str, Callable[[Any], nn.Module]] = {
    "ActNorm": PlainActNorm,
    "InvertibleConv1x1": PlainConv1x1,
    "AffineCoupling": plain_coupling,
    "FlowStep": PlainStep,
    "SplineCoupling": PlainSpline,
}


class Layer(NamedTuple):
    """A variant and its reference, which runs in float64."""

    module: nn.Module
    reference: nn.Module


def step_glow(size: Size) -> Any:
    """A Glow of one step, from which the models of the peers are built."""
    return Spec(size.channels // 4, 2 * size.side, 1, 1, size.width, size.batch).glow()


def own(kind: str, size: Size) -> Any:
    """This package's layer, with perturbed parameters. It is the same at each call."""
    glow = step_glow(size)
    (step,) = (layer for layer in glow.chain.layers if isinstance(layer, FlowStep))
    if kind == "FlowStep":
        return step
    if kind == "SplineCoupling":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = SplineCoupling(size.channels, bins=BINS, width=size.width)
            nn.init.normal_(made.net[-1].weight, std=0.02)  # type: ignore[index, arg-type]
        return made
    return {"ActNorm": step.actnorm, "InvertibleConv1x1": step.conv}.get(kind, step.coupling)


def _freia(kind: str, size: Size) -> Layer | None:
    if kind == "FlowStep":
        peer = BUILDERS["FrEIA"](_torch_glow(size))
        return _first_step(peer.module, peer.reference)
    modules, layer, dims = (
        package("FrEIA.modules"),
        own(kind, size),
        [(size.channels, size.side, size.side)],
    )
    if kind == "ActNorm":
        made = modules.ActNorm(dims)
        made.init_on_next_batch = False
        with torch.no_grad():
            log_scale, bias = (t.view(1, -1, 1, 1) for t in (layer.log_scale, layer.bias))
            made.scale.copy_(log_scale)
            made.bias.copy_(bias * log_scale.exp())
        return Layer(Adapted(made, first_of, partial(first_of, rev=True)), PlainActNorm(layer))
    if kind == "AffineCoupling":
        reference = plain_coupling(layer, ScaleFunction("tanh", order="scale-shift"))
        made = modules.AffineCouplingOneSided(
            dims,
            subnet_constructor=lambda *_: copy.deepcopy(reference.net),
            clamp=1.0,
            clamp_activation="TANH",
        )
        return Layer(Adapted(made, first_of, partial(first_of, rev=True)), reference)
    return None


def _normflows(kind: str, size: Size) -> Layer | None:
    if kind == "FlowStep":
        peer = BUILDERS["normflows"](_torch_glow(size))
        return _first_step(peer.module, peer.reference)
    nf, layer = package("normflows"), own(kind, size)
    if kind == "ActNorm":
        made = nf.flows.ActNorm((size.channels, 1, 1))
        with torch.no_grad():
            made.s.copy_(-layer.log_scale.view(1, -1, 1, 1))
            made.t.copy_(-layer.bias.view(1, -1, 1, 1))
        made.data_dep_init_done.fill_(1.0)
        return Layer(backwards(made), PlainActNorm(layer))
    if kind == "InvertibleConv1x1":
        made = nf.flows.Invertible1x1Conv(size.channels)
        with torch.no_grad():
            made.W.copy_(layer.weight())
        return Layer(backwards(made), PlainConv1x1(layer))
    if kind == "AffineCoupling":
        reference = plain_coupling(layer, ScaleFunction("sigmoid"))
        net = normflows_net(torch_network(layer.net), size.channels)
        made = nf.flows.AffineCouplingBlock(net, True, "sigmoid", "channel")
        return Layer(backwards(made), reference)
    mask = (torch.arange(size.channels) >= size.channels // 2).int()
    coupling = package("normflows.flows.neural_spline.coupling")
    made = coupling.PiecewiseRationalQuadraticCoupling(
        mask, lambda *_: _without_context(torch_network(layer.net)),
        num_bins=BINS, tails="linear", tail_bound=layer.spline.high,
    )  # fmt: skip
    return Layer(made, PlainSpline(layer))


def _without_context(net: nn.Module) -> Adapted:
    return Adapted(net, lambda net, x, context=None: net(x))


def _torch_glow(size: Size) -> Any:
    glow = step_glow(size).to(memory_format=torch.contiguous_format)
    with_torch_networks(glow)
    return glow


def _first_step(module: Any, reference: Callable[[], Any] | None) -> Layer:
    assert reference is not None
    return Layer(module.levels[0][0], reference().levels[0][0])


def _compiled(kind: str, size: Size) -> Layer:
    torch._dynamo.reset()
    layer = own(kind, size)
    made: Any = PLAIN[kind](layer)
    for way in ("forward", "inverse"):
        setattr(made, way, torch.compile(getattr(made, way), dynamic=False))
    return Layer(made, PLAIN[kind](layer))


VARIANTS: dict[str, Callable[[str, Size], Layer | None]] = {
    "mflow_kernels": lambda kind, size: Layer(own(kind, size), PLAIN[kind](own(kind, size))),
    "plain": lambda kind, size: Layer(PLAIN[kind](own(kind, size)), PLAIN[kind](own(kind, size))),
    "FrEIA": _freia,
    "normflows": _normflows,
    "plain, compiled": _compiled,
}


def variants(kind: str, compiled: bool) -> list[str]:
    """Return the variants that a layer has: FrEIA has no learned 1x1 convolution and no splines."""
    lacks = ["FrEIA"] if kind in ("InvertibleConv1x1", "SplineCoupling") else []
    return [v for v in VARIANTS if v not in lacks and (compiled or v != "plain, compiled")]


def inverse_of(module: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    return module.inverse(z)


def task_of(task: str, module: Any, x: Tensor) -> Call:
    """Return the call to time: "train" (forward and backward), "forward" or "sample"."""
    if task == "train":
        parameters = list(module.parameters())

        def train() -> None:
            for parameter in parameters:
                parameter.grad = None
            z, logdet = module(x)
            nll((z,), logdet.expand(len(x))).backward()  # normflows returns one number

        return train
    if task == "forward":
        return torch.no_grad()(partial(module, x))
    with torch.no_grad():
        z = module(x)[0].clone()
    return torch.no_grad()(partial(inverse_of, module, z))


def check(layer: Layer, x: Tensor, size: Size, name: str, task: str) -> None:
    """Compare values, the inverse and the gradient of x with the float64 reference."""
    compiled = name == "plain, compiled"  # an x with a gradient would compile once more
    exact = layer.reference.to(x.device).double()
    given, wide = x.clone().requires_grad_(not compiled), x.double().requires_grad_()
    terms = 9 * size.width * BINS**2
    z, logdet = layer.module(given)
    logdet = logdet.expand(len(x))
    want, want_logdet = exact(wide)
    assert_close(z.detach(), want.detach(), terms=terms, name=f"{name}: z")
    assert_close(logdet.detach(), want_logdet.detach(), terms=terms * x[0].numel(),
                 scale=x[0].numel() ** 0.5, name=f"{name}: logdet")  # fmt: skip
    if task == "sample":
        with torch.no_grad():
            back = inverse_of(layer.module, want.detach().float())[0]
        assert_close(back, x.double(), terms=8 * terms, name=f"{name}: inverse")
    if task == "train" and not compiled:
        nll((z,), logdet).backward()
        nll((want,), want_logdet).backward()
        assert given.grad is not None
        assert wide.grad is not None
        assert_gradient_close(given.grad, wide.grad, terms, name)


def measure(
    bench: Bench, kind: str, size: Size, task: str, names: list[str], rounds: int
) -> Measured:
    measured = Measured()
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.channels, size.side, size.side)
    x = torch.randn(shape, generator=generator).to(bench.device)

    def make(variant: str) -> Callable[[], Call]:
        layer = VARIANTS[variant](kind, size)
        assert layer is not None
        layer.module.to(bench.device)
        check(layer, x, size, variant, task)
        measured.extra[variant] = {
            **size._asdict(), "spec": str(size), "task": task, "layer": kind,
        }  # fmt: skip
        call = task_of(task, layer.module, x)
        return lambda: call

    measured.compare(bench, names, make, rounds)
    return measured
