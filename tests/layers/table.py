"""The layers that the tests of every layer run, alone and in chains."""

from collections.abc import Callable

import torch
from torch import nn

from layers.bijections import Checkerboard, LeakyReLU, Reversed, TokenCoupling, nflows_spline
from layers.chains import levels
from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    FlowStep,
    InvertibleConv1x1,
    MaskedAutoregressive,
    Permutation,
    PixelPairs,
    ReversibleChain,
    SplineCoupling,
    Split,
    Squeeze,
    Unsqueeze,
)
from mflow_kernels.ops.scale import ScaleFunction

GLOWS_SCALE = ScaleFunction("sigmoid", eps=1e-3, order="scale-shift")

# Each kind of layer of this package, and the shape of a state.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "actnorm, vectors": (lambda: ActNorm(3), (2, 3)),
    "actnorm, images": (lambda: ActNorm(3), (2, 3, 2, 3)),
    "conv1x1, vectors": (lambda: InvertibleConv1x1(5), (3, 5)),
    "conv1x1, volumes": (lambda: InvertibleConv1x1(3), (2, 3, 1, 2, 2)),
    "conv1x1, grouped": (lambda: InvertibleConv1x1(8, n_split=4), (2, 8, 3)),
    "coupling, vectors": (lambda: AffineCoupling(5, width=4, spatial_dims=0), (3, 5)),
    "coupling, signals": (lambda: AffineCoupling(3, width=4, spatial_dims=1), (2, 3, 4)),
    "coupling, images": (lambda: AffineCoupling(3, width=4, scale=GLOWS_SCALE), (2, 3, 2, 3)),
    "coupling, volumes": (lambda: AffineCoupling(2, width=4, spatial_dims=3), (2, 2, 2, 1, 2)),
    "coupling, additive": (lambda: AffineCoupling(5, width=4, scale=None), (2, 5, 2, 3)),
    "spline, vectors": (lambda: SplineCoupling(5, bins=4, width=4, spatial_dims=0), (3, 5)),
    "spline, images": (lambda: SplineCoupling(3, bins=3, width=4), (2, 3, 2, 3)),
    "autoregressive, affine": (
        lambda: MaskedAutoregressive(4, width=5, depth=1, order=[2, 0, 1, 3]),
        (3, 4),
    ),
    "autoregressive, spline": (
        lambda: MaskedAutoregressive(3, "spline", bins=3, width=4, depth=1, residual=False),
        (3, 3),
    ),
    "split": (lambda: Split(5, width=4), (2, 5, 2, 1)),
    "uneven split": (lambda: Split(4, width=4, kept=3), (2, 4, 2, 2)),
    "split without a prior": (lambda: Split(4, kept=1, prior=False), (2, 4, 2, 2)),
    "squeeze": (Squeeze, (2, 2, 2, 4)),
    "unsqueeze": (Unsqueeze, (2, 4, 2, 2)),
    "channels": (lambda: Permutation([2, 0, 3, 1]), (2, 4, 2, 2)),
    "pixels": (lambda: Permutation([2, 0, 3, 1], axis="pixels"), (2, 3, 2, 2)),
    "pixel pairs": (lambda: PixelPairs("checkerboard"), (2, 2, 2, 4)),
    "frame pairs": (lambda: PixelPairs("neighbours"), (2, 2, 4)),
    "step": (lambda: FlowStep(3, width=4), (2, 3, 2, 3)),
    "step, one pixel": (lambda: FlowStep(4, width=4, scale="atan"), (2, 4, 1, 1)),
    "step, vectors": (lambda: FlowStep(5, width=4, spatial_dims=0, scale="exp"), (2, 5)),
    "spline step": (lambda: FlowStep(4, width=4, coupling="spline", bins=3), (2, 4, 2, 2)),
    "chain": (lambda: ReversibleChain([FlowStep(2, width=3) for _ in range(2)]), (2, 2, 2, 3)),
    "chain of levels": (levels, (2, 1, 4, 2)),
    "chain of levels, stored": (lambda: levels(reversible=False), (2, 1, 4, 2)),
}


def pixel_coupling(by: str, channels: int, dims: int) -> list[nn.Module]:
    coupling = AffineCoupling(2 * channels, width=4, spatial_dims=dims)
    return [PixelPairs(by), coupling, PixelPairs(by, inverted=True)]  # type: ignore[arg-type]


Layers = Callable[[], list[nn.Module]]
IMAGE, TOKENS, VECTOR = (2, 4, 4, 4), (2, 4, 6), (3, 4)

# Layers that users bring, each alone in a chain; some are not subclasses of `Bijection`.
USERS: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "user's leaky ReLU": (lambda: [LeakyReLU()], IMAGE),
    "user's ViT coupling": (lambda: [TokenCoupling(4)], TOKENS),
    "user's checkerboard": (lambda: [Checkerboard(4)], IMAGE),
    "user's permutation": (lambda: [Reversed()], IMAGE),
    "nflows' spline": (lambda: [nflows_spline(4)], VECTOR),
}
TOGETHER: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "images": (
        lambda: [
            *(LeakyReLU(), FlowStep(4, width=4), Checkerboard(4), ActNorm(4)),
            *(InvertibleConv1x1(4), InvertibleConv1x1(4), Squeeze(), AffineCoupling(16, width=4)),
            *(AffineCoupling(16, width=4), Reversed(), Split(16, width=4, kept=6), LeakyReLU()),
            *(Permutation(torch.randperm(6)), AffineCoupling(6, width=4), ActNorm(6)),
        ],
        IMAGE,
    ),
    "coarse to fine": (
        lambda: [
            *(Squeeze(), ReversibleChain([FlowStep(16, width=4)]), Unsqueeze()),
            *pixel_coupling("checkerboard", 4, 2),
        ],
        IMAGE,
    ),
    "a chain in a chain": (
        lambda: [
            LeakyReLU(),
            ReversibleChain([FlowStep(4, width=4), Split(4, width=4)]),
            FlowStep(2, width=4),
        ],
        IMAGE,
    ),
    "tokens": (
        lambda: [
            *(TokenCoupling(4), Permutation(torch.randperm(6), axis="pixels"), TokenCoupling(4)),
            *(*pixel_coupling("halves", 4, 1), InvertibleConv1x1(4, n_split=2)),
            *(
                FlowStep(4, width=4, spatial_dims=1, scale=None),
                *pixel_coupling("neighbours", 4, 1),
            ),
            *(Permutation([1, 3, 0, 2]), AffineCoupling(4, width=4, spatial_dims=1)),
        ],
        TOKENS,
    ),
    "vectors": (
        lambda: [
            *(InvertibleConv1x1(4), nflows_spline(4), FlowStep(4, width=4, spatial_dims=0)),
            *(SplineCoupling(4, bins=4, width=4, spatial_dims=0), InvertibleConv1x1(4)),
            SplineCoupling(4, bins=4, width=4, spatial_dims=0),
            *(MaskedAutoregressive(4, width=6), Reversed()),
            MaskedAutoregressive(4, "spline", bins=4, width=6, depth=1, activation="tanh"),
            *(nflows_spline(4), Reversed(), ActNorm(4)),
        ],
        VECTOR,
    ),
}
