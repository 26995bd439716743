"""Glow on images, and the same kind of flow on vectors."""

from typing import Any, cast

import torch
from torch import Tensor

from mflow_kernels.layers import Bijection, FlowStep, ReversibleChain, Split, Squeeze
from mflow_kernels.layers.flow import Flow
from mflow_kernels.ops.checks import check_count, check_tensor
from mflow_kernels.ops.launch import autocasts, is_channels_last, transformed
from mflow_kernels.ops.scale import Kind, ScaleFunction


class _ChainFlow(Flow):
    """A chain of layers from x (N, *input_shape) to a tuple of latents.

    Images are converted to channels_last on entry.
    """

    input_shape: tuple[int, ...]
    latent_shapes: tuple[tuple[int, ...], ...]
    chain: ReversibleChain

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        z, logdet = self.chain(self._checked(x), *context)
        return z if isinstance(z, tuple) else (z,), logdet

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Initialize every actnorm from the batch x (N, *input_shape), in order, and return
        `forward(x)`. An actnorm initializes only once; see `ActNorm`."""
        with torch.no_grad():
            z, logdet = self.chain.initialize(self._checked(x), *context)
        return z if isinstance(z, tuple) else (z,), logdet

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        shapes = self.latent_shapes
        if not isinstance(z, tuple):
            raise TypeError(f"z: expected a tuple of {len(shapes)} latents, got {type(z).__name__}")
        latents = [self._like_parameters(f"z[{i}]", latent) for i, latent in enumerate(z)]
        came = tuple(tuple(latent.shape[1:]) for latent in latents)
        if came != shapes:
            raise ValueError(f"z: expected latents of shapes {shapes}, got {came}")
        latents = [_channels_last(latent) for latent in latents]
        return self.chain.inverse(tuple(latents), *context)

    def _checked(self, x: Tensor) -> Tensor:
        x = self._like_parameters("x", x)
        if tuple(x.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: expected shape (N, {expected}), got {tuple(x.shape)}")
        return _channels_last(x)

    def _like_parameters(self, name: str, value: object) -> Tensor:
        """Check that `value` is a tensor on the parameters' device and, outside autocast, of their
        dtype."""
        x, like = check_tensor(name, value), next(self.parameters())
        if x.device != like.device:
            raise ValueError(f"{name}: expected the model's device {like.device}, got {x.device}")
        if x.dtype != like.dtype and not autocasts(x.device):
            expected, came = (str(d).removeprefix("torch.") for d in (like.dtype, x.dtype))
            raise TypeError(f"{name}: expected the model's dtype {expected}, got {came}")
        return x


class Glow(_ChainFlow):
    """The multi-scale flow of Glow (arXiv 1807.03039, figure 2).

    Each level squeezes the image, applies K steps of flow and splits off half of the channels as a
    latent. The learned priors of the splits are implemented as couplings.

    `z, logdet = glow(x)` maps x (N, C, H, W) to a tuple of latents, finest first. All latents are
    standard normal under the model. x and z have the dtype of the parameters. Call `initialize(x)`
    with a first batch before training.

    Args:
        image_shape: (C, H, W); H and W must be divisible by 2 ** levels.
        levels: L, the number of levels.
        steps: K, the number of steps of flow in each level.
        width: number of hidden channels of the coupling networks.
        scale: scale function of the couplings, as for `AffineCoupling`.
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a number is not positive, or 2 ** levels does not divide H and W.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        levels: int,
        steps: int,
        width: int,
        *,
        scale: ScaleFunction | Kind = "tanh",
        reversible: bool = True,
        checkpoint_every: int | None = 8,
    ) -> None:
        super().__init__()
        try:
            c, h, w = image_shape
        except (TypeError, ValueError):
            raise ValueError(f"image_shape: expected (C, H, W), got {image_shape!r}") from None
        numbers: dict[str, Any] = {"C": c, "H": h, "W": w}
        numbers |= {"levels": levels, "steps": steps, "width": width}
        for name, number in numbers.items():
            check_count(name, number, 1)
        if levels > 31:  # no image is that large, and 2 ** levels may be too large to compute
            raise ValueError(f"levels: expected at most 31, got {levels}")
        if h % 2**levels or w % 2**levels:
            raise ValueError(
                f"image_shape: expected height and width divisible by 2 ** levels = {2**levels}, "
                f"got {h}x{w}"
            )
        self.input_shape = (c, h, w)
        layers: list[Bijection] = []
        for level in range(levels):
            c = 4 * c
            layers.append(Squeeze())
            layers += [FlowStep(c, width=width, scale=scale) for _ in range(steps)]
            if level + 1 < levels:
                layers.append(Split(c, width=width, scale=scale))
                c = c // 2
        self.chain = ReversibleChain(
            layers,
            reversible=reversible,
            checkpoint_every=checkpoint_every,
            input_shape=self.input_shape,
        )
        self.latent_shapes = cast(tuple[tuple[int, ...], ...], self.chain.latent_shapes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class VectorFlow(_ChainFlow):
    """Steps of flow on vectors (N, dim), with linear layers in the coupling networks.

    `(z,), logdet = flow(x)` maps x (N, dim) to z (N, dim), which is standard normal under the
    model. x and z have the dtype of the parameters. Use this flow for points, and for the
    coordinates u of a manifold flow in a hierarchy.

    Args:
        dim: length of the vectors, at least 2.
        steps: K, the number of steps of flow.
        width: number of hidden units of the coupling networks.
        scale: scale function of the couplings, as for `AffineCoupling`.
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a number is too small.
    """

    def __init__(
        self,
        dim: int,
        steps: int,
        width: int,
        *,
        scale: ScaleFunction | Kind = "tanh",
        reversible: bool = True,
        checkpoint_every: int | None = 8,
    ) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 2), ("steps", steps, 1), ("width", width, 1)):
            check_count(name, value, least)
        self.input_shape = (dim,)
        self.latent_shapes = ((dim,),)
        self.chain = ReversibleChain(
            [FlowStep(dim, width=width, scale=scale, spatial_dims=0) for _ in range(steps)],
            reversible=reversible,
            checkpoint_every=checkpoint_every,
            input_shape=self.input_shape,
        )


def _channels_last(x: Tensor) -> Tensor:
    """Convert an image to channels_last, the fast layout for convolutions.

    Its strides are those of channels_last even if it has only one channel. Vectors, and tensors
    under forward-mode differentiation or a torch.func transform, are returned unchanged.
    """
    if x.dim() != 4 or transformed() or is_channels_last(x):
        return x
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w * c).view(n, h, w, c).permute(0, 3, 1, 2)
