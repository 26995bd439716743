"""Weights of openai/glow and of rosinality/glow-pytorch, as a `Glow` of ours.

What is theirs alone is kept: their convolutions see where the image ends, and their coarsest latent
has a learned Gaussian, which here is one more affine map, so that every latent is standard normal.
What only scales a convolution (their actnorms inside networks, exp(3 * logs)) folds into it.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.interop.params import Params
from mflow_kernels.layers import FlowStep, Split
from mflow_kernels.models.glow import Glow
from mflow_kernels.ops.scale import ScaleFunction

Weights = Mapping[str, Any]
_GLOW = ScaleFunction("sigmoid", offset=2.0)
_EXP = ScaleFunction("exp")
FACTOR = 3.0  # both learn a third of a log-scale, "logscale_factor"


class EdgeConv2d(nn.Conv2d):
    """A 3x3 convolution, padded, that can tell the edge of the image.

    With `marked` the last input channel is 1 outside the image and 0 in it, as in openai/glow; else
    the state is padded by 1, as in rosinality/glow-pytorch.
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
            x = torch.cat([x, mark.expand(len(x), -1, -1, -1)], dim=1)
        else:
            x = F.pad(x, [1, 1, 1, 1], value=1.0)
        return super().forward(x)


class PublishedGlow(Glow):
    """`Glow` whose coarsest latent has a mean and a deviation of its own for each number.

    `top_mean`, `top_log_sd` (C, H, W): the latent returned is (z - mean) * exp(-log_sd).
    """

    def __init__(self, image_shape: tuple[int, int, int], levels: int, steps: int) -> None:
        super().__init__(image_shape, levels, steps, width=1)
        self.top_mean = nn.Parameter(torch.zeros(self.latent_shapes[-1]))
        self.top_log_sd = nn.Parameter(torch.zeros(self.latent_shapes[-1]))

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (*fine, top), logdet = super().forward(x, *context)
        top = (top - self.top_mean) * torch.exp(-self.top_log_sd)
        return (*fine, top), logdet - self.top_log_sd.sum()

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Nothing is to be set: the weights came with the scales of their actnorms."""
        return self(x, *context)

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        *fine, top = z
        top = top * torch.exp(self.top_log_sd) + self.top_mean
        x, logdet = super().inverse((*fine, top), *context)
        return x, logdet + self.top_log_sd.sum()


def glow_from_openai(
    weights: str | PathLike[str] | Weights,
    image_shape: tuple[int, int, int],
    *,
    label: int | None = None,
) -> PublishedGlow:
    """A model with the weights of openai/glow.

    Args:
        weights: an .npz of the checkpoint's variables under their names, or such a mapping to
            arrays; what an optimizer or an average added to it is ignored. From TensorFlow:
            `r = tf.train.load_checkpoint(path)`,
            `np.savez(out, **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})`.
        image_shape: (C, H, W). The model takes images as theirs: x / 2 ** bits - 1/2.
        label: which class, for weights whose top latent depends on it.

    Raises:
        ValueError: a variable is missing or misshapen, the permutation between couplings is not the
            learned one (flow_permutation 2), or a label is missing.
    """
    w = _OpenAI(_read_npz(weights))
    levels = _count(w.arrays, "{}/0/actnorm_center/b")
    steps = _count(w.arrays, "0/{}/actnorm_center/b")
    glow = PublishedGlow(image_shape, levels, steps)
    for i, (level, step) in enumerate(_places(glow, FlowStep)):
        at = f"{level}/{i % steps}"
        w.need(f"{at}/invconv/W", "only the learned permutation, flow_permutation 2, is converted")
        _set_mix(step, w[f"{at}/invconv/W"].t())  # it multiplies rows
        with torch.no_grad():
            step.actnorm.bias.copy_(w.vector(f"{at}/actnorm_center/b"))
            step.actnorm.log_scale.copy_(w.log_scale(f"{at}/actnorm_scale/logs"))
        net = nn.Sequential(
            w.convolution(f"{at}/f1/l_1"),
            nn.ReLU(inplace=True),
            w.convolution(f"{at}/f1/l_2"),
            nn.ReLU(inplace=True),
            w.last(f"{at}/f1/l_last"),
        )
        _set_coupling(step, net, interleaved=True)
    for level, split in _places(glow, Split):
        split.coupling.net = Params(
            w.last(f"pool{level}/conv"), slice(1, None, 2), slice(0, None, 2), (-1.0, -1.0)
        )
        split.coupling.scale = _EXP
    _set_top(glow, w.top(glow.latent_shapes[-1], label))
    return _set(glow)


def glow_from_rosinality(
    weights: str | PathLike[str] | Weights, image_shape: tuple[int, int, int]
) -> PublishedGlow:
    """A model with the weights of rosinality/glow-pytorch.

    Args:
        weights: the file of a state dictionary, or one.
        image_shape: (C, H, W). The model takes images as theirs: x / 2 ** bits - 1/2.

    Raises:
        ValueError: a weight is missing or misshapen.
    """
    if isinstance(weights, str | PathLike):
        w = _Rosinality(torch.load(weights, map_location="cpu", weights_only=True))
    else:
        w = _Rosinality(weights)
    levels = _count(w.arrays, "blocks.{}.flows.0.actnorm.loc")
    steps = _count(w.arrays, "blocks.0.flows.{}.actnorm.loc")
    glow = PublishedGlow(image_shape, levels, steps)
    for i, (level, step) in enumerate(_places(glow, FlowStep)):
        at = f"blocks.{level}.flows.{i % steps}"
        scale = w[f"{at}.actnorm.scale"].flatten()
        _set_mix(step, w.mix(f"{at}.invconv") * scale.sign())
        with torch.no_grad():
            step.actnorm.bias.copy_(w[f"{at}.actnorm.loc"].flatten())
            step.actnorm.log_scale.copy_(scale.abs().log())
        net = nn.Sequential(
            w.convolution(f"{at}.coupling.net.0"),
            nn.ReLU(inplace=True),
            w.convolution(f"{at}.coupling.net.2"),
            nn.ReLU(inplace=True),
            w.last(f"{at}.coupling.net.4"),
        )
        _set_coupling(step, net, interleaved=False)
    for level, split in _places(glow, Split):
        n = glow.latent_shapes[level][0]
        split.coupling.net = Params(
            w.last(f"blocks.{level}.prior"), slice(n, None), slice(0, n), (-1.0, -1.0)
        )
        split.coupling.scale = _EXP
    prior = w.last(f"blocks.{levels - 1}.prior")
    with torch.no_grad():
        _set_top(glow, prior(torch.zeros(1, *glow.latent_shapes[-1]))[0])
    return _set(glow)


class _Source:
    """Arrays by name, with errors that name what is missing."""

    def __init__(self, arrays: Weights) -> None:
        self.arrays = arrays

    def need(self, name: str, why: str) -> None:
        if name not in self.arrays:
            raise ValueError(f"weights: expected {name!r}: {why}")

    def __getitem__(self, name: str) -> Tensor:
        self.need(name, "is this the checkpoint of such a model?")
        return torch.as_tensor(self.arrays[name]).double()


class _OpenAI(_Source):
    """Variables of TensorFlow: filters (H, W, in, out), scales a third of their logarithm."""

    def vector(self, name: str) -> Tensor:
        return self[name].flatten()

    def log_scale(self, name: str) -> Tensor:
        return FACTOR * self.vector(name)

    def convolution(self, name: str) -> nn.Conv2d:
        """A convolution without bias, and the actnorm after it."""
        bias, log_scale = f"{name}/actnorm_center/b", f"{name}/actnorm_scale/logs"
        return self._scaled(name, self.vector(bias), self.log_scale(log_scale))

    def last(self, name: str) -> EdgeConv2d:
        """A network's last convolution, scaled after its bias."""
        conv = self._scaled(name, self.vector(f"{name}/b"), self.log_scale(f"{name}/logs"))
        assert isinstance(conv, EdgeConv2d)
        return conv

    def _scaled(self, name: str, bias: Tensor, log_scale: Tensor) -> nn.Conv2d:
        scale = log_scale.exp()
        weight = self[f"{name}/W"].permute(3, 2, 0, 1) * scale[:, None, None, None]
        if weight.shape[2] == 1:
            return _fill(nn.Conv2d(weight.shape[1], weight.shape[0], 1), weight, bias * scale)
        return EdgeConv2d(weight, bias * scale, marked=True)

    def top(self, shape: tuple[int, ...], label: int | None) -> Tensor:
        """Mean and log-deviation (2C, H, W) of the coarsest latent."""
        channels, height, width = shape
        top = torch.zeros(2 * channels, height, width)
        if "prior/p/W" in self.arrays:
            with torch.no_grad():
                top = self.last("prior/p")(torch.zeros(1, *shape))[0]
        if "prior/y_emb/W" in self.arrays:
            scale = self.log_scale("prior/y_emb/logs").exp()
            rows = (self["prior/y_emb/W"] + self.vector("prior/y_emb/b")) * scale
            if label is None:
                raise ValueError(
                    f"label: expected a class from 0 to {len(rows) - 1}, as the top latent of "
                    "these weights depends on it, got None"
                )
            top = top + rows[label][:, None, None]
        return top


