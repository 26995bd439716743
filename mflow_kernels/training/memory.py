"""Predicts the peak memory of a training step by arithmetic, without allocating anything.

Notation: a coupling sees C channels on p pixels in a batch of B images; C_a = C // 2 and
C_b = C - C_a. All sizes are bytes. S = 4 B C p is the flow's state (float32). With e bytes per
element of the networks (4, or 2 for bfloat16 and float16), H = e B width p is one hidden layer of
the coupling network and Q = 2 e B C_b p its output.

Held through the whole step: the parameters and buffers of all stages, their running average, and
AdamW's two moments (8 bytes a parameter) for every stage trained so far.

The backward pass visits the coupling networks one by one, and the peak is at one of them. It goes
through the last trained flow first and then, if earlier stages are released, through those before
it. If the objective decodes (in the data domain, unless the manifold has all dimensions), each flow
has two passes, forward and inverse. The backward pass goes through the inverse pass first, and
holds its complete gradients while it computes those of the forward pass. At each network it holds:

    gradients    of the networks that are done.
    ends         the images; and for each pass that is not done, its input, the latents and their
                 gradients: 3 times the state. A reversible pass needs this at any depth.
    kept         S and the network's input for every `checkpoint_every`-th network of each level
                 that is not done.
    stored       only without reversible: for each network not done, S, its input, Q and 2 H; and
                 the weights of all networks in low precision.
    folded       for each step of the levels that are not done, C^2 numbers for W', and 3 C^2 more
                 in the inverse pass for W^-1; and for each step of the current level `INSIDE` C^2,
                 or at its end `LEAVING` C^2. Without reversible, 6 C^2 for each step of all levels,
                 and 5 C^2 more for the inverse pass.
    one step     the rebuilt state and its gradient, 2 S, and their new halves, 8 B C_b p; the
                 network's input, Q and dQ; 4 H (both hidden layers, and at the last ReLU the
                 gradient before and after it); and the network's weights in low precision. The
                 fused kernels (`runs_fused`) hold 3 H, the taps of the input's gradient, and
                 partial sums of the weights' gradients. They, and layers with bias and ReLU inside,
                 hold a packed copy of float32 weights too.

At the end of the forward pass the gradients of the step before still exist, so the peak can be
there. The fused optimizer and the average need no temporary memory. The prediction leaves out what
libraries allocate for themselves (cuDNN, oneDNN), the CUDA context (about 0.5 GB) and fragmentation
in the caching allocator.
"""

import dataclasses
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from mflow_kernels import Glow, VectorFlow
from mflow_kernels.data.named import default_shape
from mflow_kernels.data.splits import count_classes
from mflow_kernels.models.chart import check_manifold_dim
from mflow_kernels.ops.coupling_network_tiles import dh1_tile, dx_taps
from mflow_kernels.ops.launch import HOPPER
from mflow_kernels.runs.config import RunConfig, TrainConfig, check_precision
from mflow_kernels.training.coupling_shapes import (
    FLOAT,
    CouplingShape,
    by_operator,
    coupling_shapes,
    network_bytes,
    network_shape,
    parameter_count,
    partial_sums_bytes,
    runs_fused,
    state_bytes,
)


def _row(label: str) -> int:
    return dataclasses.field(metadata={"label": label})


@dataclass(frozen=True)
class Memory:
    """Bytes in use at one moment of a training step, by purpose."""

    parameters: int = _row("parameters and buffers")
    average: int = _row("averaged weights")
    optimizer: int = _row("optimizer (AdamW)")
    gradients: int = _row("gradients of the parameters")
    ends: int = _row("images, latents and their gradients")
    kept: int = _row("states kept (--checkpoint-every)")
    stored: int = _row("activations stored (--no-reversible)")
    folded: int = _row("folded and inverted weights of the 1x1 convolutions")
    one_step: int = _row("one step of flow: state, network and their gradients")
    stage: int = 0  # stage in training, from 0

    @property
    def total(self) -> int:
        return sum(self.by_label().values())

    def by_label(self) -> dict[str, int]:
        """Return the bytes by their labels for people."""
        rows = [f for f in dataclasses.fields(self) if f.metadata]
        return {f.metadata["label"]: getattr(self, f.name) for f in rows}


