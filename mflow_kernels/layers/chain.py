"""Chains of flow layers whose memory does not grow with depth.

The forward pass keeps the chain's output. The backward pass rebuilds each state from the one after
it, runs each network again, and needs two launches a step beside them (`rebuild_coupling`,
`rebuild_conv1x1`). W^-1 is taken in float64, networks run again under the autocast, with the random
numbers and without a second update of the running statistics of the first time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.coupling import Split
from mflow_kernels.layers.networks import check_takes
from mflow_kernels.layers.squeeze import Squeeze
from mflow_kernels.layers.step import FlowStep, Group
from mflow_kernels.ops.checks import check_count
from mflow_kernels.ops.launch import (
    accumulator,
    capturing,
    flow_state,
    in_layout_of,
    pixels,
    transformed,
)
from mflow_kernels.reversible.backward import Folds, WalkBack
from mflow_kernels.reversible.program import (
    Couple,
    Leave,
    Mix,
    Move,
    Return,
    Squeezing,
    keep_layout,
    run,
)
from mflow_kernels.reversible.rerun import (
    Network,
    RandomState,
    autocast_state,
    check_capturable,
    raise_exchanged,
    random_state,
    same_random_state,
)


class ReversibleChain(Bijection):
    """Flow layers one after the other, trained in the memory of one of them.

    `z, logdet = chain(x)`; with splits z is the tuple of latents, finest first, the last state
    last. K steps cost K + 1 launches beside their networks, and backward two a step.

    Args:
        layers: `FlowStep`, `Squeeze` and `Split` layers.
        reversible: rebuild states in the backward pass; if False autograd stores them, which
            allows `torch.compile` of the whole, and `torch.func.functional_call`, whose parameters
            are gone in the backward pass. Transforms of `torch.func` store them either way.
        checkpoint_every: k keeps the state of every k-th step and rebuilds only in between, so
            that the rounding of at most k inversions adds up; None keeps none: memory is flat, and
            gradients drift from the stored ones as training goes on (docs/memory.md has figures).
            The networks' activations are never kept.

    Raises:
        TypeError, ValueError: naming the argument: layers that do not take what the ones before
            them give; in a call, before any kernel runs, what the first layer does not take (see
            `AffineCoupling`), sides that the `Squeeze` layers do not halve, other latents.

    Attributes:
        drift: the largest |rebuilt - true| of the chain's input in any backward pass since it was
            last None, a scalar tensor; set it to None before a step whose own you want.
    """

    def __init__(
        self,
        layers: Sequence[Bijection],
        *,
        reversible: bool = True,
        checkpoint_every: int | None = 8,
    ) -> None:
        super().__init__()
        layers = list(layers)
        if not layers:
            raise ValueError("layers: expected at least one, got none")
        for i, layer in enumerate(layers):
            if not isinstance(layer, (FlowStep, Squeeze, Split)):
                raise TypeError(
                    f"layers[{i}]: expected FlowStep, Squeeze or Split, got {type(layer).__name__}"
                )
        _check_widths(layers)
        if checkpoint_every is not None:
            check_count("checkpoint_every", checkpoint_every, 1)
        self.layers = nn.ModuleList(layers)
        self.reversible = reversible
        self.checkpoint_every = checkpoint_every
        self.drift: Tensor | None = None

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        x = self._checked("x", x, False)
        moves, groups, areas = self._plan(x, False)
        x, latents, ledger, log_det = walk(
            self, moves, groups, areas, x, (), context, self.reversible
        )
        z = (*latents, x) if latents else x
        return z, ops.accumulate_logdet(ledger, log_det)

    def inverse(self, z: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        x, latents = self._checked_latents(z)
        moves, groups, areas = self._plan(x, True)
        x, _, ledger, log_det = walk(
            self, moves, groups, areas, x, latents, context, self.reversible
        )
        return x, ops.accumulate_logdet(ledger, log_det)

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Any, Tensor]:
        self._checked("x", x, False)
        with torch.no_grad():
            state = x
            for layer in self.layers:
                state, _ = layer.initialize(state, *context)  # type: ignore[operator]
                state = state[0] if isinstance(layer, Split) else state
        return self(x, *context)

    def _checked(self, name: str, value: object, inverted: bool) -> Tensor:
        """`value` as a state that the chain takes at its start, or at its end where `inverted`."""
        x = flow_state(name, value)
        layers = list(self.layers)
        halvings = 2 ** sum(isinstance(layer, Squeeze) for layer in layers)
        if halvings > 1:
            cut = any(side % halvings for side in x.shape[2:]) and not inverted
            if x.dim() != 4 or cut:
                wanted = "" if inverted else f" with H and W divisible by {halvings}"
                raise ValueError(
                    f"{name}: expected shape (N, C, H, W){wanted}, got {tuple(x.shape)}"
                )
        factor = 1
        for layer in reversed(layers) if inverted else layers:
            if isinstance(layer, (FlowStep, Split)):
                channels = layer.coupling.channels
                if inverted:
                    channels = factor * (channels // 2 if isinstance(layer, Split) else channels)
                else:
                    channels //= factor
                check_takes(layer.coupling.net, name, x, channels)
                break
            factor *= 4
        return x

    def _checked_latents(self, z: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state at the end of the chain, and the latents that left before it."""
        splits = sum(isinstance(layer, Split) for layer in self.layers)
        if not splits:
            return self._checked("z", z, True), ()
        if not isinstance(z, tuple):
            raise TypeError(f"z: expected a tuple of {splits + 1} latents, got {type(z).__name__}")
        if len(z) != splits + 1:
            raise ValueError(f"z: expected {splits + 1} latents, got {len(z)}")
        x = self._checked(f"z[{splits}]", z[splits], True)
        waiting, sides = splits, tuple(x.shape[2:])
        for layer in reversed(list(self.layers)):
            if isinstance(layer, Squeeze):
                sides = tuple(2 * side for side in sides)
            elif isinstance(layer, Split):
                waiting -= 1
                layer.check_latent(f"z[{waiting}]", z[waiting], x, sides)
        return x, z[:splits]

    def _record(self, drift: Tensor) -> None:
        # A graph may hold the chain several times: a data-domain objective walks both ways.
        self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)

    def _plan(self, x: Tensor, inverted: bool) -> tuple[list[Move], list[Group], list[int]]:
        """The moves in one direction, the steps whose weights they name, and how many pixels the
        states of each group of them have."""
        layers = list(self.layers)
        moves: list[Move] = []
        groups: list[Group] = []
        area, areas = pixels(x), []
        if inverted:
            area *= 4 ** sum(isinstance(layer, Squeeze) for layer in layers)
        for i, layer in enumerate(layers):
            if isinstance(layer, FlowStep):
                if i == 0 or not isinstance(layers[i - 1], FlowStep):
                    groups.append(Group([], [], inverted))
                    areas.append(area)
                group = groups[-1]
                moves += [Mix(len(groups) - 1, len(group.steps)), layer.couple(inverted)]
                group.steps.append(layer)
                group.names.append(f"layers.{i}.conv")
            elif isinstance(layer, Squeeze):
                area //= 4
                moves.append(Squeezing(inverted))
            elif isinstance(layer, Split):
                coupling = layer.coupling
                moves.append(Couple(coupling.net, coupling.scale, inverted))
                moves.append(Return() if inverted else Leave())
        return moves[::-1] if inverted else moves, groups, areas


