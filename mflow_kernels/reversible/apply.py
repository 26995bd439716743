"""Runs programs under autograd. Their states are stored, or rebuilt in the backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels.ops.launch import capturing, transformed
from mflow_kernels.ops.layouts import in_layout_of
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.reversible.backward import BackwardPass
from mflow_kernels.reversible.program import (
    ChannelLinear,
    Couple,
    Instruction,
    Join,
    LinearGroup,
    Program,
    SpaceToDepth,
    SplitOff,
    execute,
    keep_layout,
)
from mflow_kernels.reversible.rerun import (
    RerunNetwork,
    autocast_state,
    check_capturable,
    raise_replaced,
    random_state,
    same_random_state,
)


class ProgramOwner(Protocol):
    """The object whose program runs.

    Attributes:
        checkpoint_every: store the state before every k-th network, and the network's input; None
            stores none.
    """

    checkpoint_every: int | None

    def record_drift(self, drift: Tensor) -> None:
        """Receive the largest |rebuilt - true| of the program's input, a scalar tensor."""


class Applied(NamedTuple):
    """The result of `apply_program`."""

    x: Tensor  # the state, in the dtype of the input
    latents: tuple[Tensor, ...]  # in the order in which they were split off
    ledger: Tensor  # (N, T), terms of the log-determinant of each sample
    log_det: Tensor  # (), the part of the log-determinant that all samples share


def apply_program(
    owner: ProgramOwner,
    program: Program,
    x: Tensor,
    latents: tuple[Tensor, ...],
    context: tuple[Tensor, ...],
    reversible: bool,
) -> Applied:
    """Run a program. Autograd stores its states or, if `reversible`, rebuilds them.

    Args:
        x: state (N, C, *spatial), checked.
        latents: the latents that `Join` instructions append, taken from the end.
        context: further inputs of every network.

    Returns:
        See `Applied`. Log-determinants are float32 (float64 for float64 states).

    Raises:
        ValueError: as `apply_stored`.
        RuntimeError: in the backward pass of a `reversible` program, if its gradient is to be
            differentiated again or a parameter was replaced after the forward pass.
    """
    if not reversible or not torch.is_grad_enabled() or transformed():
        return apply_stored(program, x, latents, context)
    return _apply_reversibly(owner, program, x, latents, context)


def apply_stored(
    program: Program, x: Tensor, latents: tuple[Tensor, ...], context: tuple[Tensor, ...]
) -> Applied:
    """`apply_program` with states that autograd stores.

    Raises:
        ValueError: a weight has no inverse, and the program needs it. Only checked while no
            gradients are recorded.
    """
    dtype, check = accumulator(x.dtype), not torch.is_grad_enabled()
    folded = {i: group.folded(dtype, check=check) for i, group in enumerate(program.groups)}
    group_pixels = program.group_pixels(x)
    x, latents, ledger = execute(program.instructions, x, latents, folded, context)
    keep_layout(x)
    log_dets = {i: weights.log_det for i, weights in folded.items()}
    return Applied(x, latents, ledger, _total(ledger, group_pixels, log_dets))


def _total(ledger: Tensor, group_pixels: list[int], log_dets: dict[int, Tensor]) -> Tensor:
    log_det = ledger.new_zeros(())
    for i, pixels in enumerate(group_pixels):
        log_det = log_det + pixels * log_dets[i]
    return log_det


class _Segment(NamedTuple):
    """A part of a program that is one node of autograd's graph.

    The backward pass completes the gradients of its parameters before it enters the segment before
    it, so that DistributedDataParallel can exchange them early.

    Attributes:
        networks: the networks of its instructions.
        groups: the groups that its instructions name.
        joined, split_off: the number of latents that it consumes and produces.
        parameters: the parameters to which its node passes gradients. A parameter that several
            segments use belongs to the first of them, which is undone last.
    """

    instructions: list[Instruction]
    networks: list[RerunNetwork]
    groups: list[int]
    joined: int
    split_off: int
    parameters: list[nn.Parameter]


