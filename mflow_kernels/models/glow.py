"""Glow on images, and its like for vectors."""

import torch
from torch import Tensor

from mflow_kernels.layers import Bijection, FlowStep, ReversibleChain, Split, Squeeze
from mflow_kernels.ops.scale import Kind, ScaleFunction


class Glow(Bijection):
    """The multi-scale flow of Glow (arXiv 1807.03039, figure 2), its split priors couplings.

    `z, logdet = glow(x)` with z the tuple of latents, finest first; all of them are standard normal
    under the model. States run in channels_last. Call `initialize(x)` with a first batch before
    training.

    Args:
        image_shape: (C, H, W), H and W divisible by 2 ** levels.
        levels: L, how many times the image is squeezed.
        steps: K, steps of flow at each level.
        width: hidden channels of the coupling networks.
        scale: scale function of the couplings, as for `AffineCoupling`.
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        ValueError: where the levels do not divide the image, or a number is not positive.
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
        c, h, w = image_shape
        for name, value in (("levels", levels), ("steps", steps), ("width", width), ("C", c)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if h % 2**levels or w % 2**levels or h < 1 or w < 1:
            raise ValueError(
                f"image_shape: expected height and width divisible by 2 ** levels = {2**levels}, "
                f"got {h}x{w}"
            )
        self.input_shape = (c, h, w)
        layers: list[Bijection] = []
        shapes = []
        for level in range(levels):
            c, h, w = 4 * c, h // 2, w // 2
            layers.append(Squeeze())
            layers += [FlowStep(c, width=width, scale=scale) for _ in range(steps)]
            if level + 1 < levels:
                layers.append(Split(c, width=width, scale=scale))
                shapes.append((c - c // 2, h, w))
                c = c // 2
        self.latent_shapes = (*shapes, (c, h, w))
        self.chain = ReversibleChain(
            layers, reversible=reversible, checkpoint_every=checkpoint_every
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        z, logdet = self.chain(self._checked(x), *context)
        return z if isinstance(z, tuple) else (z,), logdet

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Set every actnorm from the batch x (N, C, H, W), layer by layer; once, see `ActNorm`."""
        with torch.no_grad():
            z, logdet = self.chain.initialize(self._checked(x), *context)
        return z if isinstance(z, tuple) else (z,), logdet

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        check_latents(z, self.latent_shapes)
        z = tuple(latent.contiguous(memory_format=torch.channels_last) for latent in z)
        return self.chain.inverse(z if len(z) > 1 else z[0], *context)

    def _checked(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: expected shape (N, {expected}), got {tuple(x.shape)}")
        return x.contiguous(memory_format=torch.channels_last)


class VectorFlow(Bijection):
    """Steps of flow on vectors (N, dim): a chain whose coupling networks are linear layers.

    The flow for points, and for the u of a manifold flow in a hierarchy. z is (N, dim).

    Args:
        dim: length of the vectors, at least 2.
        steps: K.
        width: hidden units of the coupling networks.
        scale: scale function of the couplings, as for `AffineCoupling`.
        reversible, checkpoint_every: as for `ReversibleChain`.
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
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.input_shape = (dim,)
        self.latent_shapes = ((dim,),)
        self.chain = ReversibleChain(
            [FlowStep(dim, width=width, scale=scale, spatial_dims=0) for _ in range(steps)],
            reversible=reversible,
            checkpoint_every=checkpoint_every,
        )

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        z, logdet = self.chain(self._checked(x), *context)
        return (z,), logdet

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Set every actnorm from the batch x (N, dim); once, see `ActNorm`."""
        with torch.no_grad():
            z, logdet = self.chain.initialize(self._checked(x), *context)
        return (z,), logdet

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        check_latents(z, self.latent_shapes)
        return self.chain.inverse(z[0], *context)

    def _checked(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"x: expected (N, {self.input_shape[0]}), got {tuple(x.shape)}")
        return x


def check_latents(z: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    """ValueError unless z is a tuple of latents of these shapes, all of one N."""
    if not isinstance(z, tuple):
        raise TypeError(f"z: expected a tuple of {len(shapes)} latents, got {type(z).__name__}")
    came = tuple(tuple(latent.shape[1:]) for latent in z)
    if came != shapes:
        raise ValueError(f"z: expected latents of shapes {shapes}, got {came}")
    if len({latent.shape[0] for latent in z}) > 1:
        sizes = [latent.shape[0] for latent in z]
        raise ValueError(f"z: expected latents of one batch size, got {sizes}")