def _check_widths(layers: Sequence[Bijection]) -> None:
    """That each layer takes as many channels as the one before it gives, or ValueError."""
    channels, factor = None, 1
    for i, layer in enumerate(layers):
        if isinstance(layer, (FlowStep, Split)):
            own = layer.coupling.channels
            if channels is None and own % factor:
                raise ValueError(
                    f"layers[{i}]: expected a multiple of {factor} channels, got one of {own}"
                )
            if channels is not None and own != channels:
                raise ValueError(
                    f"layers[{i}]: expected a layer of {channels} channels, got one of {own}"
                )
            channels = own // 2 if isinstance(layer, Split) else own
        elif channels is None:
            factor *= 4
        else:
            channels *= 4


class Keeper(Protocol):
    """Who walks: says which states are kept, and hears how far rebuilt ones were off."""

    checkpoint_every: int | None

    def _record(self, drift: Tensor) -> None: ...


def walk(
    keeper: Keeper,
    moves: Sequence[Move],
    groups: Sequence[Folds],
    areas: Sequence[int],
    x: Tensor,
    latents: tuple[Tensor, ...],
    context: tuple[Tensor, ...],
    reversible: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """Walk the moves, to be walked back by autograd or, where `reversible`, by rebuilding.

    Args:
        groups: the steps whose weights `Mix` moves name.
        areas: how many pixels the states of each group have.
        x: state (N, C, *spatial), checked.
        latents: what `Return` moves bring back, the last one first.
        context: further inputs of every network.

    Returns:
        The state and the latents that left, typed as x; the ledger (N, T) of log-determinants and
        the log-determinant () that is the same for all samples, float32 (float64 for float64).

    Raises:
        RuntimeError: in the backward pass of a `reversible` walk, where its gradient is to be
            differentiated again, or a parameter is not what it was.
    """
    if reversible and torch.is_grad_enabled() and not transformed():
        x, latents, ledger, log_dets = _reversibly(keeper, moves, groups, x, latents, context)
    else:
        dtype, check = accumulator(x.dtype), not torch.is_grad_enabled()
        mixes = {i: group.mixes(dtype, check=check) for i, group in enumerate(groups)}
        x, latents, ledger = run(moves, x, latents, mixes, context)
        log_dets = {i: mix.log_det for i, mix in mixes.items()}
        keep_layout(x)
    log_det = ledger.new_zeros(())
    for i, area in enumerate(areas):
        log_det = log_det + area * log_dets[i]
    return x, latents, ledger, log_det


@dataclass
class _Segment:
    """A part of a walk that is one node of autograd's graph: its gradients are there, for whoever
    waits for them (as DistributedDataParallel does), before the part before it is walked back.

    Attributes:
        groups: whose weights its moves name.
        returns, leaves: how many latents come in and go out.
        parameters: those that its node hands gradients to. A parameter that several segments use
            is the first one's, which is walked back last.
    """

    moves: list[Move]
    groups: list[int]
    returns: int
    leaves: int
    parameters: list[nn.Parameter]


def _cuts(moves: Sequence[Move]) -> list[int]:
    """Where segments begin: at squeezes, where the state is whole and no launch spans two moves, so
    that each segment has a network or a 1x1 convolution."""
    cuts, works = [0], [isinstance(move, Couple | Mix) for move in moves]
    for i, move in enumerate(moves):
        if isinstance(move, Squeezing) and any(works[cuts[-1] : i]) and any(works[i:]):
            cuts.append(i)
    return cuts


def _segments(
    moves: Sequence[Move], groups: Sequence[Folds], networks: Sequence[Network]
) -> list[_Segment]:
    """The moves in segments."""
    cuts = _cuts(moves)
    segments: list[_Segment] = []
    seen: set[int] = set()
    ordinal = 0
    for start, end in zip(cuts, [*cuts[1:], len(moves)], strict=True):
        own = list(moves[start:end])
        used = list(dict.fromkeys(move.group for move in own if isinstance(move, Mix)))
        couples = sum(isinstance(move, Couple) for move in own)
        parts = [network.trained for network in networks[ordinal : ordinal + couples]]
        parts += [groups[i].parameters() for i in used]
        parameters = {id(p): p for part in parts for p in part if id(p) not in seen}
        seen.update(parameters)
        returns, leaves = (sum(isinstance(m, kind) for m in own) for kind in (Return, Leave))
        segments.append(_Segment(own, used, returns, leaves, list(parameters.values())))
        ordinal += couples
    return segments


@dataclass
class _Journey:
    """What one forward walk leaves for the walk back, beside tensors.

    random and prints are those of `WalkBack`; back is it, from one segment to the next.
    """

    keeper: Keeper
    groups: Sequence[Folds]
    segments: list[_Segment]
    networks: list[Network]
    context: int
    autocast: dict[str, Any]
    random: list[RandomState | None] = field(default_factory=list)
    prints: list[list[Tensor] | None] = field(default_factory=list)
    back: WalkBack | None = None


class _Watch:
    """Runs networks, keeping every k-th state and the random state of those that draw."""

    def __init__(self, journey: _Journey, device: torch.device) -> None:
        self.journey, self.device = journey, device
        self.kept: dict[int, Tensor] = {}
        self.state = random_state(device)

    def run(self, net: nn.Module, x: Tensor, net_input: Tensor, context: Sequence[Tensor]) -> Any:
        journey, ordinal = self.journey, len(self.journey.random)
        every, network = journey.keeper.checkpoint_every, journey.networks[ordinal]
        if every is not None and ordinal % every == 0:
            self.kept[ordinal] = x
        if capturing(self.device):
            check_capturable(network)
        prints = None
        if network.draws is None and not x.is_meta:
            with torch.enable_grad():
                params, prints = network.fingerprinted(net_input.detach().requires_grad_(), context)
            params = params.detach()
        else:
            params = net(net_input, *context)
        # Nothing but networks draws in a walk: each starts from where the one before it ended.
        state = random_state(self.device)
        drew = not same_random_state(self.state, state)
        journey.random.append(self.state if drew else None)
        journey.prints.append(prints)
        self.state = state
        return params


@torch.compiler.disable
def _reversibly(
    keeper: Keeper,
    moves: Sequence[Move],
    groups: Sequence[Folds],
    x: Tensor,
    latents: tuple[Tensor, ...],
    context: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, dict[int, Tensor]]:
    networks = [Network(move.net) for move in moves if isinstance(move, Couple)]
    segments = _segments(moves, groups, networks)
    journey = _Journey(keeper, groups, segments, networks, len(context), autocast_state(x.device))
    outputs: list[Tensor] = []
    for segment in segments:
        waiting = len(latents) - segment.returns
        inputs = (*latents[waiting:], *context, *segment.parameters)
        latents = latents[:waiting]
        if segment is segments[-1]:
            # All that comes out leaves through the last node, so that it is walked back first.
            x, *outputs = _Walked.apply(journey, segment, x, *inputs, *outputs)
        else:
            x, *own = _Walked.apply(journey, segment, x, *inputs)
            outputs += own
    rest = iter(outputs)
    left: list[Tensor] = []
    ledgers: list[Tensor] = []
    log_dets: dict[int, Tensor] = {}
    for segment in segments:
        ledgers.append(next(rest))
        log_dets.update({i: next(rest) for i in segment.groups})
        left += islice(rest, segment.leaves)
    ledger = ledgers[0] if len(ledgers) == 1 else torch.cat(ledgers, dim=1)
    return x, tuple(left), ledger, log_dets


class _Walked(torch.autograd.Function):
    """A segment, from the state before it to the state after it, its ledger, the log_det of each of
    its groups and the latents that left. What else comes in goes out again, in front of these."""

    @staticmethod
    def forward(
        ctx: Any, journey: _Journey, segment: _Segment, x: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        latents, context, parameters, others = _cut(
            rest, segment.returns, journey.context, len(segment.parameters)
        )
        dtype = accumulator(x.dtype)
        mixes = {i: journey.groups[i].mixes(dtype) for i in segment.groups}
        watch = _Watch(journey, x.device)
        with torch.autocast(**journey.autocast):
            ran = run(segment.moves, x, latents, mixes, context, watch)
        ctx.journey, ctx.segment, ctx.kept_at = journey, segment, list(watch.kept)
        # The walk back starts from the state at the end, and ends where nothing needs gradients.
        ctx.starts = segment is journey.segments[-1]
        ctx.ends = segment is journey.segments[0] or not ctx.needs_input_grad[2]
        ends = (*((ran.x,) if ctx.starts else ()), *((x,) if ctx.ends else ()))
        # Parameters are saved too: autograd then notices one that changes before the walk back.
        ctx.save_for_backward(*ends, *ran.latents, *watch.kept.values(), *context, *parameters)
        log_dets = (mix.log_det for mix in mixes.values())
        return ran.x, *others, ran.ledger, *log_dets, *ran.latents

    @staticmethod
    def backward(ctx: Any, dx: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ReversibleChain: a reversible backward cannot be differentiated again; the "
                "gradients of torch.func (grad, vjp, hessian), which store states, can"
            )
        journey: _Journey = ctx.journey
        segment: _Segment = ctx.segment
        own = 1 + len(segment.groups) + segment.leaves
        dothers, grads = grads[: len(grads) - own], grads[len(grads) - own :]
        (dledger,), dlog_dets, dlatents = _cut(grads, 1, len(segment.groups))
        starts, ends, latents, kept, context, _ = _cut(
            ctx.saved_tensors,
            int(ctx.starts), int(ctx.ends), segment.leaves, len(ctx.kept_at), journey.context,
        )  # fmt: skip
        dlatents = tuple(in_layout_of(*pair) for pair in zip(latents, dlatents, strict=True))
        if starts:
            dx = in_layout_of(starts[0], dx)  # see `keep_layout`
            journey.back = WalkBack(
                starts[0], dx, journey.groups, context, journey.networks, journey.random,
                journey.prints, journey.autocast,
            )  # fmt: skip
        back = journey.back
        assert back is not None  # the last segment is always walked back first
        dreturned = back.walk(
            segment.moves,
            latents,
            dlatents,
            dict(zip(segment.groups, dlog_dets, strict=True)),
            dledger[:, 0],
            dict(zip(ctx.kept_at, kept, strict=True)),
        )
        known = {id(p) for part in journey.segments for p in part.parameters}
        if not back.parameter_gradients.keys() <= known:
            raise_exchanged()
        if ends:
            journey.back = None
            if ends[0].numel():
                journey.keeper._record((back.x - ends[0]).abs().max())
        dcontext = back.context_gradients if ends else [None] * journey.context
        dparameters = (back.parameter_gradients.pop(id(p), None) for p in segment.parameters)
        return None, None, back.dx, *dreturned, *dcontext, *dparameters, *dothers


def _cut(tensors: Sequence[Tensor], *lengths: int) -> list[tuple[Tensor, ...]]:
    """Pieces of these lengths, and what is left over."""
    rest = iter(tensors)
    return [*(tuple(islice(rest, length)) for length in lengths), tuple(rest)]
