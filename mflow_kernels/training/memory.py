"""The peak memory of a training step, by arithmetic: nothing is allocated.

Units: a state of C channels on p pixels is S = B C p numbers (float32), a hidden layer of a
coupling network H = B width p, its output Q = 2 B C_b p, in bytes of the networks' precision (4, or
2 in bfloat16 and float16); C_a = C // 2, C_b = C - C_a. P counts the parameters of a stage.

Held through the step: parameters and buffers of all stages, once more as a running average, and
AdamW's two moments of every stage trained so far (8 bytes a parameter).

The backward pass takes the coupling networks one by one; the peak is at one of them. It walks back
the last flow that is trained first, then, where the earlier ones are released, those before it:

    gradients    of the networks that are done. Where the objective decodes (the data domain, with
                 something off the manifold), two passes go through the flow: the inverse's is
                 walked back first, and its gradients, complete, are held while the other makes its
                 own.
    ends         the images, and of each pass not yet done the input, the latents and their
                 gradients: 3 S of the data. A reversible pass holds these whatever its depth.
    kept         S at each `checkpoint_every`-th network, of each pass not yet done.
    stored       where not reversible, of each network not yet done: S, its input, Q and 2 H; and
                 the weights of all in low precision.
    folded       of the steps of one level, 9 C^2 each: 6 for W' and what its gradient needs, 3 for
                 W^-1 (float64) and the sums of dW; and 12 C^2 when these become gradients of W's
                 factors. 12 and 20 C^2 in the pass through the inverse, for a W^-1 with gradients.
                 Where not reversible, of all levels: 6 C^2, and 5 for the pass through the inverse.
    one step     rebuilt state and gradient: 2 S and their new halves, 2 B C_b p; network input, Q
                 and dQ; 4 H (both hidden layers and, at the last ReLU, its gradient before and
                 after); one network's weights in low precision.

The end of the forward pass, which still has the gradients of the step before, counts where it is
larger. The fused optimizer and the average need nothing beside their state. What is not counted:
what libraries allocate for themselves (cuDNN, oneDNN), CUDA's context (about 0.5 GB) and the
fragments of its caching allocator.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from mflow_kernels import Glow, VectorFlow
from mflow_kernels.data.named import default_shape
from mflow_kernels.models.manifold import check_manifold_dim
from mflow_kernels.runs.config import RunConfig, TrainConfig, check_precision

FLOAT = 4


@dataclass(frozen=True)
class Network:
    """A coupling network in its place: C channels on p pixels, and whether a 1x1 convolution of
    its own comes before it (a step) or not (a split)."""

    channels: int
    pixels: int
    width: int
    taps: int  # weights of its first and last layer between two channels: 9, or 1 for vectors
    mixes: bool

    @property
    def out_channels(self) -> int:
        """Of the network: a raw scale and a shift for each channel of the changed half."""
        return 2 * (self.channels - self.channels // 2)

    @property
    def parameters(self) -> int:
        """Of the network alone."""
        c, w, t = self.channels // 2, self.width, self.taps
        return (t * c + 1) * w + (w + 1) * w + (t * w + 1) * self.out_channels

    @property
    def mix_parameters(self) -> int:
        """Of the step's actnorm (2 C) and 1x1 convolution (lower, upper, diagonal)."""
        c = self.channels
        return 2 * c + 2 * c * c + c if self.mixes else 0

    @property
    def buffer_bytes(self) -> int:
        """Permutation, signs and the flag of actnorm."""
        c = self.channels
        return FLOAT * (c * c + c) + 1 if self.mixes else 0


