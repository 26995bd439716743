"""Bytes and floating point operations of a training step on a GPU, by arithmetic.

`training_step` lists the kernels that a step runs on a GPU. Nothing runs and nothing was measured.
`benchmarks.reports.whole_steps` counts the kernels of real steps; a test compares the two.

At one pixel, a coupling network reads A numbers, returns Q numbers, and has H = width numbers in
each hidden tensor. In addition to its weights, it moves this many numbers, in the networks'
precision:

    by torch's layers    forward 12 H + A + 3 Q, backward 16 H + 2 A + 3 Q. Linear layers, whose
                         bias is part of the product, move 8 H + A + Q forward.
    layer by layer       forward 4 H + A + 3 Q (Q for linear layers), with bias and ReLU inside
                         the convolutions; backward as by torch's layers.
    by the fused kernels forward A + 7 Q, and 2 H more where the hidden tensors are stored;
                         backward 4 H (6 H past width 128), A, Q and the taps of the input's
                         gradient.

The fused kernels compute the networks that `ops.coupling_network.fits` accepts, in 16 bits, or in
TF32 if torch's settings allow that. Other networks run layer by layer. If $MFLOW_NETWORK is
"torch", torch's layers compute all of them. (A measurement on the card may also choose them; this
module cannot know that.) A reversible step runs each network once more. The states are in float32.

The list leaves out kernels on a few numbers per sample, validation, and copies from the host.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from mflow_kernels.ops.coupling_network_tiles import Shape, dh1_tile, dx_taps, forward_tile
from mflow_kernels.ops.fastest import requested
from mflow_kernels.ops.launch import HOPPER
from mflow_kernels.runs.config import RunConfig
from mflow_kernels.training.coupling_shapes import (
    FLOAT,
    CouplingShape,
    coupling_shapes,
    network_shape,
    parameter_count,
    partial_sums_bytes,
    runs_fused,
    state_bytes,
)


class Launch(NamedTuple):
    """One kernel: bytes read and written, operations of its products, and their factors' dtype."""

    moved: int
    flops: int = 0
    dtype: torch.dtype = torch.float32


def training_step(config: RunConfig, stage: int) -> list[Launch]:
    """Return the kernels of one optimizer step while `stage` (from 0) trains.

    The earlier stages compute that stage's data, without gradients unless they are released. A
    penalty in the data domain takes a second pass, through the inverse.
    """
    dims = [config.channels * (config.image_size or 0) ** 2]
    dims += [each.dim for each in config.flows]
    launches: list[Launch] = []
    for i, (outer, inner) in enumerate(list(pairwise(dims))[: stage + 1]):
        found = coupling_shapes(config, i)
        if i < stage and not config.release:
            launches += [*_forward(config, found, keep=False)] * config.accumulate
            continue
        decodes = config.flows[i].domain == "data" and inner < outer
        launches += flow_step(config, found) * config.accumulate
        if decodes:
            launches += flow_step(config, found) * config.accumulate
            launches.append(Launch(12 * parameter_count(found)))  # the gradients of both are added
        launches += _update(found)
    return launches


def flow_step(config: RunConfig, found: list[CouplingShape]) -> list[Launch]:
    """Return the kernels of one pass through a flow and back, without the optimizer."""
    launches = list(_forward(config, found, keep=not config.reversible))
    if config.reversible:
        launches += _run_networks(config, found, keep=True)
    for n in found:
        launches += _network_backward(config, n)
        launches += _state_backward(config, n)
    data = state_bytes(config, found[0])
    # The likelihood of the latents and its gradient. A reversible step also copies the latents to
    # start from, and compares the rebuilt data with the original.
    launches += [Launch(data)] * (18 if config.reversible else 10)
    return launches


def _forward(config: RunConfig, found: list[CouplingShape], keep: bool) -> Iterator[Launch]:
    yield from _run_networks(config, found, keep)
    for n in found:
        yield from _state_forward(config, n)
    groups = {n.channels: n for n in found}
    for n in groups.values():
        # The coupling after a level's last convolution, and the copy of the squeeze.
        yield from [Launch(2 * state_bytes(config, n))] * 2


def _run_networks(config: RunConfig, found: list[CouplingShape], keep: bool) -> Iterator[Launch]:
    for n in found:
        yield from _network_forward(config, n, keep)


def _dtype(config: RunConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.precision)
    return dtype


