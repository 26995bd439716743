"""Manifold flows where the truth is known: points, images of known factors, handwritten digits."""
