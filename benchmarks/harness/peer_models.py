"""The same Glow in every package, built from this package's Glow with the same weights.

All of them share the multi-scale frame (`plain_glow.Multiscale`), the networks and the number of
steps. `NOTES` lists the remaining differences.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.plain_glow import Multiscale, OtherStep, Step, multiscale
from benchmarks.harness.session import Missing
from benchmarks.reports.cases import Constant
from mflow_kernels import FlowStep, Glow, Split
from mflow_kernels.ops import ScaleFunction

NOTES = {
    "mflow_kernels, stored": "reversible=False: activations are stored, as in the peers",
    "mflow_kernels, stored, compiled": "as stored, with the whole model under torch.compile",
    "mflow_kernels, reversible": "the default: every 8th state is stored, the others are rebuilt",
    "mflow_kernels, nothing stored": "checkpoint_every=None: every state is rebuilt",
    "plain": "eager PyTorch, contiguous; same parameters and scale function as mflow_kernels",
    "plain, channels_last": "as plain, but states and networks are in channels_last",
    "plain, compiled": "as plain, with the whole model under torch.compile",
    "checkpointing": "plain, each step under torch.utils.checkpoint (use_reentrant=False)",
    "memcnn": "plain, each step in an InvertibleModuleWrapper(keep_input=False)",
    "normflows": "GlowBlock; scale sigmoid(raw + 2); AffineCoupling splits; the same parameters",
    "nflows": "ActNorm, OneByOneConvolution, AffineCouplingTransform; scale sigmoid(raw + 2) + "
    "1e-3; stores only the triangles of L and U (half as many numbers), and adds a bias",
    "FrEIA": "AllInOneBlock, global affine exp, clamp 2, coupling first; its 1x1 convolution is a "
    "fixed rotation, so it lacks the C^2 parameters of W and their gradient; plain splits",
}


@dataclass
class Peer:
    """A model, and the function that builds its float64 reference.

    `reference` is None if the model computes the same function as this package's Glow.
    """

    module: nn.Module
    reference: Callable[[], Multiscale] | None = None


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed ({error})") from None


def reordered(net: nn.Module, order: Tensor, factor: Tensor) -> nn.Module:
    """Return a copy of a coupling network with its output channels reordered and scaled."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        if isinstance(net, Constant):
            net.params.copy_(net.params[:, order] * factor.view(1, -1, 1, 1))
            return net
        last = net[-1]
        last.weight.copy_(last.weight[order] * factor.view(-1, 1, 1, 1))
        last.bias.copy_(last.bias[order] * factor)
    return net


