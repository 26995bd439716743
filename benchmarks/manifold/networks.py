"""The networks of the comparison, which all methods share."""

from typing import Any

from torch import nn

from benchmarks.manifold.sets import SIDE
from benchmarks.manifold.tarflow import TarFlow, VectorTarFlow
from mflow_kernels import Glow, Jet, VectorFlow
from mflow_kernels.layers import Bijection
from mflow_kernels.ops.scale import ScaleFunction

SHAPE, DIM = (1, SIDE, SIDE), 32  # of an image; dimension of the manifolds
WIDTH, WIDE = 32, 55  # of the flow; with as many parameters as flow and prior together
COMPONENTS = 20  # Gaussians in the mixture at the end of a prior
# Channels of the autoencoder: with the parameters of the flow, and with the prior's as well.
CHANNELS, MORE_CHANNELS = 7, 12
VAE_CHANNELS = 10
# Jet's own scale function, 2 sigmoid, at most doubles a number in a coupling. Six couplings then
# reach no less than 6.7 bits per dimension: black pixels vary by only one level of grey.
JET_CLAMP = 3.0


def glow(width: int = WIDTH) -> Bijection:
    return Glow(SHAPE, levels=2, steps=2, width=width, reversible=False)


def jet() -> Bijection:
    return Jet(
        SHAPE, patch=4, couplings=12, depth=1, width=32, heads=2,
        scale=ScaleFunction("tanh", clamp=JET_CLAMP), reversible=False,
    )  # fmt: skip


def tarflow() -> Bijection:
    return TarFlow(SHAPE, patch=2, blocks=4, layers=1, width=32, heads=2)


def prior(**options: Any) -> Bijection:
    """Build a flow on the coordinates; `options` are those of `VectorFlow`."""
    return VectorFlow(DIM, steps=4, width=32, **options)


def tarflow_prior() -> Bijection:
    return VectorTarFlow(DIM, channels=4, blocks=4, layers=1, width=20, heads=2)


def autoencoder(channels: int, outputs: int = 1) -> tuple[nn.Module, nn.Module]:
    """Build a convolutional encoder and decoder, smooth because the volume needs derivatives.

    Both give `outputs` numbers for each number of the code and each pixel.
    """
    c, n = channels, outputs
    encoder = nn.Sequential(
        nn.Conv2d(1, c, 4, 2, 1), nn.SiLU(), nn.Conv2d(c, 2 * c, 4, 2, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(2 * c * 16, n * DIM),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(DIM, 2 * c * 16), nn.Unflatten(1, (2 * c, 4, 4)), nn.SiLU(),
        nn.ConvTranspose2d(2 * c, c, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(c, n, 4, 2, 1),
    )  # fmt: skip
    return encoder, decoder