def resolve_config(config: TrainConfig, channels: int | None, *, gpu: bool) -> RunConfig:
    """Check a configuration as `mflow train` does, and add the images' shape without reading them.

    Args:
        config: configuration to check; its `data` may be empty.
        channels: channels of the images; by default 3, or those of the named data set.

    Raises:
        ValueError: a value is out of range (the message names the first one), or the number of
            classes cannot be known without reading the images.
    """
    config.check()
    check_precision(config.precision, "cuda" if gpu else "cpu")
    default_channels, default_size = default_shape(config.data)
    channels = channels if channels is not None else default_channels
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    size = config.image_size or default_size
    resolved = config.resolve((channels, size, size))
    if config.classes is not None:
        classes = range(count_classes(config.data, config.classes))
        resolved = dataclasses.replace(resolved, class_names=list(map(str, classes)))
    with torch.device("meta"):  # run the models' own checks without allocating their tensors
        shapes = Glow(resolved.image_shape, config.levels, steps=1, width=1).latent_shapes
        check_manifold_dim(config.manifold_dim, shapes)
        for outer in config.flows[:-1]:
            VectorFlow(outer.dim, steps=1, width=1)
    return resolved


def peak_memory(config: RunConfig) -> Memory:
    """Predict the memory at the peak of training `config`."""
    stages = [coupling_shapes(config, stage) for stage in range(len(config.flows))]
    dims = [config.channels * (config.image_size or 0) ** 2, config.manifold_dim]
    dims += [each.dim for each in config.flows[1:]]
    masks = sum(outer + 8 * inner for outer, inner in pairwise(dims))
    counts = [parameter_count(stage) for stage in stages]
    buffers = sum(n.buffer_bytes for stage in stages for n in stage) + masks
    weights = FLOAT * sum(counts) + buffers
    flows = [
        _Flow(couplings, config.part_size * outer, stage.domain == "data" and inner < outer)
        for couplings, stage, (outer, inner) in zip(
            stages, config.flows, pairwise(dims), strict=True
        )
    ]
    snapshots = []
    for stage in range(len(flows)):
        # The uint8 images of the batch, the data of its other parts, and the trained stage's input
        # unless it is computed with gradients.
        batch = (config.batch_size + FLOAT * (config.batch_size - config.part_size)) * dims[0]
        batch += FLOAT * flows[stage].elements if stage and not config.release else 0
        trained = flows[: stage + 1] if config.release else [flows[stage]]
        for snapshot in _snapshots(config, trained):
            complete = dataclasses.replace(
                snapshot,
                parameters=weights,
                average=weights,
                optimizer=2 * FLOAT * sum(counts[: stage + 1]),
                ends=snapshot.ends + batch,
                stage=stage,
            )
            snapshots.append(complete)
    return max(snapshots, key=lambda memory: memory.total)


def evaluation_memory(config: RunConfig, batch: int) -> int:
    """Predict the memory at the peak of evaluating a trained model in batches of `batch` images.

    Networks compute in float32 and nothing is differentiated. The peak is at a coupling of the
    image flow. These are in memory then:

    - the weights of all stages;
    - the images as they were read, as the flow's input, and as three states or sets of latents;
    - the folded 1x1 convolutions of all levels;
    - 6 C^2 numbers for each step of the widest level, while its convolutions are folded and
      inverted;
    - the network's input, its output and both hidden layers.
    """
    dims = config.channels * (config.image_size or 0) ** 2
    one = dataclasses.replace(config, batch_size=batch, accumulate=1, precision="float32")
    folded, peak = 0, 0
    for stage in range(len(config.flows)):
        flow = _Flow(coupling_shapes(config, stage), 0, False)
        squares = flow.squares.values()
        folded = max(folded, sum(squares) + 6 * max(squares))
        for n in flow.couplings:
            network = n.in_channels + n.out_channels + 2 * n.width
            peak = max(peak, FLOAT * batch * n.pixels * network)
    return peak_memory(one).parameters + batch * dims * (1 + 4 * FLOAT) + folded + peak


