"""Fused kernels for normalizing flows on images, and manifold flows built on them."""

# ruff: noqa: F405
import importlib
from typing import TYPE_CHECKING, Any

from mflow_kernels.version import __version__ as __version__

if TYPE_CHECKING:  # at run time, __getattr__ below finds these names
    from mflow_kernels import layers as layers
    from mflow_kernels import models as models
    from mflow_kernels import ops as ops
    from mflow_kernels.layers import *  # noqa: F403
    from mflow_kernels.models import *  # noqa: F403
    from mflow_kernels.ops import ScaleFunction as ScaleFunction

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "Chart",
    "CouplingNetwork",
    "ErrorBound",
    "Estimate",
    "Flow",
    "FlowStep",
    "GaussianMixture",
    "Glow",
    "HierarchicalFlow",
    "IntrinsicDimension",
    "InvertibleConv1x1",
    "Jet",
    "ManifoldFlow",
    "ManifoldObjective",
    "MaskedAutoregressive",
    "Permutation",
    "PixelPairs",
    "ReversibleChain",
    "ScaleFunction",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Terms",
    "Unsqueeze",
    "VectorFlow",
    "WeightSchedule",
    "bits_per_dimension",
    "coupling_net",
    "estimate_intrinsic_dimension",
    "graphed",
    "latent_importance",
    "local_dimension",
    "manifold_mask_from_data",
]

# Submodules that define the public names.
_SOURCES = ("layers", "models", "ops")

if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import submodules and public names on first use.

        The command line can then answer --help without torch, and set environment variables that
        torch reads when it is imported.
        """
        if name in _SOURCES:
            return importlib.import_module(f"mflow_kernels.{name}")
        if name in __all__:
            for source in _SOURCES:
                module = importlib.import_module(f"mflow_kernels.{source}")
                if hasattr(module, name):
                    globals()[name] = getattr(module, name)
                    return globals()[name]
        raise AttributeError(f"module 'mflow_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SOURCES, *globals()})
