"""How openai/glow, rosinality/glow-pytorch and chaiyujin/glow-pytorch store weights.

Scales of convolutions (actnorms inside networks, exp(3 * logs)) are folded into the weights.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.layers.conv1x1 import plu

Weights = Mapping[str, Any]
FACTOR = 3.0  # all store a third of the log-scales of last convolutions ("logscale_factor")


class EdgeConv2d(nn.Conv2d):
    """A padded 3x3 convolution that sees the border of the image.

    With `marked`, the last input channel is 1 outside the image and 0 inside, as in openai/glow.
    Otherwise the state is padded with ones, as in rosinality/glow-pytorch.
    """

    def __init__(self, in_channels: int, out_channels: int, marked: bool) -> None:
        super().__init__(in_channels, out_channels, 3)
        self.marked = marked

    def forward(self, x: Tensor) -> Tensor:
        if self.marked:
            inside = x.new_ones(1, 1, *x.shape[2:])
            mark = 1 - F.pad(inside, [1, 1, 1, 1])
            x = F.pad(x, [1, 1, 1, 1])
            x = torch.cat([x, mark.expand(x.shape[0], -1, -1, -1)], dim=1)
        else:
            x = F.pad(x, [1, 1, 1, 1], value=1.0)
        return super().forward(x)


class Step(NamedTuple):
    """A step of flow: y = W x, the actnorm exp(log_scale) * (x + bias), the coupling network."""

    weight: Tensor
    bias: Tensor
    log_scale: Tensor
    net: nn.Sequential


class Layout:
    """Arrays by name, and what they are called. Errors name the missing array.

    Args:
        label: the class whose coarsest latent is wanted.

    Attributes:
        counted: patterns of names, which count the levels and the steps of a level.
        at, split: patterns of the names of a step, and of the network of a split.
        top: the name of the network that gives the coarsest latent's mean and log-deviation from
            zeros. Weights may lack it. None if it is called as that of a split.
        classes: the names of the matrix, bias and log-scale that give what a class adds to these.
        network: the convolutions of a step, by their names after that of the step.
        matrix, actnorm, kernel, last: names after that of the layer: of a 1x1 convolution's matrix,
            of an actnorm's bias and log-scale, of a convolution's weight, and of the weight, bias
            and log-scale of a last convolution, whose scale applies after the bias.
        converted: which 1x1 convolutions are converted, as an error says it.
        factor: of the log-scales of actnorms.
        edge: as for `_conv`.
        interleaved: whether shifts and scales alternate in a network's output. Otherwise the first
            half is scales, the second shifts.
    """

    counted: tuple[str, str]
    at: str
    split: str
    top: str | None = None
    classes: tuple[str, str, str] | None = None
    network: tuple[str, str, str]
    matrix: str
    actnorm: tuple[str, str]
    kernel: str
    last: tuple[str, str, str]
    converted = "only plain 1x1 convolutions are converted"
    factor = 1.0
    edge = "zeros"
    interleaved = True

    def __init__(self, arrays: Weights, label: int | None = None) -> None:
        self.arrays, self.label = arrays, label
        self.levels, self.steps = self.sizes()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.arrays:
            is_matrix = name.endswith(self.matrix)
            why = self.converted if is_matrix else "is this a checkpoint of a Glow?"
            raise ValueError(f"weights: expected {name!r}: {why}")
        array = torch.as_tensor(self.arrays[name]).double()
        if not array.isfinite().all():
            raise ValueError(f"weights: {name!r} is not finite: its training diverged")
        return array

    def sizes(self) -> tuple[int, int]:
        """The number of levels, and of steps in each."""
        levels, steps = (_count(self.arrays, pattern) for pattern in self.counted)
        return levels, steps

    def step(self, level: int, step: int) -> Step:
        at = self._name(self.at, level, step)
        first, second, last = (at + name for name in self.network)
        net = nn.Sequential(
            self.convolution(first),
            nn.ReLU(inplace=True),
            self.convolution(second),
            nn.ReLU(inplace=True),
            self.last_convolution(last),
        )
        return Step(self.conv1x1(at), *self.scale_and_bias(at), net)

    def prior(self, level: int) -> nn.Conv2d:
        """Return a split's network, from the half that remains to the latent's mean and log sd."""
        return self.last_convolution(self._name(self.split, level, self.steps))

    def top_latent(self, shape: tuple[int, ...]) -> Tensor:
        """Return mean and log-deviation (2C, H, W) of the coarsest latent."""
        channels, *sides = shape
        top = torch.zeros(2 * channels, *sides)
        conv = None
        if self.top is None:
            conv = self.prior(self.levels - 1)
        elif self.top + self.last[0] in self.arrays:
            conv = self.last_convolution(self.top)
        if conv is not None:
            marks = self.edge == "marked"
            top = conv(torch.zeros(1, conv.in_channels - marks, *sides))[0]
        if self.classes is None or self.classes[0] not in self.arrays:
            if self.label is not None:
                raise ValueError(
                    f"label: expected None, as these weights have no classes, got {self.label}"
                )
            return top
        matrix, bias, logs = self.classes
        rows = self.weight(matrix).t() + self[bias].flatten()
        if self.label is None or not 0 <= self.label < len(rows):
            raise ValueError(
                f"label: expected a class from 0 to {len(rows) - 1}, as the top latent of these "
                f"weights depends on it, got {self.label}"
            )
        scale = (FACTOR * self[logs].flatten()).exp()
        return top + (rows[self.label] * scale)[:, None, None]

    def weight(self, name: str) -> Tensor:
        """The weight (out, in, ...) of a matrix or convolution."""
        return self[name]

    def conv1x1(self, at: str) -> Tensor:
        return self.weight(at + self.matrix)

    def scale_and_bias(self, at: str) -> tuple[Tensor, Tensor]:
        """The bias and the log-scale (C,) of an actnorm."""
        bias, logs = (self[at + name].flatten() for name in self.actnorm)
        return bias, self.factor * logs

    def convolution(self, name: str) -> nn.Conv2d:
        """A convolution, with the actnorm after it."""
        return _conv(self.weight(name + self.kernel), *self.scale_and_bias(name), self.edge)

    def last_convolution(self, name: str) -> nn.Conv2d:
        weight, bias, logs = (name + end for end in self.last)
        return _conv(self.weight(weight), self[bias], FACTOR * self[logs], self.edge)

    def _name(self, pattern: str, level: int, step: int) -> str:
        return pattern.format(level=level, step=step)


class OpenAI(Layout):
    """TensorFlow variables: weights are (..., in, out), and all log-scales are divided by 3."""

    counted = "{}/0/actnorm_center/b", "0/{}/actnorm_center/b"
    at, split, top = "{level}/{step}", "pool{level}/conv", "prior/p"
    classes = "prior/y_emb/W", "prior/y_emb/b", "prior/y_emb/logs"
    network = "/f1/l_1", "/f1/l_2", "/f1/l_last"
    matrix, kernel, last = "/invconv/W", "/W", ("/W", "/b", "/logs")
    actnorm = "/actnorm_center/b", "/actnorm_scale/logs"
    converted = "only the learned permutation, flow_permutation 2, is converted"
    factor, edge = FACTOR, "marked"

    def weight(self, name: str) -> Tensor:
        return self[name].movedim(-1, 0).movedim(-1, 1)


class Rosinality(Layout):
    """A state dictionary, of the model or of a data-parallel wrapper. Scales are stored whole."""

    counted = "blocks.{}.flows.0.actnorm.loc", "blocks.0.flows.{}.actnorm.loc"
    at, split = "blocks.{level}.flows.{step}", "blocks.{level}.prior"
    network = ".coupling.net.0", ".coupling.net.2", ".coupling.net.4"
    matrix, kernel, last = ".invconv.weight", ".weight", (".conv.weight", ".conv.bias", ".scale")
    actnorm = ".actnorm.loc", ".actnorm.scale"
    edge, interleaved = "ones", False

    def __init__(self, arrays: Weights) -> None:
        super().__init__({name.removeprefix("module."): value for name, value in arrays.items()})

    def conv1x1(self, at: str) -> Tensor:
        """W, which is stored whole or as its factors, with the signs of the actnorm's scales."""
        if at + self.matrix in self.arrays:
            weight = self[at + self.matrix].flatten(1)
        else:
            names = ("w_p", "w_l", "w_u", "s_sign", "w_s")
            weight = plu(*(self[f"{at}.invconv.{name}"] for name in names))
        return weight * self[at + self.actnorm[1]].flatten().sign()

    def scale_and_bias(self, at: str) -> tuple[Tensor, Tensor]:
        bias, scale = (self[at + name].flatten() for name in self.actnorm)
        return bias, scale.abs().log()

    def convolution(self, name: str) -> nn.Conv2d:
        bias = self[f"{name}.bias"]
        return _conv(self[f"{name}.weight"], bias, torch.zeros_like(bias))


