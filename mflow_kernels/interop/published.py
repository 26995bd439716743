"""Load weights of openai/glow, rosinality/glow-pytorch and chaiyujin/glow-pytorch into a `Glow`.

The published model has two features that `Glow` lacks: convolutions that see the border of the
image, and a learned Gaussian of the coarsest latent. Here an affine map takes the place of that
Gaussian, so that every latent is standard normal.
"""

from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mflow_kernels.interop.params import Params
from mflow_kernels.interop.published_layouts import Chaiyujin, Layout, OpenAI, Rosinality, Weights
from mflow_kernels.layers import FlowStep, Split
from mflow_kernels.models.glow import Glow
from mflow_kernels.ops.scale import ScaleFunction

_GLOW = ScaleFunction("sigmoid", offset=2.0)
_EXP = ScaleFunction("exp")


class PublishedGlow(Glow):
    """`Glow` with a learned mean and deviation for each element of the coarsest latent.

    The coarsest latent that it returns is (z - top_mean) * exp(-top_log_sd), (N, C, H, W).
    """

    def __init__(self, image_shape: tuple[int, int, int], levels: int, steps: int) -> None:
        super().__init__(image_shape, levels, steps, width=1)  # `_convert` replaces the networks
        self.top_mean = nn.Parameter(torch.zeros(self.latent_shapes[-1]))
        self.top_log_sd = nn.Parameter(torch.zeros(self.latent_shapes[-1]))

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        (*fine, top), logdet = super().forward(x, context)
        top = (top - self.top_mean) * torch.exp(-self.top_log_sd)
        return (*fine, top), logdet - self.top_log_sd.sum()

    def initialize(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return `forward(x, context)`: the published actnorms are initialized already."""
        return self(x, context)

    def inverse(  # type: ignore[override]
        self, z: tuple[Tensor, ...], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        *fine, top = z
        top = top * torch.exp(self.top_log_sd) + self.top_mean
        x, logdet = super().inverse((*fine, top), context)
        return x, logdet + self.top_log_sd.sum()


def glow_from_openai(
    weights: str | PathLike[str] | Weights,
    image_shape: tuple[int, int, int],
    *,
    label: int | None = None,
) -> PublishedGlow:
    """Return a model with the weights of openai/glow.

    Args:
        weights: an .npz of the checkpoint's variables under their names, or a mapping from names
            to arrays. Variables of optimizers and averages are ignored. To write it in TensorFlow:
            `r = tf.train.load_checkpoint(path)`,
            `np.savez(out, **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})`.
        image_shape: (C, H, W). The model takes images as x / 2 ** bits - 1/2.
        label: the class, for weights whose top latent depends on it.

    Raises:
        ValueError: a variable is missing or has another shape, the permutation is not the learned
            one (flow_permutation 2), or the weights have no such label.
    """
    return _convert(OpenAI(_variables(weights), label), image_shape)


def glow_from_rosinality(
    weights: str | PathLike[str] | Weights, image_shape: tuple[int, int, int]
) -> PublishedGlow:
    """Return a model with the weights of rosinality/glow-pytorch.

    Args:
        weights: a state dictionary or its file.
        image_shape: (C, H, W). The model takes images as x / 2 ** bits - 1/2.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    return _convert(Rosinality(_state(weights)), image_shape)


def glow_from_chaiyujin(
    weights: str | PathLike[str] | Weights,
    image_shape: tuple[int, int, int],
    *,
    label: int | None = None,
) -> PublishedGlow:
    """Return a model with the weights of chaiyujin/glow-pytorch.

    Args:
        weights: a state dictionary, a training checkpoint with one under "graph", or its file.
        image_shape: (C, H, W). The model takes images as x / 255.
        label: the class, for weights whose top latent depends on it.

    Raises:
        ValueError: a weight is missing or has another shape, or the weights have no such label. The
            files lack two kinds of permutations: those of channels, and those of LU-factored 1x1
            convolutions.
    """
    state = _state(weights)
    return _convert(Chaiyujin(state.get("graph", state), label), image_shape)


def _state(weights: str | PathLike[str] | Weights) -> Weights:
    if isinstance(weights, (str, PathLike)):
        return cast(Weights, torch.load(weights, map_location="cpu", weights_only=True))
    return weights


def _convert(w: Layout, image_shape: tuple[int, int, int]) -> PublishedGlow:
    """Return a model with these weights, from any layout."""
    glow = PublishedGlow(image_shape, w.levels, w.steps)
    for i, (level, step) in enumerate(_places(glow, FlowStep)):
        published = w.step(level, i % w.steps)
        _set_weight(step, published.weight)
        with torch.no_grad():
            step.actnorm.bias.copy_(published.bias)
            step.actnorm.log_scale.copy_(published.log_scale)
            step.actnorm.keep_as_set()
        _set_coupling(step, published.net, w.interleaved)
    for level, split in _places(glow, Split):
        where_mean, where_log_sd = _halves(glow.latent_shapes[level][0], w.interleaved)
        split.coupling.net = Params(w.prior(level), where_log_sd, where_mean, (-1.0, -1.0))
        split.coupling.scale = _EXP
    with torch.no_grad():
        mean, log_sd = w.top_latent(glow.latent_shapes[-1]).chunk(2)
        glow.top_mean.copy_(mean)
        glow.top_log_sd.copy_(log_sd)
    glow.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return glow


def _variables(weights: str | PathLike[str] | Weights) -> dict[str, Any]:
    """Return variables by name, without the scope and output number that TensorFlow adds."""
    if isinstance(weights, (str, PathLike)):
        with np.load(weights, allow_pickle=False) as file:
            weights = {name: file[name] for name in file.files}
    return {name.removesuffix(":0").removeprefix("model/"): a for name, a in weights.items()}


def _places(glow: Glow, kind: type) -> list[tuple[int, Any]]:
    """Return each layer of a kind, with its level."""
    places, level = [], -1
    for layer in glow.chain.layers:
        level += not isinstance(layer, (FlowStep, Split))
        if isinstance(layer, kind):
            places.append((level, layer))
    return places


def _set_weight(step: FlowStep, weight: Tensor) -> None:
    channels = len(step.actnorm.bias)
    if tuple(weight.shape) != (channels, channels):
        raise ValueError(
            f"weights: expected 1x1 weights of shape {(channels, channels)} for such an image, "
            f"got {tuple(weight.shape)}"
        )
    with torch.no_grad():
        step.conv.factor_(weight)


def _halves(channels: int, interleaved: bool) -> tuple[slice, slice]:
    """Return the slices of the first and of the second of two values for each channel."""
    if interleaved:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(0, channels), slice(channels, None)


def _set_coupling(step: FlowStep, net: nn.Sequential, interleaved: bool) -> None:
    """Set an affine coupling if the network also returns scales, else an additive one."""
    last: Any = net[-1]
    out, channels, coupling = last.out_channels, len(step.actnorm.bias), step.coupling
    coupling.net, coupling.scale = net, _GLOW
    if out == channels // 2:
        coupling.net, coupling.scale = Params(net, None, slice(None)), _EXP
    elif out != channels:
        raise ValueError(f"weights: expected {channels} outputs of a coupling network, got {out}")
    elif interleaved:  # otherwise the raw scales are in the first half already
        shift, raw = _halves(channels // 2, interleaved)
        coupling.net = Params(net, raw, shift)
