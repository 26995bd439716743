"""Bits per dimension of images."""

import math

from torch import Tensor

from mflow_kernels.ops.checks import check_count


def bits_per_dimension(log_likelihood: Tensor, dimensions: int, n_bits: int) -> Tensor:
    """Convert log-likelihoods of dequantized images to bits per dimension.

    x = (image + uniform noise) / 2 ** n_bits - 1/2 has 2 ** (n_bits D) times the density of
    image + noise. The mean of -log2 p(image + noise) over the noise is an upper bound of
    -log2 p(image).

    Args:
        log_likelihood: log p(x), any shape, in nats.
        dimensions: D, the number of pixels times channels, at least 1.
        n_bits: bits per value of the image, at least 1.

    Returns:
        n_bits - log p(x) / (D log 2), with the shape and dtype of log_likelihood.
    """
    check_count("dimensions", dimensions, 1)
    check_count("n_bits", n_bits, 1)
    return n_bits - log_likelihood / (dimensions * math.log(2))