class Chaiyujin(Layout):
    """A state dictionary. Layers of all levels have one number. A level is a squeeze, its steps
    and, except in the last one, a split."""

    at, split, top = "flow.layers.{}", "flow.layers.{}.conv", "learn_top"
    classes = "project_ycond.weight", "project_ycond.bias", "project_ycond.logs"
    network = ".f.0", ".f.2", ".f.4"
    matrix, kernel, last = ".invconv.weight", ".weight", (".weight", ".bias", ".logs")
    actnorm = ".actnorm.bias", ".actnorm.logs"

    def sizes(self) -> tuple[int, int]:
        self.steps = _count(self.arrays, "flow.layers.{}.actnorm.bias", first=1)
        levels = 1
        while self._name(self.split, levels - 1, self.steps) + ".weight" in self.arrays:
            levels += 1
        return levels, self.steps

    def _name(self, pattern: str, level: int, step: int) -> str:
        return pattern.format(level * (self.steps + 2) + 1 + step)


def _count(weights: Weights, pattern: str, first: int = 0) -> int:
    """Count the names in `weights` among `pattern.format(n)`, from n = `first` on."""
    count = 0
    while pattern.format(first + count) in weights:
        count += 1
    if not count:
        raise ValueError(f"weights: expected {pattern.format(first)!r}, which is missing")
    return count


def _conv(weight: Tensor, bias: Tensor, log_scale: Tensor, edge: str = "zeros") -> nn.Conv2d:
    """Return a convolution times exp(log_scale). A 3x3 one pads images with zeros, with "ones" or
    with zeros that a further channel marks ("marked")."""
    out_channels, in_channels, size = weight.shape[:3]
    if edge == "zeros" or size == 1:
        conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    else:
        conv = EdgeConv2d(in_channels, out_channels, edge == "marked")
    scale = log_scale.flatten().exp()
    with torch.no_grad():
        conv.weight.copy_(weight * scale[:, None, None, None])
        assert conv.bias is not None
        conv.bias.copy_(bias.flatten() * scale)
    return conv
