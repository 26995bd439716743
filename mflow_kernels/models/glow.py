"""Glow on images, and the same kind of flow on vectors."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mflow_kernels.layers import (
    Bijection,
    FlowStep,
    MaskedAutoregressive,
    ReversibleChain,
    Split,
    Squeeze,
)
from mflow_kernels.layers.flow import Context, Flow, given
from mflow_kernels.layers.step import CouplingKind
from mflow_kernels.models.images import warn_of_raw_images
from mflow_kernels.ops.checks import check_count, check_tensor
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.layouts import is_channels_last
from mflow_kernels.ops.precision import autocasts
from mflow_kernels.ops.scale import Kind, ScaleFunction

# Makes a coupling network from its numbers of input and output channels.
NetworkFactory = Callable[[int, int], nn.Module]


class ChainFlow(Flow):
    """A chain of layers from x (N, *input_shape) to a tuple of latents.

    Images are converted to channels_last on entry.
    """

    input_shape: tuple[int, ...]
    latent_shapes: tuple[tuple[int, ...], ...]
    chain: ReversibleChain
    context_channels: int | None  # None if the caller supplies the networks
    width: int
    coupling: CouplingKind
    bins: int
    scale: ScaleFunction

    def _step(self, channels: int, network: NetworkFactory | None, spatial_dims: int) -> FlowStep:
        """A step of flow with this model's couplings."""
        numbers = 2 if self.coupling == "affine" else 3 * self.bins - 1
        net = _net(channels, self.width, network, self.context_channels, numbers)
        how: dict[str, Any] = {"coupling": self.coupling, "bins": self.bins, "scale": self.scale}
        return FlowStep(channels, **net, **how, spatial_dims=spatial_dims)

    def _join(
        self, layers: Sequence[nn.Module], reversible: bool, checkpoint_every: int | None
    ) -> None:
        """Set the chain and the shapes of its latents; `input_shape` is set before."""
        self.chain = ReversibleChain(
            layers,
            reversible=reversible,
            checkpoint_every=checkpoint_every,
            input_shape=self.input_shape,
        )
        self.latent_shapes = cast(tuple[tuple[int, ...], ...], self.chain.latent_shapes)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Context | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        x = self._checked(x)
        z, logdet = self.chain(x, *self._for_networks(context, x))
        return z if isinstance(z, tuple) else (z,), logdet

    def initialize(  # type: ignore[override]
        self, x: Tensor, context: Context | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Initialize every actnorm from the batch x (N, *input_shape), in order, and return
        `forward(x, context)`. An actnorm initializes only once; see `ActNorm`."""
        x = self._checked(x)
        warn_of_raw_images(self, x)
        with torch.no_grad():
            z, logdet = self.chain.initialize(x, *self._for_networks(context, x))
        return z if isinstance(z, tuple) else (z,), logdet

    def log_prob(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return log p(x) (N,), or log p(x | context), in nats; x is (N, *input_shape)."""
        warn_of_raw_images(self, self._checked(x))
        return super().log_prob(x, context=context)

    def inverse(  # type: ignore[override]
        self, z: tuple[Tensor, ...], context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        shapes = self.latent_shapes
        if not isinstance(z, tuple):
            raise TypeError(f"z: expected a tuple of {len(shapes)} latents, got {type(z).__name__}")
        latents = [self._like_parameters(f"z[{i}]", latent) for i, latent in enumerate(z)]
        actual = tuple(tuple(latent.shape[1:]) for latent in latents)
        if actual != shapes:
            raise ValueError(f"z: expected latents of shapes {shapes}, got {actual}")
        latents = [_channels_last(latent) for latent in latents]
        context_of = self._for_networks(context, latents[0])
        return self.chain.inverse(tuple(latents), *context_of)

    def _checked(self, x: Tensor) -> Tensor:
        x = self._like_parameters("x", x)
        if tuple(x.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: expected shape (N, {expected}), got {tuple(x.shape)}")
        return _channels_last(x)

    def _for_networks(self, context: Context | None, x: Tensor) -> tuple[Tensor, ...]:
        """Return the networks' further arguments; see `given`."""
        if context is None and self.context_channels is not None:
            return ()  # built-in networks check that they need none
        return given(context, x, self)

    def _like_parameters(self, name: str, value: object) -> Tensor:
        """Check that `value` is a tensor on the parameters' device and, outside autocast, of their
        dtype."""
        x, like = check_tensor(name, value), next(self.parameters())
        if x.device != like.device:
            raise ValueError(f"{name}: expected the model's device {like.device}, got {x.device}")
        if x.dtype != like.dtype and not autocasts(x.device):
            expected, actual = (str(d).removeprefix("torch.") for d in (like.dtype, x.dtype))
            raise TypeError(f"{name}: expected the model's dtype {expected}, got {actual}")
        return x


class Glow(ChainFlow):
    """The multi-scale flow of Glow (arXiv 1807.03039, figure 2).

    Each level squeezes the image, applies K steps of flow and splits off half of the channels as a
    latent. The learned priors of the splits are implemented as couplings.

    `z, logdet = glow(x)` maps x (N, C, H, W) to a tuple of latents, finest first. All latents are
    standard normal under the model. x and z have the dtype of the parameters. Call `initialize(x)`
    with a first batch before training.

    All methods take a `context`, which makes the flow conditional: log p(x | context). One entry
    serves all samples, for example `sample(8, context=3)`.

    Args:
        image_shape: (C, H, W); H and W must be divisible by 2 ** levels.
        levels: L, the number of levels.
        steps: K, the number of steps of flow in each level.
        width: number of hidden channels of the built-in coupling networks, `coupling_net`.
        coupling: "affine" or "spline", the couplings of the steps, as for `FlowStep`.
        bins: number of bins of each spline.
        scale: scale function of the affine couplings, as for `AffineCoupling`.
        context_channels: M. If positive, the flow is conditional, and the context is one of three:
            classes, integers (N,) from 0 to M - 1 or their names; vectors (N, M); or maps
            (N, M, H, W), which are averaged to the size of each level.
        network: makes the network of each coupling, instead of the built-in ones:
            `network(in_channels, out_channels)` is a module from (N, in_channels, *spatial) to
            (N, out_channels, *spatial). If a context is given, the module gets it as second
            argument. With dropout, the flow is not a bijection in training mode.
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        TypeError: a number is not an integer, or `network` returns no module.
        ValueError: a number is not positive, 2 ** levels does not divide H and W, or
            context_channels and network are both given.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        levels: int,
        steps: int,
        width: int = 64,
        *,
        coupling: CouplingKind = "affine",
        bins: int = 8,
        scale: ScaleFunction | Kind = "tanh",
        context_channels: int = 0,
        network: NetworkFactory | None = None,
        reversible: bool = True,
        checkpoint_every: int | None = 8,
    ) -> None:
        super().__init__()
        c, h, w = check_image_shape(image_shape)
        for name, number in (("levels", levels), ("steps", steps), ("width", width)):
            check_count(name, number, 1)
        if levels > 31:  # no image is that large, and 2 ** levels may be too large to compute
            raise ValueError(f"levels: expected at most 31, got {levels}")
        if h % 2**levels or w % 2**levels:
            raise ValueError(
                f"image_shape: expected height and width divisible by 2 ** levels = {2**levels}, "
                f"got {h}x{w}"
            )
        self.input_shape = (c, h, w)
        self.levels, self.steps, self.width = levels, steps, width
        self.coupling, self.bins, self.scale = coupling, bins, ScaleFunction.of(scale)
        self.context_channels = _own_context_channels(context_channels, network)
        layers: list[Bijection] = []
        for level in range(levels):
            c = 4 * c
            layers.append(Squeeze())
            for _ in range(steps):
                layers.append(self._step(c, network, 2))
            if level + 1 < levels:
                layers.append(Split(c, **_net(c, width, network, context_channels), scale=scale))
                c = c // 2
        self._join(layers, reversible, checkpoint_every)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class VectorFlow(ChainFlow):
    """Steps of flow on vectors (N, dim), with linear layers in the coupling networks.

    `(z,), logdet = flow(x)` maps x (N, dim) to z (N, dim), which is standard normal under the
    model. x and z have the dtype of the parameters. Use this flow for points, and for the
    coordinates u of a manifold flow in a hierarchy.

    Args:
        dim: length of the vectors, at least 2.
        steps: K, the number of steps of flow.
        width: number of hidden units of the built-in coupling networks.
        coupling: "affine" or "spline", the couplings of the steps, as for `FlowStep`.
        bins: number of bins of each spline.
        scale: scale function of the affine couplings, as for `AffineCoupling`.
        autoregressive: whether a step is a `MaskedAutoregressive` layer with this width, and with
            `coupling` as its transform, instead of a `FlowStep`. Every other step has the opposite
            order of variables.
        context_channels, network: as for `Glow`, but a context cannot be a map.
        reversible, checkpoint_every: as for `ReversibleChain`, but activations are stored by
            default. They are small, and a step is faster than one that rebuilds them.

    Raises:
        TypeError: a number is not an integer, or `network` returns no module.
        ValueError: a number is too small, or network is given with context_channels or
            autoregressive.
    """

    def __init__(
        self,
        dim: int,
        steps: int,
        width: int = 64,
        *,
        coupling: CouplingKind = "affine",
        bins: int = 8,
        scale: ScaleFunction | Kind = "tanh",
        autoregressive: bool = False,
        context_channels: int = 0,
        network: NetworkFactory | None = None,
        reversible: bool = False,
        checkpoint_every: int | None = 8,
    ) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 2), ("steps", steps, 1), ("width", width, 1)):
            check_count(name, value, least)
        self.input_shape = (dim,)
        self.steps, self.width = steps, width
        self.coupling, self.bins, self.scale = coupling, bins, ScaleFunction.of(scale)
        self.context_channels = _own_context_channels(context_channels, network)
        self.autoregressive = bool(autoregressive)
        if autoregressive and network is not None:
            raise ValueError("network: expected None with autoregressive, which has its own")
        layers: list[Bijection] = []
        for step in range(steps):
            if not autoregressive:
                layers.append(self._step(dim, network, 0))
                continue
            order = range(dim) if step % 2 == 0 else range(dim - 1, -1, -1)
            how: dict[str, Any] = {"scale": self.scale, "bins": bins, "order": order}
            how |= {"width": width, "context_channels": context_channels}
            layers.append(MaskedAutoregressive(dim, coupling, **how))
        self._join(layers, reversible, checkpoint_every)


def check_image_shape(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return C, H and W; raise TypeError or ValueError unless they are three positive integers."""
    try:
        c, h, w = image_shape
    except (TypeError, ValueError):
        raise ValueError(f"image_shape: expected (C, H, W), got {image_shape!r}") from None
    for name, number in (("C", c), ("H", h), ("W", w)):
        check_count(name, number, 1)
    return c, h, w


def _own_context_channels(context_channels: int, network: NetworkFactory | None) -> int | None:
    """Return the context channels of the built-in networks; None if the caller supplies others."""
    check_count("context_channels", context_channels, 0)
    if network is None:
        return context_channels
    if context_channels:
        raise ValueError(
            "context_channels: expected 0 with `network`, because its modules take any context, "
            f"got {context_channels}"
        )
    return None


def _net(
    channels: int,
    width: int,
    network: NetworkFactory | None,
    context_channels: int | None,
    numbers: int = 2,
) -> dict[str, Any]:
    """Return the arguments of a step or split that determine its network, which returns this many
    numbers for each element that it changes."""
    if network is None:
        return {"width": width, "context_channels": context_channels}
    return {"net": network(channels // 2, numbers * (channels - channels // 2))}


def _channels_last(x: Tensor) -> Tensor:
    """Convert an image to channels_last, the fast layout for convolutions.

    Its strides are those of channels_last even if it has only one channel. Vectors, and tensors
    under forward-mode differentiation or a torch.func transform, are returned unchanged.
    """
    if x.dim() != 4 or transformed() or is_channels_last(x):
        return x
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w * c).view(n, h, w, c).permute(0, 3, 1, 2)