class _Rosinality(_Source):
    """A state dictionary, of the model or of a data-parallel wrapper of it."""

    def __init__(self, arrays: Weights) -> None:
        super().__init__({name.removeprefix("module."): value for name, value in arrays.items()})

    def convolution(self, name: str) -> nn.Conv2d:
        weight = self[f"{name}.weight"]
        size = weight.shape[2]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], size, padding=size // 2)
        return _fill(conv, weight, self[f"{name}.bias"])

    def last(self, name: str) -> EdgeConv2d:
        scale = (FACTOR * self[f"{name}.scale"].flatten()).exp()
        weight = self[f"{name}.conv.weight"] * scale[:, None, None, None]
        return EdgeConv2d(weight, self[f"{name}.conv.bias"] * scale, marked=False)

    def mix(self, name: str) -> Tensor:
        """W (C, C), plain or from its factors."""
        if f"{name}.weight" in self.arrays:
            return self[f"{name}.weight"].flatten(1)
        p, lower, upper, log_s, sign = (
            self[f"{name}.{part}"] for part in ("w_p", "w_l", "w_u", "w_s", "s_sign")
        )
        unit = torch.eye(len(p), dtype=p.dtype)
        return p @ (lower.tril(-1) + unit) @ (upper.triu(1) + torch.diag(sign * log_s.exp()))