def largest_batch(config: RunConfig, memory: int) -> int:
    """Return the largest batch whose predicted peak fits in `memory` bytes; 0 if none does."""

    def fits(batch: int) -> bool:
        whole = dataclasses.replace(config, batch_size=batch * config.accumulate)
        return peak_memory(whole).total <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * config.accumulate


class _Flow(NamedTuple):
    """One stage of a training step."""

    couplings: list[CouplingShape]
    elements: int  # elements in a batch of its data
    decodes: bool  # the inverse pass follows the forward pass

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of all parameters."""
        return FLOAT * parameter_count(self.couplings)

    @property
    def squares(self) -> dict[int, int]:
        """Bytes of the 1x1 convolutions' weights in each level, by its number of channels."""
        squares = {n.channels: 0 for n in self.couplings}
        for n in self.couplings:
            squares[n.channels] += FLOAT * n.channels**2 if n.has_conv1x1 else 0
        return squares


# Numbers of a C x C weight that the backward pass of a level holds beside those of `_Pass.folded`:
# while it undoes steps, the inverse in float64 and float32 and partial sums; at its end, products
# in float64 and the factors' gradients.
INSIDE, LEAVING = 4, 8


class _Pass(NamedTuple):
    """One pass through a flow, with its couplings in the order of the backward pass."""

    flow: _Flow
    inverse: bool
    order: Sequence[int]  # indices into flow.couplings
    kept: set[int]  # couplings whose state is kept

    def folded(self, left: Set[int] = frozenset()) -> int:
        """Bytes of the folded weights that the forward pass holds for the backward pass: W'; in an
        inverse pass also its inverse, in float64 and in float32. Levels with the numbers of
        channels `left` are done."""
        squares = sum(size for c, size in self.flow.squares.items() if c not in left)
        return (4 if self.inverse else 1) * squares


def _passes(config: RunConfig, trained: list[_Flow]) -> list[_Pass]:
    """Return the passes of a training step, in the order of the backward pass."""
    every = config.checkpoint_every if config.reversible else None
    passes = []
    for flow in reversed(trained):
        indices = range(len(flow.couplings))
        for inverse in (True, False) if flow.decodes else (False,):
            order = indices if inverse else indices[::-1]  # the inverse pass starts at the last one
            kept = {i for i in order[::-1][:: every or 1] if every}
            passes.append(_Pass(flow, inverse, order, kept))
    return passes