def _network_forward(config: RunConfig, n: CouplingShape, keep: bool) -> Iterator[Launch]:
    s, dtype = network_shape(config, n), _dtype(config)
    e, (w1, w2, w3), (a, q, h), (f1, f2, f3) = _network_sizes(s)
    by_torch = requested() == "torch"
    if e < FLOAT or not by_torch:
        yield Launch((w1 + w2 + w3) * (FLOAT + e) // e)  # packs the weights; rounds to 16 bits
    if runs_fused(config, n):
        tile = forward_tile(s, HOPPER)
        columns = -(-(s.tap_rows * s.c_out - tile.block_r) // tile.block_j)
        blocks = -(-s.width // tile.block_d)
        taps = s.tap_rows * q
        flops = columns * (blocks * f1 + f2) + f3
        yield Launch(a + w1 + w2 + w3 + taps + (2 * h if keep else 0), flops, dtype)
        yield Launch(taps + q)
        return
    bias_pass = s.taps > 1  # a convolution adds its bias in a pass of its own
    for before, after, w, f in ((a, h, w1, f1), (h, h, w2, f2), (h, q, w3, f3)):
        yield Launch(before + w + after, f, dtype)
        if bias_pass and (by_torch or after is q):
            yield Launch(2 * after)
        if after is h and by_torch:
            yield Launch(2 * h)  # ReLU


def _network_backward(config: RunConfig, n: CouplingShape) -> Iterator[Launch]:
    s, dtype = network_shape(config, n), _dtype(config)
    e, (w1, w2, w3), (a, q, h), (f1, f2, f3) = _network_sizes(s)
    if runs_fused(config, n):
        inside = bool(s.sums[1])  # d W2 is among the partial sums
        sums, partial = FLOAT * sum(s.sums), partial_sums_bytes(s)
        tile = dh1_tile(s, HOPPER)
        taps = dx_taps(s, tile) * a * -(-s.width // tile.block_d)
        yield Launch(q + 2 * h + w3 + partial // 2, 2 * f3, dtype)
        yield Launch(
            2 * h + a + w1 + w2 + taps + partial // 2, 2 * f1 + f2 * (2 if inside else 1), dtype
        )
        yield Launch(taps + a)
        yield Launch(partial + sums)
        if not inside:
            yield Launch(2 * h + w2 * FLOAT // e, f2, dtype)
        return
    for before, after, w, f in ((h, q, w3, f3), (h, h, w2, f2), (a, h, w1, f1)):
        yield Launch(after + w + before, f, dtype)  # gradient of the input
        yield Launch(after + w + before, f, dtype)  # gradient of the weight
        yield Launch(after)  # gradient of the bias
        if before is h:
            yield Launch(3 * h)  # gradient of ReLU
    if requested() != "torch":
        yield Launch(2 * (w1 + w2 + w3))  # joins the gradients of the weights
    if e < FLOAT:
        yield Launch((w1 + w2 + w3) * (FLOAT + e) // e)  # converts them to float32


def _network_sizes(s: Shape) -> tuple[int, list[int], list[int], list[int]]:
    """Return the bytes of a number, of each weight, and of the input, the output and a hidden
    tensor, and the operations of the product with each weight."""
    weights = [s.itemsize * out * taps * inner for out, taps, inner in s.weights]
    tensors = [s.itemsize * s.pixels * channels for channels in (s.c_in, s.c_out, s.width)]
    products = [2 * s.pixels * weight // s.itemsize for weight in weights]
    return s.itemsize, weights, tensors, products


def _state_forward(config: RunConfig, n: CouplingShape) -> Iterator[Launch]:
    """Yield the launch of the previous coupling and the 1x1 convolution, or of a split's coupling.

    A second launch folds the weights.
    """
    s, state = network_shape(config, n), state_bytes(config, n)
    net, params = (s.itemsize * s.pixels * channels for channels in (s.c_in, s.c_out))
    products = 2 * s.pixels * n.channels**2
    yield Launch(2 * state + params + net, products if n.has_conv1x1 else 0)
    yield _fold(config, n)


def _state_backward(config: RunConfig, n: CouplingShape) -> Iterator[Launch]:
    s, state = network_shape(config, n), state_bytes(config, n)
    net, params = (s.itemsize * s.pixels * channels for channels in (s.c_in, s.c_out))
    products = 2 * s.pixels * n.channels**2 if n.has_conv1x1 else 0
    if config.reversible:
        # These invert the coupling, invert the convolution, and copy the network's input.
        yield Launch(2 * state + 2 * params)
        yield Launch(3 * state + net, 3 * products)
        yield Launch(state // 2 + net)
    else:
        # The gradient of the state through the coupling and the convolution, and that of W.
        yield Launch(3 * state + 2 * params + net, products)
        yield Launch(2 * state + net, products)
    yield _fold(config, n)


def _fold(config: RunConfig, n: CouplingShape) -> Launch:
    """Return the launch that computes W' from its factors and actnorm, or their gradients.

    It takes about 25 passes over C x C numbers, and as many more for the inverse of a reversible
    step.
    """
    passes = 50 if config.reversible else 25
    return Launch(passes * FLOAT * n.channels**2 if n.has_conv1x1 else 0)


def _update(found: list[CouplingShape]) -> Iterator[Launch]:
    """Yield clipping (12 bytes per parameter), AdamW (28) and the running average (12)."""
    yield from (Launch(size * parameter_count(found)) for size in (12, 28, 12))
