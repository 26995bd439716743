"""Manifold flows where the truth is known: points of known density, and small images."""