def _row(label: str) -> int:
    return dataclasses.field(metadata={"label": label})


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by what they are for."""

    parameters: int = _row("parameters and buffers")
    average: int = _row("averaged weights")
    optimizer: int = _row("optimizer (AdamW)")
    gradients: int = _row("gradients of the parameters")
    ends: int = _row("images, latents and their gradients")
    kept: int = _row("states kept (--checkpoint-every)")
    stored: int = _row("activations stored (--no-reversible)")
    folded: int = _row("weights of the 1x1 convolutions, folded and inverted")
    one_step: int = _row("one step: state, network and their gradients")
    stage: int = 0  # whose training has the peak, from 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in _rows())


def resolve_config(config: TrainConfig, channels: int | None, *, gpu: bool) -> RunConfig:
    """The configuration with its images' shape, checked as `mflow train` does, reading no image.

    Args:
        config: what to train; its `data` may be empty.
        channels: of the images; by default 3, or those of the named data set.

    Raises:
        ValueError: the first value out of range.
    """
    config.check()
    check_precision(config.precision, "cuda" if gpu else "cpu")
    default_channels, default_size = default_shape(config.data)
    channels = channels if channels is not None else default_channels
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    size = config.image_size or default_size
    resolved = config.resolve((channels, size, size))
    with torch.device("meta"):  # the models' own checks, with no memory behind their tensors
        shapes = Glow(resolved.image_shape, config.levels, steps=1, width=1).latent_shapes
        check_manifold_dim(config.manifold_dim, shapes)
        for outer in config.stages[:-1]:
            VectorFlow(outer.dim, steps=1, width=1)
    return resolved


def networks(config: RunConfig, stage: int) -> list[Network]:
    """The coupling networks of one stage, in the order in which data passes them."""
    if stage:
        before, own = config.stages[stage - 1 : stage + 1]
        return [Network(before.dim, 1, own.width, 1, True)] * own.steps
    found = []
    c, side = config.channels, config.image_size or 0
    for level in range(config.levels):
        c, side = 4 * c, side // 2
        found += [Network(c, side * side, config.width, 9, True)] * config.steps
        if level + 1 < config.levels:
            found.append(Network(c, side * side, config.width, 9, False))
            c //= 2
    return found


def peak_memory(config: RunConfig) -> Memory:
    """The predicted peak of training `config`."""
    found = [networks(config, stage) for stage in range(1 + len(config.stage_dims))]
    dims = [config.channels * (config.image_size or 0) ** 2, config.manifold_dim]
    dims += config.stage_dims
    masks = sum(outer + 8 * inner for outer, inner in pairwise(dims))
    counts = [sum(n.parameters + n.mix_parameters for n in own) for own in found]
    buffers = sum(n.buffer_bytes for own in found for n in own) + masks
    weights = FLOAT * sum(counts) + buffers
    flows = [
        _Flow(own, config.batch_size * outer, stage.domain == "data" and inner < outer)
        for own, stage, (outer, inner) in zip(found, config.stages, pairwise(dims), strict=True)
    ]
    moments = []
    for stage in range(len(flows)):
        # uint8 images and, where it is not computed from them with gradients, what the trained
        # stage is given of them.
        batch = config.batch_size * dims[0]
        batch += FLOAT * flows[stage].image if stage and not config.release else 0
        trained = flows[: stage + 1] if config.release else [flows[stage]]
        for moment in _moments(config, trained):
            held = dataclasses.replace(
                moment,
                parameters=weights,
                average=weights,
                optimizer=2 * FLOAT * sum(counts[: stage + 1]),
                ends=moment.ends + batch,
                stage=stage,
            )
            moments.append(held)
    return max(moments, key=lambda memory: memory.total)


def report(config: RunConfig, gpu: bool, gpu_memory: int | None) -> str:
    """What `mflow plan` prints."""
    peak = peak_memory(config)
    states = (
        "stored" if not config.reversible
        else "rebuilt" if config.checkpoint_every is None
        else f"rebuilt, one in {config.checkpoint_every} kept"
    )  # fmt: skip
    size = config.image_size
    lines = [
        f"Batches of {config.batch_size} images of {config.channels}x{size}x{size}; "
        f"{config.levels} levels of {config.steps} steps, width {config.width}",
        f"states {states}; networks in {config.precision}; penalty in the {config.domain} domain",
        "",
        f"Predicted peak of a training step on a {'GPU' if gpu else 'CPU'}"
        + (f", while stage {peak.stage + 1} trains" if config.stage_dims else ""),
    ]
    labels = {f.metadata["label"]: getattr(peak, f.name) for f in _rows()}
    rows = {label: value for label, value in labels.items() if value} | {"total": peak.total}
    width = max(map(len, rows)) + 2
    lines += [f"  {label:{width}}{_readable(value):>10}" for label, value in rows.items()]
    if gpu_memory is not None:
        batch, room = largest_batch(config, gpu_memory), _readable(gpu_memory)
        fits = "Fits" if config.batch_size <= batch else "Does not fit"
        lines += ["", f"{fits} in {room}. Largest batch in {room}: {batch or 'none fits'}"]
    if gpu:
        lines += [
            "",
            "A prediction: within 10% of peaks measured on a CPU, not verified on a GPU. Leave",
            "room for CUDA's context (about 0.5 GB) and for what cuDNN and the allocator take.",
        ]
    return "\n".join(lines)


def parse_memory(text: str) -> int:
    """Bytes of "80GB", "16GiB" or "900MB"; ValueError for anything else."""
    units = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG]i?B)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"gpu_memory: expected a size such as 80GB or 16GiB, got {text}")
    return int(float(found[1]) * units[found[2].upper()])


def _readable(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.1f} kB"


def _rows() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Memory) if f.metadata]


def largest_batch(config: RunConfig, memory: int) -> int:
    """The largest batch whose predicted peak fits in so many bytes; 0 if none does."""

    def fits(batch: int) -> bool:
        return peak_memory(dataclasses.replace(config, batch_size=batch)).total <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Flow(NamedTuple):
    """What is trained of one stage."""

    found: list[Network]
    image: int  # numbers in a batch of its data
    decodes: bool  # a pass through the inverse follows the one through the flow

    @property
    def gradients(self) -> int:
        """Of all its parameters, bytes."""
        return FLOAT * sum(n.parameters + n.mix_parameters for n in self.found)

    @property
    def squares(self) -> dict[int, int]:
        """Of the weights of each group of steps, by its channels, bytes."""
        squares = {n.channels: 0 for n in self.found}
        for n in self.found:
            squares[n.channels] += FLOAT * n.channels**2 if n.mixes else 0
        return squares


class _Walk(NamedTuple):
    """A pass through a flow, walked back: the ordinals of its networks in that order."""

    flow: _Flow
    decoding: bool
    order: Sequence[int]
    kept: set[int]  # ordinals of the networks whose state was kept


def _walks(config: RunConfig, trained: list[_Flow]) -> list[_Walk]:
    every = config.checkpoint_every if config.reversible else None
    walks = []
    for flow in reversed(trained):
        there = range(len(flow.found))
        # A pass through the inverse ran from the last network to the first.
        for decoding in (True, False) if flow.decodes else (False,):
            order = there if decoding else there[::-1]
            kept = {i for i in order[::-1][:: every or 1] if every}
            walks.append(_Walk(flow, decoding, order, kept))
    return walks


def _moments(config: RunConfig, trained: list[_Flow]) -> Iterator[Memory]:
    """What is held, beyond what is held through the step, as the forward pass ends and through the
    backward pass, by flows that are trained together."""
    walks = _walks(config, trained)

    def held(done: int, gradients: int, left: int, folded: int, one_step: int) -> Memory:
        """With so many of the walks done."""
        ends = FLOAT * 3 * sum(walk.flow.image for walk in walks[done:])
        states = sum(_state(config, walk.flow.found[i]) for walk in walks[done:] for i in walk.kept)
        return Memory(0, 0, 0, gradients, ends, states, left, folded, one_step)

    low = _network_bytes(config)
    left = folded = 0
    if not config.reversible:
        left = sum(_stored(config, n) for walk in walks for n in walk.flow.found)
        weights = sum(n.parameters for flow in trained for n in flow.found)
        left += low * weights if low < FLOAT else 0
        folded = sum((6 + 5 * flow.decodes) * sum(flow.squares.values()) for flow in trained)
    gradients = sum(flow.gradients for flow in trained)
    yield held(0, gradients, left, folded, 0)  # the gradients are those of the step before
    gradients = 0
    for done, (flow, decoding, order, kept) in enumerate(walks):
        found, squares = flow.found, flow.squares
        for i in order:
            n = found[i]
            group = [j for j, m in enumerate(found) if m.channels == n.channels and m.mixes]
            inside, leaving = (12, 20) if decoding else (9, 12)
            # A step's convolution is walked back after its network, or where decoding before it.
            if config.reversible:
                folded = inside * squares[n.channels] if n.mixes and i != group[-1] else 0
            leaves = n.mixes and i == group[-1 if decoding else 0]
            own = FLOAT * sum(found[j].mix_parameters for j in group) if leaves else 0
            moment = _one_step(config, n, i in kept)
            if decoding:
                gradients += own
            yield held(done, gradients, left, folded, moment)
            gradients += FLOAT * n.parameters
            left -= 0 if config.reversible else _stored(config, n)
            if not decoding:
                gradients += own
            if leaves and config.reversible:
                folded = leaving * squares[n.channels]
                yield held(done, gradients, left, folded, 2 * _state(config, n))
        if flow.decodes and not decoding:
            gradients -= flow.gradients  # those of both passes are added


def _state(config: RunConfig, n: Network) -> int:
    return FLOAT * config.batch_size * n.channels * n.pixels


def _stored(config: RunConfig, n: Network) -> int:
    """What autograd keeps of a network and the launches around it."""
    low = _network_bytes(config)
    numbers = n.channels // 2 + n.out_channels + 2 * n.width
    return _state(config, n) + low * config.batch_size * n.pixels * numbers


def _one_step(config: RunConfig, n: Network, kept: bool) -> int:
    """What the backward pass of one network needs beside what is held for others."""
    b, p, low = config.batch_size, n.pixels, _network_bytes(config)
    weights = low * n.parameters if low < FLOAT else 0
    if not config.reversible:
        # The gradient of the state, dQ and the hidden layers' gradient before and after a ReLU.
        return 2 * _state(config, n) + low * b * p * (n.out_channels + 2 * n.width)
    halves = n.out_channels // 2
    state = (n.channels + halves) if kept else 2 * (n.channels + halves)
    network = n.channels // 2 + 2 * n.out_channels + 4 * n.width
    return FLOAT * b * p * state + low * b * p * network + weights


def _network_bytes(config: RunConfig) -> int:
    return FLOAT if config.precision == "float32" else 2
