"""Flows on images and vectors, manifold flows and hierarchies of them."""

from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.chart import Chart
from mflow_kernels.models.dimension import local_dimension
from mflow_kernels.models.glow import Glow, VectorFlow
from mflow_kernels.models.graphs import graphed
from mflow_kernels.models.hierarchy import HierarchicalFlow
from mflow_kernels.models.jet import Jet
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.mixture import GaussianMixture
from mflow_kernels.models.objectives import ManifoldObjective, Terms
from mflow_kernels.models.penalty_weight import ErrorBound, WeightSchedule
from mflow_kernels.models.selection import (
    IntrinsicDimension,
    estimate_intrinsic_dimension,
    latent_importance,
    manifold_mask_from_data,
)
from mflow_kernels.models.volume import Estimate

__all__ = [
    "Chart",
    "ErrorBound",
    "Estimate",
    "GaussianMixture",
    "Glow",
    "HierarchicalFlow",
    "IntrinsicDimension",
    "Jet",
    "ManifoldFlow",
    "ManifoldObjective",
    "Terms",
    "VectorFlow",
    "WeightSchedule",
    "bits_per_dimension",
    "estimate_intrinsic_dimension",
    "graphed",
    "latent_importance",
    "local_dimension",
    "manifold_mask_from_data",
]
