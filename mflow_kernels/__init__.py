"""Fused kernels for normalizing flows on images, and manifold learning with them."""

__version__ = "0.1.0"
