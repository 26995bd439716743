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

    def __init__(self, weight: Tensor, bias: Tensor, marked: bool) -> None:
        out_channels, in_channels = weight.shape[:2]
        super().__init__(in_channels, out_channels, 3)
        self.marked = marked
        _fill(self, weight, bias)

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


class _Source:
    """Arrays by name. Errors name the missing array.

    Attributes:
        counted: patterns of names, which count the levels and the steps of a level.
    """

    counted: tuple[str, str]

    def __init__(self, arrays: Weights) -> None:
        self.arrays = arrays

    def sizes(self) -> tuple[int, int]:
        """The number of levels, and of steps in each."""
        levels, steps = (_count(self.arrays, pattern) for pattern in self.counted)
        return levels, steps

    def need(self, name: str, why: str) -> None:
        if name not in self.arrays:
            raise ValueError(f"weights: expected {name!r}: {why}")

    def __getitem__(self, name: str) -> Tensor:
        self.need(name, "is this a checkpoint of a Glow?")
        array = torch.as_tensor(self.arrays[name]).double()
        if not array.isfinite().all():
            raise ValueError(f"weights: {name!r} is not finite: its training diverged")
        return array


class OpenAI(_Source):
    """TensorFlow variables: filters are (H, W, in, out); log-scales are stored divided by 3; shifts
    and scales alternate."""

    counted = "{}/0/actnorm_center/b", "0/{}/actnorm_center/b"
    interleaved = True

    def __init__(self, arrays: Weights, label: int | None) -> None:
        super().__init__(arrays)
        self.label = label

    def step(self, level: int, step: int) -> Step:
        at = f"{level}/{step}"
        self.need(
            f"{at}/invconv/W", "only the learned permutation, flow_permutation 2, is converted"
        )
        return Step(
            self[f"{at}/invconv/W"].t(),  # it multiplies rows
            self.vector(f"{at}/actnorm_center/b"),
            self.log_scale(f"{at}/actnorm_scale/logs"),
            _network(
                self.convolution(f"{at}/f1/l_1"),
                self.convolution(f"{at}/f1/l_2"),
                self.last(f"{at}/f1/l_last"),
            ),
        )

    def prior(self, level: int) -> EdgeConv2d:
        """Return a split's network, from the half that remains to the latent's mean and log sd."""
        return self.last(f"pool{level}/conv")

    def vector(self, name: str) -> Tensor:
        return self[name].flatten()

    def log_scale(self, name: str) -> Tensor:
        return FACTOR * self.vector(name)

    def convolution(self, name: str) -> nn.Conv2d:
        """Return a convolution without bias, and the actnorm after it."""
        weight, bias = self._scaled(name, "actnorm_center/b", "actnorm_scale/logs")
        if weight.shape[2] == 1:
            return _fill(nn.Conv2d(weight.shape[1], weight.shape[0], 1), weight, bias)
        return EdgeConv2d(weight, bias, marked=True)

    def last(self, name: str) -> EdgeConv2d:
        """Return a network's last convolution, whose scale applies after the bias."""
        return EdgeConv2d(*self._scaled(name, "b", "logs"), marked=True)

    def _scaled(self, name: str, bias: str, log_scale: str) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias of a convolution, times the scale that follows."""
        scale = self.log_scale(f"{name}/{log_scale}").exp()
        weight = self[f"{name}/W"].permute(3, 2, 0, 1) * scale[:, None, None, None]
        return weight, self.vector(f"{name}/{bias}") * scale

    def top(self, shape: tuple[int, ...]) -> Tensor:
        """Return mean and log-deviation (2C, H, W) of the coarsest latent."""
        channels, height, width = shape
        top, rows = torch.zeros(2 * channels, height, width), None
        if "prior/p/W" in self.arrays:
            top = self.last("prior/p")(torch.zeros(1, *shape))[0]
        if "prior/y_emb/W" in self.arrays:
            scale = self.log_scale("prior/y_emb/logs").exp()
            rows = (self["prior/y_emb/W"] + self.vector("prior/y_emb/b")) * scale
        return _of_class(top, rows, self.label)


class Rosinality(_Source):
    """A state dictionary, of the model or of a data-parallel wrapper. The first half of a network's
    output is scales, the second shifts."""

    counted = "blocks.{}.flows.0.actnorm.loc", "blocks.0.flows.{}.actnorm.loc"
    interleaved = False

    def __init__(self, arrays: Weights) -> None:
        super().__init__({name.removeprefix("module."): value for name, value in arrays.items()})

    def step(self, level: int, step: int) -> Step:
        at = f"blocks.{level}.flows.{step}"
        scale = self[f"{at}.actnorm.scale"].flatten()  # it may be negative
        return Step(
            self.conv1x1_weight(f"{at}.invconv") * scale.sign(),
            self[f"{at}.actnorm.loc"].flatten(),
            scale.abs().log(),
            _network(
                self.convolution(f"{at}.coupling.net.0"),
                self.convolution(f"{at}.coupling.net.2"),
                self.last(f"{at}.coupling.net.4"),
            ),
        )

    def prior(self, level: int) -> EdgeConv2d:
        return self.last(f"blocks.{level}.prior")

    def top(self, shape: tuple[int, ...]) -> Tensor:
        """Return mean and log-deviation (2C, H, W) of the coarsest latent."""
        levels = _count(self.arrays, self.counted[0])
        top: Tensor = self.prior(levels - 1)(torch.zeros(1, *shape))[0]
        return top

    def convolution(self, name: str) -> nn.Conv2d:
        weight = self[f"{name}.weight"]
        size = weight.shape[2]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], size, padding=size // 2)
        return _fill(conv, weight, self[f"{name}.bias"])

    def last(self, name: str) -> EdgeConv2d:
        scale = (FACTOR * self[f"{name}.scale"].flatten()).exp()
        weight = self[f"{name}.conv.weight"] * scale[:, None, None, None]
        return EdgeConv2d(weight, self[f"{name}.conv.bias"] * scale, marked=False)

    def conv1x1_weight(self, name: str) -> Tensor:
        """Return W (C, C), which the file stores whole or as its factors."""
        if f"{name}.weight" in self.arrays:
            return self[f"{name}.weight"].flatten(1)
        return plu(*(self[f"{name}.{part}"] for part in ("w_p", "w_l", "w_u", "s_sign", "w_s")))


class Chaiyujin(_Source):
    """A state dictionary. Layers of all levels have one number; log-scales of actnorms are stored
    whole, and those of last convolutions divided by 3; shifts and scales alternate."""

    interleaved = True

    def __init__(self, arrays: Weights, label: int | None) -> None:
        super().__init__(arrays)
        self.label = label

    def sizes(self) -> tuple[int, int]:
        """Each level is a squeeze, its steps and, except in the last one, a split."""
        self.steps = _count(self.arrays, "flow.layers.{}.actnorm.bias", first=1)
        levels = 1
        while f"flow.layers.{levels * (self.steps + 2) - 1}.conv.weight" in self.arrays:
            levels += 1
        return levels, self.steps

    def step(self, level: int, step: int) -> Step:
        at = f"flow.layers.{level * (self.steps + 2) + 1 + step}"
        self.need(f"{at}.invconv.weight", "only plain 1x1 convolutions are converted")
        return Step(
            self[f"{at}.invconv.weight"],
            *self.actnorm(at),
            _network(
                self.convolution(f"{at}.f.0"), self.convolution(f"{at}.f.2"), self.last(f"{at}.f.4")
            ),
        )

    def prior(self, level: int) -> nn.Conv2d:
        return self.last(f"flow.layers.{(level + 1) * (self.steps + 2) - 1}.conv")

    def top(self, shape: tuple[int, ...]) -> Tensor:
        """Return mean and log-deviation (2C, H, W) of the coarsest latent."""
        channels, height, width = shape
        top, rows = torch.zeros(2 * channels, height, width), None
        if "learn_top.weight" in self.arrays:
            top = self.last("learn_top")(torch.zeros(1, 2 * channels, height, width))[0]
        if "project_ycond.weight" in self.arrays:
            scale = (FACTOR * self["project_ycond.logs"]).exp()
            rows = (self["project_ycond.weight"].t() + self["project_ycond.bias"]) * scale
        return _of_class(top, rows, self.label)

    def actnorm(self, at: str) -> tuple[Tensor, Tensor]:
        return self[f"{at}.actnorm.bias"].flatten(), self[f"{at}.actnorm.logs"].flatten()

    def convolution(self, name: str) -> nn.Conv2d:
        """A convolution, with the actnorm after it."""
        bias, log_scale = self.actnorm(name)
        return self._conv(name, bias, log_scale.exp())

    def last(self, name: str) -> nn.Conv2d:
        scale = (FACTOR * self[f"{name}.logs"].flatten()).exp()
        return self._conv(name, self[f"{name}.bias"], scale)

    def _conv(self, name: str, bias: Tensor, scale: Tensor) -> nn.Conv2d:
        weight = self[f"{name}.weight"]
        size = weight.shape[2]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], size, padding=size // 2)
        return _fill(conv, weight * scale[:, None, None, None], bias * scale)


def _of_class(top: Tensor, rows: Tensor | None, label: int | None) -> Tensor:
    """Return mean and log-deviation (2C, H, W) plus the row (2C,) of a class, if there are rows."""
    if rows is None:
        if label is not None:
            raise ValueError(f"label: expected None, as these weights have no classes, got {label}")
        return top
    if label is None or not 0 <= label < len(rows):
        raise ValueError(
            f"label: expected a class from 0 to {len(rows) - 1}, as the top latent of these "
            f"weights depends on it, got {label}"
        )
    return top + rows[label][:, None, None]


def _count(weights: Weights, pattern: str, first: int = 0) -> int:
    """Count the names in `weights` among `pattern.format(n)`, from n = `first` on."""
    count = 0
    while pattern.format(first + count) in weights:
        count += 1
    if not count:
        raise ValueError(f"weights: expected {pattern.format(first)!r}, which is missing")
    return count


def _fill(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    return conv


def _network(first: nn.Conv2d, second: nn.Conv2d, last: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), last)