class Adapted(nn.Module):
    """A peer's module in the form of a step: functions of the module and of the inputs call it."""

    def __init__(
        self,
        inner: nn.Module,
        forward: Callable[..., Any],
        inverse: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.inner, self._forward, self._inverse = inner, forward, inverse

    def forward(self, *given: Any) -> Any:
        return self._forward(self.inner, *given)

    def inverse(self, *given: Any) -> Any:
        assert self._inverse is not None
        return self._inverse(self.inner, *given)


def backwards(flow: nn.Module) -> Adapted:
    """Reverse a normflows flow, whose forward maps latents to data."""
    return Adapted(flow, lambda flow, x: flow.inverse(x), lambda flow, z: flow(z))


def normflows_net(net: nn.Module, channels: int) -> nn.Module:
    """Interleave the outputs (raw, shift) as (-shift, raw); normflows subtracts the shift."""
    half = channels // 2
    index = torch.arange(half)
    order = torch.stack([half + index, index], dim=1).flatten()
    return reordered(net, order, torch.tensor([-1.0, 1.0]).repeat(half))


def _normflows(glow: Glow) -> Peer:
    nf = package("normflows")
    scale = ScaleFunction("sigmoid")

    def step(s: FlowStep) -> nn.Module:
        channels = len(s.conv.sign)
        block = nf.flows.GlowBlock(channels, 1)
        coupling, conv, actnorm = block.flows
        coupling.flows[1].param_map = normflows_net(s.coupling.net, channels)
        with torch.no_grad():
            conv.P.copy_(s.conv.permutation)
            conv.sign_S.copy_(s.conv.sign)
            for target, source in ((conv.L, s.conv.lower), (conv.U, s.conv.upper),
                                   (conv.log_S, s.conv.log_diagonal)):  # fmt: skip
                target.copy_(source)
            actnorm.s.copy_(-s.actnorm.log_scale.view(1, -1, 1, 1))
            actnorm.t.copy_(-s.actnorm.bias.view(1, -1, 1, 1))
        actnorm.data_dep_init_done.fill_(1.0)
        return backwards(block)

    def split(s: Split) -> nn.Module:
        net = normflows_net(s.coupling.net, s.coupling.net[-1].out_channels)
        return backwards(nf.flows.AffineCouplingBlock(net, True, "sigmoid", "channel"))

    reference = _with_scale(glow, scale)
    return Peer(multiscale(glow, step, split), lambda: multiscale(reference).double())


def _with_scale(glow: Glow, scale: ScaleFunction) -> Glow:
    glow = copy.deepcopy(glow)
    for layer in glow.chain.layers:
        if isinstance(layer, FlowStep | Split):
            layer.coupling.scale = scale
    return glow


def _reference_of(
    made: Multiscale, glow: Glow, step: Callable[[FlowStep, nn.Module], OtherStep]
) -> Multiscale:
    """Return the reference of a peer whose W is its own: `step` also takes the peer's step."""
    steps = iter([s for level in made.levels for s in level])
    return multiscale(glow, lambda s: step(s, next(steps))).double()


def _nflows(glow: Glow) -> Peer:
    package("nflows")
    transforms = importlib.import_module("nflows.transforms")
    scale = ScaleFunction("sigmoid", eps=1e-3, order="scale-shift")

    def coupling(net: nn.Module, channels: int) -> nn.Module:
        half = channels // 2
        swapped = reordered(net, torch.arange(2 * half).roll(half), torch.ones(2 * half))
        mask = [0] * half + [1] * half
        without_context = Adapted(swapped, lambda net, x, context=None: net(x))
        return transforms.AffineCouplingTransform(mask, lambda *_: without_context)

    def step(s: FlowStep) -> nn.Module:
        channels = len(s.conv.sign)
        actnorm, conv = transforms.ActNorm(channels), transforms.OneByOneConvolution(channels)
        actnorm.initialized.fill_(True)
        with torch.no_grad():
            actnorm.log_scale.copy_(s.actnorm.log_scale)
            actnorm.shift.copy_(s.actnorm.bias * s.actnorm.log_scale.exp())
            # nflows factors W P with a positive diagonal, so W cannot be copied. Draw another W,
            # near a rotation.
            for entries in (conv.lower_entries, conv.upper_entries):
                entries.normal_(std=0.1 / channels**0.5)
        parts = [actnorm, conv, coupling(s.coupling.net, channels)]
        return transforms.CompositeTransform(parts)

    def reference_step(s: FlowStep, made: nn.Module) -> OtherStep:
        conv = copy.deepcopy(made._transforms[1]).double()
        order = conv.permutation._permutation
        lower, upper = conv._create_lower_upper()
        weight = (lower @ upper).detach()[:, torch.argsort(order)]
        return OtherStep(s, weight, scale)

    def split(s: Split) -> nn.Module:
        return coupling(s.coupling.net, s.coupling.net[-1].out_channels)

    made = multiscale(glow, step, split)
    return Peer(made, lambda: _reference_of(made, _with_scale(glow, scale), reference_step))


def first_of(block: nn.Module, x: Tensor, **direction: bool) -> tuple[Tensor, Tensor]:
    """Call FrEIA's block, which has tuples of tensors, on one tensor."""
    (z,), logdet = block((x,), **direction)
    return z, logdet


def _freia(glow: Glow) -> Peer:
    modules = package("FrEIA.modules")

    def step(s: FlowStep) -> nn.Module:
        channels = len(s.conv.sign)
        half = channels // 2
        # The log-scale of FrEIA with clamp 2 is 2 tanh(raw / 10); that of ScaleFunction is
        # 2 tanh(raw / 2).
        factor = torch.cat([torch.full((half,), 5.0), torch.full((half,), 10.0)])
        net = reordered(s.coupling.net, torch.arange(2 * half), factor)
        if isinstance(net, Constant):  # FrEIA writes into its output
            net = Adapted(net, lambda net, x: net(x).clone())
        block = modules.AllInOneBlock(
            [(channels, 1, 1)], subnet_constructor=lambda *_: net, affine_clamping=2.0,
            global_affine_type="EXP",
        )  # fmt: skip
        log_scale, bias = (
            t.detach().view(1, -1, 1, 1) for t in (s.actnorm.log_scale, s.actnorm.bias)
        )
        with torch.no_grad():
            rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
            block.w_perm.copy_(rotation[:, :, None, None])  # as permute_soft draws one
            block.w_perm_inv.copy_(rotation.t()[:, :, None, None])
            block.global_scale.copy_(log_scale)
            block.global_offset.copy_(bias * log_scale.exp())
        return Adapted(block, first_of, partial(first_of, rev=True))

    made = multiscale(glow, step)
    scale = ScaleFunction("tanh", clamp=2.0, order="scale-shift")

    def reference_step(s: FlowStep, block: nn.Module) -> OtherStep:
        return OtherStep(s, block.inner.w_perm[:, :, 0, 0], scale, coupling_first=True)

    return Peer(made, lambda: _reference_of(made, glow, reference_step))


def _glow_of_this_package(
    glow: Glow, reversible: bool, checkpoint_every: int | None = 8, *, compiled: bool = False
) -> Peer:
    made = copy.deepcopy(glow)
    made.chain.reversible, made.chain.checkpoint_every = reversible, checkpoint_every
    if compiled:
        _compile(made)
    return Peer(made)


def _compile(model: Any) -> None:
    torch._dynamo.reset()
    for way in ("forward", "inverse"):
        setattr(model, way, torch.compile(getattr(model, way), dynamic=False))


def _plain(glow: Glow, *, channels_last: bool = False, compiled: bool = False) -> Peer:
    made: Any = multiscale(glow)
    if channels_last:
        made.to(memory_format=torch.channels_last)
        made.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].contiguous(memory_format=torch.channels_last),)
        )
    if compiled:
        _compile(made)
    return Peer(made)


