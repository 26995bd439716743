"""Sizes of the couplings of a configured model, and how a GPU computes their networks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mflow_kernels.ops.coupling_network import fits, uses_tf32
from mflow_kernels.ops.coupling_network_tiles import Shape, partial_sums
from mflow_kernels.ops.fastest import requested
from mflow_kernels.runs.config import RunConfig

FLOAT = 4


@dataclass(frozen=True)
class CouplingShape:
    """Sizes of a coupling and its network. In a step of flow, actnorm and a 1x1 convolution come
    before the coupling (`has_conv1x1`); in a split they do not."""

    channels: int
    pixels: int
    width: int
    taps: int  # weights between two channels in the first and last layer: 9 (3x3), or 1 for vectors
    has_conv1x1: bool
    context: int = 0  # further inputs of the network: one for each class
    numbers: int = 2  # outputs of the network for each element that the coupling changes

    @property
    def in_channels(self) -> int:
        """Inputs of the network: the unchanged half and the context."""
        return self.channels // 2 + self.context

    @property
    def out_channels(self) -> int:
        """Outputs of the network: those numbers for each channel of the changed half."""
        return self.numbers * (self.channels - self.channels // 2)

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        c, w, t = self.in_channels, self.width, self.taps
        return (t * c + 1) * w + (w + 1) * w + (t * w + 1) * self.out_channels

    @property
    def conv1x1_parameters(self) -> int:
        """Parameters of the step's actnorm (2 C) and 1x1 convolution (lower, upper, diagonal)."""
        c = self.channels
        return 2 * c + 2 * c * c + c if self.has_conv1x1 else 0

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the permutation, the signs and actnorm's flag."""
        c = self.channels
        return FLOAT * (c * c + c) + 1 if self.has_conv1x1 else 0


def coupling_shapes(config: RunConfig, stage: int) -> list[CouplingShape]:
    """Return the couplings of one stage, in the order of its forward pass."""
    classes, flow = len(config.class_names), config.flows[stage]
    numbers = 2 if flow.coupling == "affine" else 3 * flow.bins - 1
    if stage:
        outer = config.flows[stage - 1].dim
        return [CouplingShape(outer, 1, flow.width, 1, True, classes, numbers)] * flow.steps
    couplings = []
    c, side = config.channels, config.image_size or 0
    for level in range(config.levels):
        c, side = 4 * c, side // 2
        step = CouplingShape(c, side * side, config.width, 9, True, classes, numbers)
        couplings += [step] * config.steps
        if level + 1 < config.levels:
            couplings.append(CouplingShape(c, side * side, config.width, 9, False, classes))
            c //= 2
    return couplings


def parameter_count(couplings: Iterable[CouplingShape]) -> int:
    """Return the number of parameters of these couplings and of the layers before them."""
    return sum(n.parameters + n.conv1x1_parameters for n in couplings)


def state_bytes(config: RunConfig, n: CouplingShape) -> int:
    """Return the bytes of the flow's state at a coupling, for one part of a batch."""
    return FLOAT * config.part_size * n.channels * n.pixels


def network_shape(config: RunConfig, n: CouplingShape) -> Shape:
    """Return the network of a coupling and the images of a part, as the kernels see them."""
    pixels, side = config.part_size * n.pixels, round(n.pixels**0.5)
    itemsize = network_bytes(config)
    return Shape(pixels, side, side, n.in_channels, n.out_channels, n.width, n.taps, itemsize)


def runs_fused(config: RunConfig, n: CouplingShape) -> bool:
    """Whether the fused kernels compute the network of a coupling in training on a GPU. (A
    measurement on the card may choose otherwise.)"""
    known = network_bytes(config) == 2 or uses_tf32(n.taps > 1)
    return by_operator(config) and known and fits(network_shape(config, n))


def by_operator(config: RunConfig) -> bool:
    """Whether `ops.coupling_network` computes the networks, and not torch's layers."""
    return config.device != "cpu" and requested() != "torch"


def partial_sums_bytes(s: Shape) -> int:
    """Return the bytes of the partial sums of the weights' gradients in the fused kernels."""
    *_, numbers = partial_sums(s, True, torch.device("cpu"))
    return FLOAT * numbers


def network_bytes(config: RunConfig) -> int:
    """Return the bytes per element in the coupling networks."""
    return FLOAT if config.precision == "float32" else 2
