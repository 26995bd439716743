"""Manifold flows on small images, compared with other methods."""