def _snapshots(config: RunConfig, trained: list[_Flow]) -> Iterator[Memory]:
    """Yield the memory at the end of the forward pass, and at each coupling of the backward pass.

    The flows `trained` train together. Memory that is held through the whole step is left out.
    """
    passes = _passes(config, trained)

    def snapshot(
        done: int, i: int, gradients: int, stored: int, folded: int, one_step: int
    ) -> Memory:
        """Return the memory when `done` passes are done and the next one is at coupling i."""
        current, *others = passes[done:]
        ends = FLOAT * 3 * sum(each.flow.elements for each in (current, *others))
        held = [each.flow.couplings[j] for each in others for j in each.kept]
        held += _kept_at(current, i)
        kept = sum(state_bytes(config, n) + _network_input(config, n) for n in held)
        return Memory(0, 0, 0, gradients, ends, kept, stored, folded, one_step)

    e = network_bytes(config)
    stored = folded = 0
    if config.reversible:
        folded = sum(each.folded() for each in passes)
    else:
        stored = sum(_stored(config, n) for each in passes for n in each.flow.couplings)
        weights = sum(n.parameters for flow in trained for n in flow.couplings)
        stored += e * weights if e < FLOAT or by_operator(config) else 0
        folded = sum((6 + 5 * flow.decodes) * sum(flow.squares.values()) for flow in trained)
    gradients = sum(flow.gradients for flow in trained)
    # The gradients of the step before still exist.
    yield snapshot(0, passes[0].order[0], gradients, stored, folded, 0)
    gradients = 0
    for done, (flow, inverse, order, kept) in enumerate(passes):
        couplings, squares = flow.couplings, flow.squares
        for i in order:
            n = couplings[i]
            level = [
                j for j, m in enumerate(couplings) if m.channels == n.channels and m.has_conv1x1
            ]
            if config.reversible:
                left = {couplings[j].channels for j in order[: order.index(i)]} - {n.channels}
                held = passes[done].folded(left) + sum(p.folded() for p in passes[done + 1 :])
                folded = held + INSIDE * squares[n.channels]
            leaves_level = n.has_conv1x1 and i == level[-1 if inverse else 0]
            conv1x1s = (
                FLOAT * sum(couplings[j].conv1x1_parameters for j in level) if leaves_level else 0
            )
            one_step = _one_step(config, n, i in kept)
            if inverse:
                gradients += conv1x1s
            yield snapshot(done, i, gradients, stored, folded, one_step)
            gradients += FLOAT * n.parameters
            stored -= 0 if config.reversible else _stored(config, n)
            if not inverse:
                gradients += conv1x1s
            if leaves_level and config.reversible:
                folded = held + LEAVING * squares[n.channels]
                yield snapshot(done, i, gradients, stored, folded, 2 * state_bytes(config, n))
        if flow.decodes and not inverse:
            gradients -= flow.gradients  # the gradients of both passes are summed


def _kept_at(each: _Pass, i: int) -> list[CouplingShape]:
    """Return the couplings whose states are kept when a pass has come to coupling i. A level frees
    its states when it is done."""
    couplings = each.flow.couplings
    done = {couplings[j].channels for j in each.order[: each.order.index(i)]}
    done.discard(couplings[i].channels)
    return [couplings[j] for j in each.kept if couplings[j].channels not in done]


def _network_input(config: RunConfig, n: CouplingShape) -> int:
    """Return the bytes of the input of a coupling's network."""
    return network_bytes(config) * config.part_size * (n.channels // 2) * n.pixels


def _stored(config: RunConfig, n: CouplingShape) -> int:
    """Return the bytes that autograd stores for a coupling without reversible."""
    e = network_bytes(config)
    numbers = n.in_channels + n.out_channels + 2 * n.width
    return state_bytes(config, n) + e * config.part_size * n.pixels * numbers


def _one_step(config: RunConfig, n: CouplingShape, kept: bool) -> int:
    """Return the temporary bytes in the backward pass of one coupling."""
    b, p, e = config.part_size, n.pixels, network_bytes(config)
    stored, gradients, sums = 2 * n.width, 2 * n.width, 0
    if runs_fused(config, n):
        s = network_shape(config, n)
        tile = dh1_tile(s, HOPPER)
        taps = dx_taps(s, tile) * -(-s.width // tile.block_d)
        gradients = s.width + (1 + taps) * s.c_in
        sums = partial_sums_bytes(s)
    if not config.reversible:
        # Gradients of the state, of Q and of the hidden layers.
        return 2 * state_bytes(config, n) + e * b * p * (n.out_channels + gradients) + sums
    halves = n.out_channels // 2
    state = (n.channels + halves) if kept else 2 * (n.channels + halves)
    # The network's input, and a copy with the context.
    made = (0 if kept else n.channels // 2) + (n.in_channels if n.context else 0)
    network = made + 2 * n.out_channels + stored + gradients
    weights = e * n.parameters if e < FLOAT or by_operator(config) else 0
    return FLOAT * b * p * state + e * b * p * network + weights + sums
