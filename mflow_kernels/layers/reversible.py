"""Chains of flow layers whose memory does not grow with depth.

The forward pass keeps the chain's output. The backward pass rebuilds each state from the one after
it, runs each network again, and needs two launches a step beside them (`ops.uncouple`,
`ops.unmix`). W^-1 is taken in float64, networks run again under the autocast, with the random
numbers and without a second update of the running statistics of the first time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.coupling import Split
from mflow_kernels.layers.moves import (
    Couple,
    Leave,
    Mix,
    Move,
    Return,
    Squeezing,
    keep_layout,
    run,
)
from mflow_kernels.layers.networks import check_takes
from mflow_kernels.layers.squeeze import Squeeze
from mflow_kernels.layers.step import FlowStep, Group
from mflow_kernels.layers.walkback import (
    Folds,
    Network,
    RandomState,
    WalkBack,
    autocast_state,
    raise_exchanged,
    random_state,
    same_random_state,
)
from mflow_kernels.ops._checks import check_count
from mflow_kernels.ops._launch import accumulator, flow_state, in_layout_of, pixels, transformed


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
            if not isinstance(layer, FlowStep | Squeeze | Split):
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
            if isinstance(layer, FlowStep | Split):
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
        if isinstance(layer, FlowStep | Split):
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
        mixes = [group.mixes(accumulator(x.dtype)) for group in groups]
        log_dets = tuple(mix.log_det for mix in mixes)
        x, latents, ledger = run(moves, x, latents, mixes, context)
        keep_layout(x)
    log_det = ledger.new_zeros(())
    for of_pixel, area in zip(log_dets, areas, strict=True):
        log_det = log_det + area * of_pixel
    return x, latents, ledger, log_det


@dataclass
class _Journey:
    """What one forward walk leaves for the walk back, beside tensors."""

    keeper: Keeper
    moves: Sequence[Move]
    groups: Sequence[Folds]
    latents: int
    context: int
    networks: list[Network]
    parameters: list[nn.Parameter]
    autocast: dict[str, Any]
    kept: dict[int, Tensor] = field(default_factory=dict)
    random: list[RandomState | None] = field(default_factory=list)


class _Watch:
    """Keeps every k-th state and the random state of networks that draw."""

    def __init__(self, journey: _Journey, device: torch.device) -> None:
        self.journey, self.device = journey, device
        self.state = random_state(device)

    def before_network(self, x: Tensor) -> None:
        every = self.journey.keeper.checkpoint_every
        ordinal = len(self.journey.random)
        if every is not None and ordinal % every == 0:
            self.journey.kept[ordinal] = x

    def after_network(self) -> None:
        # Nothing but networks draws in a walk: each starts from where the one before it ended.
        state = random_state(self.device)
        drew = not same_random_state(self.state, state)
        self.journey.random.append(self.state if drew else None)
        self.state = state


@torch.compiler.disable
def _reversibly(
    keeper: Keeper,
    moves: Sequence[Move],
    groups: Sequence[Folds],
    x: Tensor,
    latents: tuple[Tensor, ...],
    context: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
    networks = [Network(move.net) for move in moves if isinstance(move, Couple)]
    parts = [network.trained for network in networks]
    parts += [group.parameters() for group in groups]
    parameters = {id(p): p for part in parts for p in part}
    journey = _Journey(
        keeper, moves, groups, len(latents), len(context), networks, list(parameters.values()),
        autocast_state(x.device),
    )  # fmt: skip
    x, ledger, *rest = _Reversible.apply(journey, x, *latents, *context, *journey.parameters)
    return x, tuple(rest[len(groups) :]), ledger, tuple(rest[: len(groups)])


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: _Journey, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        latents, rest = rest[: journey.latents], rest[journey.latents :]
        context, parameters = rest[: journey.context], rest[journey.context :]
        mixes = [group.mixes(accumulator(x.dtype)) for group in journey.groups]
        with torch.autocast(**journey.autocast):
            ran = run(journey.moves, x, latents, mixes, context, _Watch(journey, x.device))
        ctx.journey, ctx.kept_at = journey, list(journey.kept)
        kept = list(journey.kept.values())
        journey.kept.clear()
        # Parameters are saved too: autograd then notices one that changes before the walk back.
        ctx.save_for_backward(x, ran.x, *ran.latents, *kept, *context, *parameters)
        return ran.x, ran.ledger, *(mix.log_det for mix in mixes), *ran.latents

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ReversibleChain: a reversible backward cannot be differentiated again; the "
                "gradients of torch.func (grad, vjp, hessian), which store states, can"
            )
        journey: _Journey = ctx.journey
        dx, dledger, *rest_of_grads = grads
        groups = len(journey.groups)
        dlog_dets, dlatents = rest_of_grads[:groups], rest_of_grads[groups:]
        x_true, x, *rest = ctx.saved_tensors
        latents, rest = rest[: len(dlatents)], rest[len(dlatents) :]
        dx = in_layout_of(x, dx)  # see `keep_layout`
        dlatents = [in_layout_of(*pair) for pair in zip(latents, dlatents, strict=True)]
        kept, rest = rest[: len(ctx.kept_at)], rest[len(ctx.kept_at) :]
        back = WalkBack(
            journey.moves,
            journey.groups,
            dlog_dets,
            rest[: journey.context],
            dict(zip(ctx.kept_at, kept, strict=True)),
            journey.networks,
            journey.random,
            journey.autocast,
            dledger[:, 0],
        )
        back.walk(x, dx, latents, dlatents)
        if not back.parameter_gradients.keys() <= {id(p) for p in journey.parameters}:
            raise_exchanged()
        if x_true.numel():
            journey.keeper._record((back.x - x_true).abs().max())
        return (
            None,
            back.dx,
            *back.dlatents,
            *back.context_gradients,
            *(back.parameter_gradients.get(id(p)) for p in journey.parameters),
        )
