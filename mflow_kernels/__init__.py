"""Fused kernels for normalizing flows on images, and manifold learning with them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mflow_kernels import layers as layers
    from mflow_kernels import models as models
    from mflow_kernels import ops as ops
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
    from mflow_kernels.models import (
        Glow,
        HierarchicalFlow,
        IntrinsicDimension,
        ManifoldFlow,
        ManifoldObjective,
        Terms,
        VectorFlow,
        bits_per_dimension,
        estimate_intrinsic_dimension,
        latent_importance,
        manifold_mask_from_data,
    )

__version__ = "0.1.0"

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "FlowStep",
    "Glow",
    "HierarchicalFlow",
    "IntrinsicDimension",
    "InvertibleConv1x1",
    "ManifoldFlow",
    "ManifoldObjective",
    "ReversibleChain",
    "Split",
    "Squeeze",
    "Terms",
    "VectorFlow",
    "bits_per_dimension",
    "estimate_intrinsic_dimension",
    "latent_importance",
    "manifold_mask_from_data",
]

_PARTS = ("layers", "models")

if not TYPE_CHECKING:  # to a type checker it would make every misspelt name an attribute

    def __getattr__(name: str) -> Any:
        """Import on first use: the command line answers --help, and sets what torch reads from the
        environment as it starts, before torch is there."""
        if name in (*_PARTS, "ops"):
            return importlib.import_module(f"mflow_kernels.{name}")
        if name in __all__:
            for part in _PARTS:
                module = importlib.import_module(f"mflow_kernels.{part}")
                if hasattr(module, name):
                    globals()[name] = getattr(module, name)
                    return globals()[name]
        raise AttributeError(f"module 'mflow_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_PARTS, "ops", *globals()})
