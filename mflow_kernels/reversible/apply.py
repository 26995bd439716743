"""Runs programs under autograd. Their states are stored, or rebuilt in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.layouts import in_layout_of
from mflow_kernels.ops.logdet import sum_ledger
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.reversible.again import differentiate
from mflow_kernels.reversible.backward import BackwardPass, Stored, as_leaves
from mflow_kernels.reversible.draws import random_state, same_random_state
from mflow_kernels.reversible.graph import without_hooks
from mflow_kernels.reversible.instructions import Call, FoldedWeights, ForwardPass, Instruction
from mflow_kernels.reversible.modes import autocast_state
from mflow_kernels.reversible.modules import tensors
from mflow_kernels.reversible.program import Program, keep_layout
from mflow_kernels.reversible.rerun import RerunCall, check_repeats


class Result(NamedTuple):
    """The result of a program."""

    x: Tensor  # the state, in the dtype of the input
    latents: tuple[Tensor, ...]  # in the order in which they were split off
    ledger: Tensor  # (N, T), terms of the log-determinant of each sample
    constant: Tensor | None  # (), the part of it that all samples share, if there is one

    @property
    def logdet(self) -> Tensor:
        """(N,)"""
        return sum_ledger(self.ledger, self.constant)


def apply_stored(
    program: Program, x: Tensor, latents: Sequence[Tensor], context: Sequence[Tensor]
) -> Result:
    """Run a program with states that autograd stores.

    Args:
        x: state (N, C, *spatial), checked.
        latents: the latents that `Join` instructions append, taken from the end.
        context: further inputs of every network and layer.

    Returns:
        See `Result`. Log-determinants are float32 (float64 for float64 states).

    Raises:
        ValueError: a weight has no inverse, and the program needs it. Only checked while no
            gradients are recorded.
    """
    dtype, check = accumulator(x.dtype), not torch.is_grad_enabled()
    forward = ForwardPass(x, list(latents), context)
    folded = [None if i.loops(x) else i.fold(dtype, check=check) for i in program.instructions]
    found = _run(program.instructions, folded, forward)
    if len(program.instructions) > 1:
        keep_layout(forward.x)
    terms = _terms(forward.x, forward.ledger, _shared(folded, found))
    return Result(forward.x, tuple(forward.latents), *terms)


def apply_reversibly(
    program: Program,
    x: Tensor,
    latents: Sequence[Tensor],
    context: Sequence[Tensor],
    checkpoint_every: int | None,
    record_drift: Callable[[Tensor], None],
) -> Result:
    """Run a program with states that the backward pass rebuilds, if gradients are recorded.

    Args:
        x, latents, context: as for `apply_stored`, which runs if no gradients are recorded, and in
            transforms of torch.func.
        checkpoint_every: store the state before every k-th call of a network or layer, and the
            input of that call; None stores none.
        record_drift: receives the drift of the program's input and of all stored states, a scalar
            tensor, at the end of a backward pass (see `BackwardPass.drift`).

    Raises:
        ValueError: as `apply_stored`.
        RuntimeError: a network or layer depends on tensors for which the backward pass has no
            gradient. In the backward pass: a parameter was replaced after the forward pass.
    """
    if not torch.is_grad_enabled() or transformed():
        return apply_stored(program, x, latents, context)
    return _apply_reversibly(program, x, latents, context, checkpoint_every, record_drift)


def _run(
    instructions: Sequence[Instruction],
    folded: Sequence[FoldedWeights | None],
    forward: ForwardPass,
) -> list[int | Tensor]:
    """Run instructions; return the number of pixels to which each applies its linear maps."""
    found: list[int | Tensor] = []
    for instruction, weights in zip(instructions, folded, strict=True):
        found.append(instruction.pixels(forward))
        instruction.run(forward, weights)
    return found


def _shared(folded: Sequence[FoldedWeights | None], found: Sequence[int | Tensor]) -> list[Tensor]:
    """The log-determinants of linear maps, for all of their pixels: (), or (N,) with a mask."""
    return [n * f.log_det for f, n in zip(folded, found, strict=True) if f is not None]


def _terms(
    x: Tensor, ledgers: Sequence[Tensor], shared: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The terms of the log-determinant of each sample (N, T), and of all samples ()."""
    ledgers = [*ledgers, *(part[:, None] for part in shared if part.dim())]
    if not ledgers:
        ledgers = [x.new_zeros((x.shape[0], 1), dtype=accumulator(x.dtype))]
    constants = [part for part in shared if not part.dim()]
    ledger = ledgers[0] if len(ledgers) == 1 else torch.cat([*ledgers], dim=1)
    return ledger, sum(constants[1:], constants[0]) if constants else None