def segment_starts(instructions: Sequence[Instruction]) -> list[int]:
    """The indices at which segments begin: 0, and those of squeezes.

    At a squeeze the state is one tensor, and no launch spans the instructions before and after it.
    A squeeze begins a segment only if there is a network or a linear map on both sides of it.
    """
    starts, works = [0], [isinstance(i, (Couple, ChannelLinear)) for i in instructions]
    for i, instruction in enumerate(instructions):
        squeezes = isinstance(instruction, SpaceToDepth)
        if squeezes and any(works[starts[-1] : i]) and any(works[i:]):
            starts.append(i)
    return starts


def _segments(program: Program) -> list[_Segment]:
    starts = segment_starts(program.instructions)
    segments: list[_Segment] = []
    seen: set[int] = set()
    ordinals = count()
    for start, end in zip(starts, [*starts[1:], len(program.instructions)], strict=True):
        own = program.instructions[start:end]
        networks = [RerunNetwork(i.net, next(ordinals)) for i in own if isinstance(i, Couple)]
        groups = list(dict.fromkeys(i.group for i in own if isinstance(i, ChannelLinear)))
        joined, split_off = (sum(isinstance(i, kind) for i in own) for kind in (Join, SplitOff))
        parts = [network.trained for network in networks]
        parts += [program.groups[i].parameters() for i in groups]
        parameters = {id(p): p for part in parts for p in part if id(p) not in seen}
        seen.update(parameters)
        trained = list(parameters.values())
        segments.append(_Segment(own, networks, groups, joined, split_off, trained))
    return segments


@dataclass
class _ForwardRecord:
    """Data that a forward pass hands to its backward pass, besides saved tensors.

    `backward` is the backward pass itself, which the nodes of all segments share.
    """

    owner: ProgramOwner
    groups: Sequence[LinearGroup]
    segments: list[_Segment]
    context_length: int
    autocast: dict[str, Any]
    backward: BackwardPass | None = None


class _RecordingRunner:
    """Runs networks, records the random state of each that draws, and stores every k-th state.

    `stored` maps the ordinal of a network to the state before it and the network's input,
    which the backward pass would otherwise copy from the state.
    """

    def __init__(
        self, networks: Sequence[RerunNetwork], every: int | None, device: torch.device
    ) -> None:
        self.waiting, self.every, self.device = iter(networks), every, device
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.state = random_state(device)

    def run(self, net: nn.Module, x: Tensor, net_input: Tensor, context: Sequence[Tensor]) -> Any:
        network = next(self.waiting)
        if self.every is not None and network.ordinal % self.every == 0:
            self.stored[network.ordinal] = x, net_input
        if capturing(self.device):
            check_capturable(network)
        if network.draws is None and not x.is_meta:
            with torch.enable_grad():
                params, network.fingerprints = network.run_with_fingerprints(
                    net_input.detach().requires_grad_(), context
                )
            params = params.detach()
        else:
            params = net(net_input, *context)
        # Only networks draw random numbers, so each starts from the state that the last one left.
        state = random_state(self.device)
        if not same_random_state(self.state, state):
            network.random = self.state
        self.state = state
        return params


@torch.compiler.disable
def _apply_reversibly(
    owner: ProgramOwner,
    program: Program,
    x: Tensor,
    latents: tuple[Tensor, ...],
    context: tuple[Tensor, ...],
) -> Applied:
    group_pixels = program.group_pixels(x)
    segments = _segments(program)
    autocast = autocast_state(x.device)
    record = _ForwardRecord(owner, program.groups, segments, len(context), autocast)
    outputs: list[Tensor] = []
    for segment in segments:
        waiting = len(latents) - segment.joined
        inputs = (*latents[waiting:], *context, *segment.parameters)
        latents = latents[:waiting]
        if segment is segments[-1]:
            # All outputs pass through the last node, so autograd runs that node's backward first.
            x, *outputs = _SegmentFunction.apply(record, segment, x, *inputs, *outputs)
        else:
            x, *own = _SegmentFunction.apply(record, segment, x, *inputs)
            outputs += own
    rest = iter(outputs)
    split_off: list[Tensor] = []
    ledgers: list[Tensor] = []
    log_dets: dict[int, Tensor] = {}
    for segment in segments:
        ledgers.append(next(rest))
        log_dets.update({i: next(rest) for i in segment.groups})
        split_off += islice(rest, segment.split_off)
    ledger = ledgers[0] if len(ledgers) == 1 else torch.cat(ledgers, dim=1)
    return Applied(x, tuple(split_off), ledger, _total(ledger, group_pixels, log_dets))