def _checkpointed(step: FlowStep) -> nn.Module:
    """A step whose activations torch recomputes in the backward pass."""
    return Adapted(Step(step), lambda step, x: checkpoint(step, x, use_reentrant=False))


def _inverted(step: FlowStep) -> nn.Module:
    """A step whose input memcnn rebuilds in the backward pass."""

    def carry(call: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, logdet: Tensor) -> Any:
        x, change = call(x)
        return x, logdet + change

    # From (x, logdet) to (z, logdet), the form that memcnn can invert.
    carrying = Adapted(Step(step), carry, lambda step, *given: carry(step.inverse, *given))
    wrapped = package("memcnn").InvertibleModuleWrapper(carrying, keep_input=False)
    return Adapted(wrapped, lambda wrapped, x: wrapped(x, x.new_zeros(x.shape[0])))


BUILDERS: dict[str, Callable[[Glow], Peer]] = {
    "mflow_kernels, stored": partial(_glow_of_this_package, reversible=False),
    "mflow_kernels, stored, compiled": partial(
        _glow_of_this_package, reversible=False, compiled=True
    ),
    "mflow_kernels, reversible": partial(_glow_of_this_package, reversible=True),
    "mflow_kernels, nothing stored": partial(
        _glow_of_this_package, reversible=True, checkpoint_every=None
    ),
    "plain": _plain,
    "plain, channels_last": partial(_plain, channels_last=True),
    "plain, compiled": partial(_plain, compiled=True),
    "checkpointing": lambda glow: Peer(multiscale(glow, _checkpointed)),
    "memcnn": lambda glow: Peer(multiscale(glow, _inverted)),
    "normflows": _normflows,
    "nflows": _nflows,
    "FrEIA": _freia,
}
