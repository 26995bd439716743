"""Bits per dimension of Gaussians that are fitted in closed form, beside the trained methods.

    python -m benchmarks.manifold.gaussians

Two Gaussians are fitted to the training images of each set: one with a full covariance, and one
whose covariance is that of the principal components plus a variance for each pixel. The test
images and their noise are those of the comparison.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, LowRankMultivariateNormal, MultivariateNormal

from benchmarks.harness.output import markdown_table
from benchmarks.manifold.networks import DIM
from benchmarks.manifold.sets import SETS
from mflow_kernels import bits_per_dimension
from mflow_kernels.data.dequantization import dequantize


def gaussians(x: Tensor, dim: int) -> dict[str, Distribution]:
    """Fit both Gaussians to data x (M, *shape)."""
    flat = x.flatten(1).double()
    mean, covariance = flat.mean(0), flat.T.cov()
    variances, axes = torch.linalg.eigh(covariance)  # in ascending order
    components = axes[:, -dim:] * variances[-dim:].sqrt()
    rest = covariance.diagonal() - components.square().sum(1)
    return {
        "Gaussian, full covariance": MultivariateNormal(mean, covariance),
        f"{dim} principal components, a variance for each pixel": LowRankMultivariateNormal(
            mean, components, rest
        ),
    }


def main() -> None:
    lines: dict[str, list[str]] = {}
    for sets in SETS.values():
        images = sets()
        train = dequantize(images.train.images, 8, torch.Generator().manual_seed(0))
        test = dequantize(images.test.images, 8, torch.Generator().manual_seed(10**6))
        for name, density in gaussians(train, DIM).items():
            log_prob = density.log_prob(test.flatten(1).double())
            bits = bits_per_dimension(log_prob, math.prod(test.shape[1:]), 8).mean().item()
            lines.setdefault(name, []).append(f"{bits:.3f}")
    print(markdown_table(("bits per dimension", *SETS), [[k, *v] for k, v in lines.items()]))


if __name__ == "__main__":
    main()
