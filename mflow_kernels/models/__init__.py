"""Flows on images and vectors, manifold flows and hierarchies of them."""

from mflow_kernels.models.glow import Glow, VectorFlow
from mflow_kernels.models.hierarchy import HierarchicalFlow
from mflow_kernels.models.manifold import ManifoldFlow

__all__ = ["Glow", "HierarchicalFlow", "ManifoldFlow", "VectorFlow"]