class _SegmentFunction(torch.autograd.Function):
    """A segment as a node of autograd's graph.

    Its inputs are the state, the latents it joins, the context, its parameters, and other tensors
    that pass through unchanged. Its outputs are the state, those other tensors, the ledger, the
    log_det of each of its groups, and the latents it splits off.
    """

    @staticmethod
    def forward(
        ctx: Any, record: _ForwardRecord, segment: _Segment, x: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        latents, context, parameters, others = _split(
            rest, segment.joined, record.context_length, len(segment.parameters)
        )
        dtype = accumulator(x.dtype)
        folded = {i: record.groups[i].folded(dtype) for i in segment.groups}
        runner = _RecordingRunner(segment.networks, record.owner.checkpoint_every, x.device)
        with torch.autocast(**record.autocast):
            done = execute(segment.instructions, x, latents, folded, context, runner.run)
        ctx.record, ctx.segment, ctx.stored_at = record, segment, list(runner.stored)
        # The backward pass starts from the last state, and ends where no more gradient is needed.
        ctx.starts = segment is record.segments[-1]
        ctx.ends = segment is record.segments[0] or not ctx.needs_input_grad[2]
        first_and_last = (*((done.x,) if ctx.starts else ()), *((x,) if ctx.ends else ()))
        # Saving the parameters lets autograd detect changes in place before the backward pass.
        stored = (t for pair in runner.stored.values() for t in pair)
        ctx.save_for_backward(*first_and_last, *done.latents, *stored, *context, *parameters)
        log_dets = (weights.log_det for weights in folded.values())
        return done.x, *others, done.ledger, *log_dets, *done.latents

    @staticmethod
    def backward(ctx: Any, dx: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ReversibleChain: a reversible backward pass cannot be differentiated again; use "
                "torch.func (grad, vjp, hessian), which stores the states"
            )
        record: _ForwardRecord = ctx.record
        segment: _Segment = ctx.segment
        own = 1 + len(segment.groups) + segment.split_off
        dothers, grads = grads[: len(grads) - own], grads[len(grads) - own :]
        (dledger,), dlog_dets, dlatents = _split(grads, 1, len(segment.groups))
        starts, ends, latents, stored, context, _ = _split(
            ctx.saved_tensors,
            int(ctx.starts),
            int(ctx.ends),
            segment.split_off,
            2 * len(ctx.stored_at),
            record.context_length,
        )
        dlatents = tuple(in_layout_of(*pair) for pair in zip(latents, dlatents, strict=True))
        if starts:
            dx = in_layout_of(starts[0], dx)  # see `keep_layout`
            record.backward = BackwardPass(starts[0], dx, record.groups, context, record.autocast)
        backward = record.backward
        assert backward is not None  # autograd runs the last segment's node first
        djoined = backward.undo(
            segment.instructions,
            segment.networks,
            latents,
            dlatents,
            dict(zip(segment.groups, dlog_dets, strict=True)),
            dledger[:, 0],  # all entries of a row have the gradient of the sample's logdet
            dict(zip(ctx.stored_at, zip(stored[::2], stored[1::2], strict=True), strict=True)),
        )
        sources = [*backward.context, *(p for part in record.segments for p in part.parameters)]
        if not backward.gradients.keys() <= set(map(id, sources)):
            raise_replaced()
        if ends:
            record.backward = None
            if ends[0].numel():
                record.owner.record_drift((backward.x - ends[0]).abs().max())
        dcontext = backward.context_gradients if ends else [None] * record.context_length
        dparameters = (backward.gradients.pop(id(p), None) for p in segment.parameters)
        return None, None, backward.dx, *djoined, *dcontext, *dparameters, *dothers


def _split(tensors: Sequence[Tensor], *lengths: int) -> list[tuple[Tensor, ...]]:
    """Split into consecutive pieces of these lengths, and a last piece with the rest."""
    rest = iter(tensors)
    return [*(tuple(islice(rest, length)) for length in lengths), tuple(rest)]
