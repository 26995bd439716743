"""A mixture of Gaussians as the density of a manifold's coordinates."""

import torch
from torch import Tensor, nn

from mflow_kernels.layers.flow import check_temperature
from mflow_kernels.ops.checks import check_count, check_state
from mflow_kernels.ops.penalty_functions import HALF_LOG_2PI
from mflow_kernels.ops.precision import without_autocast

_ITERATIONS = 30  # of k-means, and of expectation and maximization
_FLOOR = 0.05  # added to each variance, as a share of the mean variance


class GaussianMixture(nn.Module):
    r"""A mixture of Gaussians on vectors u (N, d), as the density that `ManifoldFlow` gives to u.

        log p(u) = log sum_k w_k N(u; m_k, (L_k^T L_k)^-1)

    L_k is lower triangular with a positive diagonal. A flow and its inverse are continuous, so it
    takes one Gaussian to separate clusters, such as those of ten digits, only with bridges between
    them, on which samples fall (Cornish et al., arXiv 1909.13833). In a mixture each cluster can
    have a Gaussian of its own (Izmailov et al., arXiv 1912.13025). `fit` sets the parameters, and
    training with the flow refines them.

    Args:
        dim: d, at least 1.
        components: number of Gaussians, at least 1. Before `fit`, each is N(0, I).

    Raises:
        TypeError, ValueError: an argument is no integer, or is below 1.
    """

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        check_count("dim", dim, 1)
        check_count("components", components, 1)
        self.dim, self.components = dim, components
        self.log_weights = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.zeros(components, dim))
        self.log_diagonal = nn.Parameter(torch.zeros(components, dim))
        self.below_diagonal = nn.Parameter(torch.zeros(components, dim, dim))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.components}"

    def log_prob(self, u: Tensor) -> Tensor:
        """Return log p(u) (N,) of u (N, d), in nats.

        Raises:
            TypeError, ValueError: u has no floating dtype, or another shape.
        """
        self._check(u)
        # Autocast would multiply in 16 bits, which can change log p(u) by whole nats.
        with without_autocast(u):
            dtype = torch.promote_types(u.dtype, self.means.dtype)
            log_weights = self.log_weights.log_softmax(0)
            return _log_joint(u.to(dtype), log_weights, self.means, self._whitening()).logsumexp(1)

    @torch.no_grad()
    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw u (n, d). The temperature, >= 0, scales the deviations from the components' means.

        Raises:
            ValueError: n or the temperature is out of range.
        """
        check_count("n", n, 1)
        check_temperature(temperature)
        weights = self.log_weights.softmax(0)
        component = weights.multinomial(n, replacement=True, generator=generator)
        u = self.means.new_empty(n, self.dim)
        u.normal_(generator=generator).mul_(temperature)
        for k, whitening in enumerate(self._whitening()):
            own = component == k
            deviation = torch.linalg.solve_triangular(whitening.T, u[own], upper=True, left=False)
            u[own] = self.means[k] + deviation
        return u

    @torch.no_grad()
    def fit(self, u: Tensor, *, seed: int = 0) -> None:
        """Fit the mixture to samples u (N, d) by expectation and maximization, after k-means.

        Each variance is increased by a twentieth of the mean variance of u. So covariances have
        full rank, and training, which changes all parameters at one rate, stays stable.

        Args:
            u: at least 2 samples.
            seed: seed of k-means++, which chooses the samples at which the means start.

        Raises:
            TypeError, ValueError: u has no floating dtype, another shape, fewer than 2 samples or
                numbers that are not finite.
        """
        self._check(u)
        if len(u) < 2:
            raise ValueError(f"u: expected at least 2 samples, got shape {tuple(u.shape)}")
        if not u.isfinite().all():
            raise ValueError("u: expected finite numbers")
        u = u.double()
        mean, one = u.mean(0), torch.eye(self.dim, dtype=u.dtype, device=u.device)
        floor = (_FLOOR * u.var(0, correction=0).mean() + 1e-12) * one
        means = _starts(u, self.components, seed)
        for _ in range(_ITERATIONS):  # k-means
            nearest = torch.cdist(u, means).argmin(1)
            shares = nn.functional.one_hot(nearest, self.components).to(u)
            means = shares.T @ u / shares.sum(0).clamp(min=1)[:, None]
        for _ in range(_ITERATIONS):
            counts = shares.sum(0)
            means = (shares.T @ u + mean) / (counts + 1)[:, None]
            covariances = torch.stack(
                [((u - m).T * s) @ (u - m) for m, s in zip(means, shares.T, strict=True)]
            )
            covariances = covariances / counts.clamp(min=1)[:, None, None] + floor
            factor = torch.linalg.cholesky(covariances)
            whitening = torch.linalg.solve_triangular(factor, one.expand_as(factor), upper=False)
            log_weights = ((counts + 1) / (counts + 1).sum()).log()
            shares = _log_joint(u, log_weights, means, whitening).softmax(1)
        self.log_weights.copy_(log_weights)
        self.means.copy_(means)
        self.log_diagonal.copy_(whitening.diagonal(dim1=1, dim2=2).log())
        self.below_diagonal.copy_(whitening.tril(-1))

    def _whitening(self) -> Tensor:
        """Return L (components, d, d)."""
        return self.below_diagonal.tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def _check(self, u: Tensor) -> None:
        if check_state("u", u).dim() != 2 or u.shape[1] != self.dim:
            raise ValueError(f"u: expected shape (N, {self.dim}), got {tuple(u.shape)}")


def _log_joint(u: Tensor, log_weights: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
    """Return log w_k N(u; m_k, (L_k^T L_k)^-1) of each u and k, (N, components)."""
    errors = (u - means.to(u.dtype)[:, None]) @ whitening.to(u.dtype).mT
    scales = whitening.diagonal(dim1=1, dim2=2).log().sum(1) - u.shape[1] * HALF_LOG_2PI
    return (scales + log_weights).to(u.dtype) - errors.square().sum(2).T / 2


def _starts(u: Tensor, components: int, seed: int) -> Tensor:
    """Choose samples far from one another by k-means++ (Arthur and Vassilvitskii, SODA 2007)."""
    generator = torch.Generator().manual_seed(seed)
    squared = torch.ones(len(u), dtype=u.dtype)
    chosen = []
    for _ in range(components):
        # The samples at hand may be fewer than the components.
        weights = squared if squared.sum() > 0 else torch.ones_like(squared)
        chosen.append(u[int(weights.multinomial(1, generator=generator))])
        distances = torch.cdist(u, torch.stack(chosen)).amin(1)
        squared = distances.square().cpu()
    return torch.stack(chosen)
