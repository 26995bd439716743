"""Invertible 1x1 convolution with an LU-factored weight."""

import math

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.folding import ActNormConv, plu
from mflow_kernels.ops.checks import check_count, check_state_for
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.reversible.steps import Step, Steps


class InvertibleConv1x1(Bijection):
    """y_p = W x_p with W = P L (U + diag(s)) (Glow, arXiv 1807.03039, section 3.2).

    P is a fixed permutation, L is unit lower and U strictly upper triangular, and s keeps its
    initial signs. W is therefore invertible for all values of its parameters, and
    log |det W| = sum log |s| costs C additions. W is initialized as a random rotation, drawn from
    torch's global generator.

    Args:
        channels: C of the states (N, C, *spatial).
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels, 1)
        self.channels = channels
        self.lower = nn.Parameter(torch.empty(channels, channels))
        self.upper = nn.Parameter(torch.empty(channels, channels))
        self.log_diagonal = nn.Parameter(torch.empty(channels))
        self.register_buffer("permutation", torch.empty(channels, channels))
        self.register_buffer("sign", torch.empty(channels))
        square = torch.randn(channels, channels, dtype=torch.float64)
        self.factor_(torch.linalg.qr(square)[0])

    def weight(self) -> Tensor:
        """W (C, C), differentiable in its factors."""
        return plu(self.permutation, self.lower, self.upper, self.sign, self.log_diagonal)

    @torch.no_grad()
    def condition_number(self) -> Tensor:
        """Largest singular value of W over its smallest, a float64 scalar on W's device.

        It is infinite if W is not finite. The rounding error of W^-1 y grows with it.
        """
        return condition_number(self._exact_weight())

    @torch.no_grad()
    def bound_condition_(self, limit: float) -> bool:
        """Reduce the condition number of W to at most `limit`, up to the rounding of W's factors.

        Singular values are clipped to [m / sqrt(limit), m * sqrt(limit)] around their geometric
        mean m. W is then factored again, which also changes its permutation and signs.

        Returns:
            Whether W was changed. W stays unchanged if its condition number is within the limit.

        Raises:
            ValueError: a limit below 1, a W that is not finite.
        """
        if not limit >= 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        weight = self._exact_weight()
        if not weight.isfinite().all():
            raise ValueError("weight: expected a finite matrix to bound its condition")
        u, singular, vh = torch.linalg.svd(weight)
        if singular[0] <= limit * singular[-1]:
            return False
        middle = self.log_diagonal.double().mean().exp()  # |det W|^(1 / C)
        clipped = singular.clamp(middle / math.sqrt(limit), middle * math.sqrt(limit))
        self.factor_((u * clipped) @ vh)
        return True

    def _exact_weight(self) -> Tensor:
        factors = (self.permutation, self.lower, self.upper, self.sign, self.log_diagonal)
        return plu(*(factor.double() for factor in factors))

    @torch.no_grad()
    def factor_(self, weight: Tensor) -> None:
        """Factor W (C, C) by pivoted LU, and set permutation and signs too.

        Raises:
            ValueError: W has another shape.
        """
        if weight.shape != self.lower.shape:
            raise ValueError(
                f"weight: expected shape {tuple(self.lower.shape)}, got {tuple(weight.shape)}"
            )
        p, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()
        self.permutation.copy_(p)
        self.sign.copy_(diagonal.sign())
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_diagonal.copy_(diagonal.abs().log())

    def instructions(self) -> list[Steps]:
        return [Steps([Step(ActNormConv(None, self), None)])]

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        check_state_for("x", x, self.log_diagonal)
        return ops.conv1x1(x, self.weight()), self._logdet(x)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        check_state_for("z", z, self.log_diagonal)
        return ops.conv1x1_inverse(z, self.weight()), -self._logdet(z)

    def _logdet(self, x: Tensor) -> Tensor:
        log_det = self.log_diagonal.to(accumulator(x.dtype)).sum()
        return (pixels(x) * log_det).expand(x.shape[0])


def condition_number(weight: Tensor) -> Tensor:
    """Largest singular value over the smallest; infinite if the matrix is not finite."""
    if not weight.isfinite().all():
        return weight.new_full((), math.inf)
    singular = torch.linalg.svdvals(weight)
    return singular[0] / singular[-1]
