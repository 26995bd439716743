"""Fused kernels for normalizing flows on images, and manifold learning with them."""

from mflow_kernels.layers import (
    ActNorm,
    AffineCoupling,
    Bijection,
    FlowStep,
    InvertibleConv1x1,
    ReversibleChain,
    Split,
    Squeeze,
)
from mflow_kernels.models import Glow, HierarchicalFlow, ManifoldFlow, VectorFlow
from mflow_kernels.objectives import ManifoldObjective, Terms, bits_per_dimension

__version__ = "0.1.0"

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "FlowStep",
    "Glow",
    "HierarchicalFlow",
    "InvertibleConv1x1",
    "ManifoldFlow",
    "ManifoldObjective",
    "ReversibleChain",
    "Split",
    "Squeeze",
    "Terms",
    "VectorFlow",
    "bits_per_dimension",
]