def _read_npz(weights: str | PathLike[str] | Weights) -> dict[str, Any]:
    """Variables without the scope and the output number that TensorFlow puts around their names."""
    if isinstance(weights, str | PathLike):
        with np.load(weights, allow_pickle=False) as file:
            weights = {name: file[name] for name in file.files}
    return {name.removesuffix(":0").removeprefix("model/"): a for name, a in weights.items()}


def _count(weights: Weights, pattern: str) -> int:
    """How many numbers from 0 on give a name that is there."""
    count = 0
    while pattern.format(count) in weights:
        count += 1
    if not count:
        raise ValueError(f"weights: expected {pattern.format(0)!r}, which is not among them")
    return count


def _places(glow: Glow, kind: type) -> list[tuple[int, Any]]:
    """Each layer of a kind, with its level."""
    places, level = [], -1
    for layer in glow.chain.layers:
        level += not isinstance(layer, FlowStep | Split)
        if isinstance(layer, kind):
            places.append((level, layer))
    return places


def _fill(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    return conv


def _set_mix(step: FlowStep, weight: Tensor) -> None:
    channels = len(step.actnorm.bias)
    if tuple(weight.shape) != (channels, channels):
        raise ValueError(
            f"weights: expected mixes of shape {(channels, channels)} for such an image, "
            f"got {tuple(weight.shape)}"
        )
    with torch.no_grad():
        step.conv._factor(weight)


def _set_coupling(step: FlowStep, net: nn.Sequential, *, interleaved: bool) -> None:
    """Affine where the network gives scales too, else additive."""
    last: Any = net[-1]
    out, channels, coupling = last.out_channels, len(step.actnorm.bias), step.coupling
    coupling.net, coupling.scale = net, _GLOW
    if out == channels // 2:
        coupling.net, coupling.scale = Params(net, None, slice(None)), _EXP
    elif out != channels:
        raise ValueError(f"weights: expected {channels} outputs of a coupling network, got {out}")
    elif interleaved:
        coupling.net = Params(net, slice(1, None, 2), slice(0, None, 2))


def _set_top(glow: PublishedGlow, top: Tensor) -> None:
    with torch.no_grad():
        mean, log_sd = top.chunk(2)
        glow.top_mean.copy_(mean)
        glow.top_log_sd.copy_(log_sd)


def _set(glow: PublishedGlow) -> PublishedGlow:
    """The model with its actnorms marked as set, in the layout models run in."""
    for _, step in _places(glow, FlowStep):
        step.actnorm.initialized.fill_(True)
    glow.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return glow