@dataclass(kw_only=True)
class _RecordingPass(ForwardPass):
    """A forward pass without gradients, which stores every k-th state and what each call draws."""

    ordinals: "count[int]"
    every: int | None
    calls: list[RerunCall] = field(default_factory=list)
    stored: dict[int, Stored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random_state(self.x.device)

    def call(self, call: Call, x: Tensor, module_input: Tensor) -> Any:
        again = RerunCall(call, next(self.ordinals))
        self.calls.append(again)
        if self.every is not None and again.ordinal % self.every == 0:
            self.stored[again.ordinal] = Stored(x, module_input)
        result = again.first_run(module_input, self.context)
        # Only modules draw random numbers, so each starts from the state that the last one left.
        random = random_state(x.device)
        if again.drawn is None and not same_random_state(self._random, random):
            # It begins to draw, or another thread does: run it once more, and record.
            result = again.first_run(module_input, self.context, draws=True)
            random = random_state(x.device)
        self._random = random
        return result

    def check_inverse(self, x: Tensor) -> None:
        self.calls[-1].check_inverse(x, self.x, self.context)


@dataclass(kw_only=True)
class _RepeatingPass(ForwardPass):
    """A forward pass with gradients, in which each call repeats its first run.

    The results of the calls may depend on `leaves`.
    """

    calls: Iterator[RerunCall]
    leaves: Sequence[Tensor]

    def call(self, call: Call, x: Tensor, module_input: Tensor) -> Any:
        again = next(self.calls)
        result = again.run_again(module_input, self.context)
        again.check_sources(tensors(result), self.leaves)
        return result


@dataclass(eq=False)
class _Segment:
    """A part of a program that is one node of autograd's graph.

    The backward pass completes the gradients of its parameters before it enters the segment before
    it, so that DistributedDataParallel can exchange them early.

    Attributes:
        folds: for each instruction, whether it has linear maps. Autograd differentiates these.
        calls: the calls of its instructions.
        sources: the leaves to which its node passes gradients. A leaf that several segments use
            belongs to the first of them, which is undone last.
        last: whether it is the last part.
        joins, splits: the number of latents that it appends to the state and splits off it.
    """

    instructions: Sequence[Instruction]
    folds: list[bool]
    calls: list[RerunCall]
    sources: list[Tensor]
    last: bool
    joins: int
    splits: int


@dataclass
class _Record:
    """Data that the nodes of all segments share.

    Attributes:
        task: the pass of autograd's engine that the other attributes belong to.
        backward: the backward pass itself.
        dx: the gradient that the node before returned for its state. Any other gradient of that
            state has further parts, from gradients that are being differentiated again.
        gradients: of leaves, by id, from nodes that did not take part in `backward`.
    """

    record_drift: Callable[[Tensor], None]
    autocast: dict[str, Any]
    segments: list[_Segment] = field(default_factory=list)
    task: int = -1
    backward: BackwardPass | None = None
    dx: Tensor | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def enter(self) -> None:
        """Forget what an earlier pass of autograd's engine has left."""
        task = torch._C._current_graph_task_id()
        if self.task != task:
            self.task, self.backward, self.dx, self.gradients = task, None, None, {}


@torch.compiler.disable(
    reason="a reversible chain rebuilds states in a backward pass of its own; compile with "
    "reversible=False, or without fullgraph"
)
def _apply_reversibly(
    program: Program,
    x: Tensor,
    latents: Sequence[Tensor],
    context: Sequence[Tensor],
    checkpoint_every: int | None,
    record_drift: Callable[[Tensor], None],
) -> Result:
    dtype, waiting, ordinals, seen = accumulator(x.dtype), list(latents), count(), set[int]()
    record = _Record(record_drift, autocast_state(x.device))
    outputs: tuple[Tensor, ...] = ()
    shared: list[Tensor] = []
    detached = as_leaves(context)
    parts = program.segments()
    for part in parts:
        # Folded just before its segment, so that autograd differentiates it just after.
        folded = [i.fold(dtype) for i in part]
        joins = 0
        for instruction in part:
            joins += instruction.joins
        first = len(waiting) - joins
        joined, waiting = waiting[first:], waiting[:first]
        given = x.detach(), [z.detach() for z in joined], detached
        forward = _RecordingPass(*given, ordinals=ordinals, every=checkpoint_every)
        with torch.no_grad(), torch.autocast(**record.autocast):
            shared_pixels = _run(part, folded, forward)
        shared += _shared(folded, shared_pixels)
        sources: dict[int, Tensor] = {}
        for call in forward.calls:
            for t in call.sources:
                if id(t) not in seen:
                    sources[id(t)] = t
        seen.update(sources)
        folds = [f is not None for f in folded]
        last = part is parts[-1]
        splits = len(forward.latents)
        segment = _Segment(part, folds, forward.calls, [*sources.values()], last, joins, splits)
        record.segments.append(segment)
        weights: list[Tensor] = []
        for f in folded:
            if f is not None:
                weights += f.weight, f.bias
        # All outputs pass through the last node, so autograd runs that node's backward first.
        others = outputs if last else ()
        x, *own = _SegmentFunction.apply(
            record, segment, forward, x, *joined, *context, *weights, *segment.sources, *others
        )
        outputs = (*outputs[len(others) :], *own)
    rest = iter(outputs)
    ledgers: list[Tensor] = []
    split_off: list[Tensor] = []
    for segment in record.segments:
        ledgers.append(next(rest))
        split_off += islice(rest, segment.splits)
    return Result(x, tuple(split_off), *_terms(x, ledgers, shared))


class _SegmentFunction(torch.autograd.Function):
    """A segment, which has run already, as a node of autograd's graph.

    Its inputs are the state, the latents it joins, the context, the weights and biases of its
    linear maps, its sources, and other tensors that pass through unchanged. Its outputs are the
    state, those other tensors, the ledger, and the latents it splits off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        record: _Record,
        segment: _Segment,
        forward: _RecordingPass,
        x: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        weights_and_biases = 2 * sum(segment.folds)
        ctx.lengths = len(forward.context), weights_and_biases, len(segment.sources)
        joined, context, weights, sources, others = _split(rest, segment.joins, *ctx.lengths)
        ctx.record, ctx.segment, ctx.stored_at = record, segment, list(forward.stored)
        # The backward pass starts from the last state, and ends where no more gradient is needed.
        ctx.starts = segment.last
        ctx.ends = segment is record.segments[0] or not ctx.needs_input_grad[3]
        stored = [*chain.from_iterable(forward.stored.values())]
        # Saving sources and buffers lets autograd detect changes in place before the backward pass.
        buffers: dict[int, Tensor] = {}
        for call in forward.calls:
            for b in call.buffers:
                buffers[id(b)] = b
        # Only a gradient that is to be differentiated again needs x and the joined latents of all
        # segments. Their inputs have fewer numbers than two states together.
        ctx.save_for_backward(
            *(x, *joined, *context, *weights, *sources),
            *((forward.x,) if ctx.starts else ()),
            *(*forward.latents, *stored, *buffers.values()),
        )
        ledger, _ = _terms(forward.x, forward.ledger, ())
        return forward.x, *others, ledger, *forward.latents

    @staticmethod
    @torch.compiler.disable  # a compiled function may call backward()
    def backward(ctx: Any, dx: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        record: _Record = ctx.record
        segment: _Segment = ctx.segment
        own = len(grads) - 1 - segment.splits
        dothers, (dledger, *dlatents) = grads[:own], grads[own:]
        inputs, starts, latents, stored, _ = _split(
            ctx.saved_tensors,
            1 + segment.joins + sum(ctx.lengths),
            int(ctx.starts),
            segment.splits,
            2 * len(ctx.stored_at),
        )
        record.enter()
        if torch.is_grad_enabled() or not (ctx.starts or dx is record.dx):
            return *_gradients_again(ctx, inputs, (dx, dledger, *dlatents)), *dothers
        (first_state, *_), context, weights, _ = _split(inputs, 1 + segment.joins, *ctx.lengths[:2])
        dlatents = [*map(in_layout_of, latents, dlatents)]
        if starts:
            dx = in_layout_of(starts[0], dx)  # see `keep_layout`
            record.backward = BackwardPass(starts[0], dx, context, record.autocast)
        backward = record.backward
        assert backward is not None
        # `requires_grad` of the copies tells the instructions which gradients are needed.
        first = 4 + segment.joins + len(context)
        needed = ctx.needs_input_grad[first : first + len(weights)]
        pairs = iter([w.detach().requires_grad_(n) for w, n in zip(weights, needed, strict=True)])
        dweights = backward.undo(
            segment.instructions,
            [(next(pairs), next(pairs)) if has else None for has in segment.folds],
            segment.calls,
            dict(zip(ctx.stored_at, map(Stored, stored[::2], stored[1::2]), strict=True)),
            list(zip(latents, dlatents, strict=True)),
            dledger[:, 0],  # all entries of a row have the gradient of the sample's logdet
        )
        x, dx = backward.whole()
        record.dx = dx
        if ctx.ends:
            record.backward = record.dx = None
            backward.compare([x], first_state)
            if backward.drift is not None:
                record.record_drift(backward.drift)
        gradients = backward.gradients
        dcontext = [gradients.get(id(c)) if ctx.ends else None for c in backward.context]
        dsources = [gradients.pop(id(t), None) for t in segment.sources]
        return (
            *(None, None, None, dx, *backward.joined, *dcontext),
            *chain.from_iterable(pair for pair in dweights if pair is not None),
            *(*dsources, *dothers),
        )


def _gradients_again(
    ctx: Any, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of a segment's inputs, which can be differentiated again.

    The segment runs once more, as if it stored its states, and autograd differentiates it.
    """
    record: _Record = ctx.record
    segment: _Segment = ctx.segment
    lengths = 1 + segment.joins, *ctx.lengths[:2]
    given = inputs[: sum(lengths)]
    needed = ctx.needs_input_grad[3 : 3 + len(given)]
    pairs = zip(given, needed, strict=True)
    copies = [None if t is None else t.detach().requires_grad_(n) for t, n in pairs]
    sources = list({id(t): t for call in segment.calls for t in call.sources}.values())
    (x, *joined), context, weights, _ = _split(copies, *lengths)
    leaves = [*copies, *sources]
    forward = _RepeatingPass(x, joined, context, calls=iter(segment.calls), leaves=leaves)
    rows, no_log_det = iter(weights), x.new_zeros(())
    folded = [
        FoldedWeights(next(rows), next(rows), no_log_det) if has else None for has in segment.folds
    ]
    with ExitStack() as stack:
        for call in segment.calls:
            stack.enter_context(call.trained_as_in_forward())
        with torch.enable_grad(), torch.autocast(**record.autocast):
            _run(segment.instructions, folded, forward)
            results = forward.x, _terms(forward.x, forward.ledger, ())[0], *forward.latents
        check_repeats(segment.calls[::-1])
        with without_hooks([t for t in sources if t._backward_hooks]):
            found = differentiate(results, leaves, [*given, *sources], cotangents)
    of_given, total = found[: len(given)], record.gradients
    if record.backward is not None:  # it undid the later segments
        left, first = record.backward.gradients, 1 + segment.joins
        for i, copy in enumerate(record.backward.context, start=first):
            of_given[i] = _sum(of_given[i], left.pop(id(copy), None))
        total.update(left)
        record.backward = record.dx = None
    for source, gradient in zip(sources, found[len(given) :], strict=True):
        if gradient is not None:
            total[id(source)] = _sum(gradient, total.get(id(source)))
    own = [total.pop(id(t), None) for t in segment.sources]
    return None, None, None, *of_given, *own


def _sum(a: Any, b: Tensor | None) -> Any:
    """The sum of two gradients, of which each may be None."""
    return a if b is None else b if a is None else a + b


def _split(tensors: Sequence[Tensor], *lengths: int) -> list[tuple[Tensor, ...]]:
    """Split into consecutive pieces of these lengths, and a last piece with the rest."""
    pieces, start = [], 0
    for length in lengths:
        pieces.append(tuple(tensors[start : start + length]))
        start += length
    return [*pieces, tuple(tensors[start:])]
