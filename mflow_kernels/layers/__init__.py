"""Invertible layers over the operators: `z, logdet = layer(x)`, `x, logdet = layer.inverse(z)`."""

from mflow_kernels.layers.actnorm import ActNorm
from mflow_kernels.layers.autoregressive import MaskedAutoregressive
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.chain import ReversibleChain
from mflow_kernels.layers.conv1x1 import InvertibleConv1x1
from mflow_kernels.layers.coupling import AffineCoupling, Split
from mflow_kernels.layers.flow import Flow
from mflow_kernels.layers.networks import CouplingNetwork, coupling_net
from mflow_kernels.layers.rearrange import Permutation, PixelPairs, Squeeze, Unsqueeze
from mflow_kernels.layers.spline import SplineCoupling
from mflow_kernels.layers.step import FlowStep

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "CouplingNetwork",
    "Flow",
    "FlowStep",
    "InvertibleConv1x1",
    "MaskedAutoregressive",
    "Permutation",
    "PixelPairs",
    "ReversibleChain",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "coupling_net",
]
