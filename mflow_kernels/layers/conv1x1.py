"""Invertible 1x1 convolution with an LU-factored weight."""

import math

import torch
from torch import Tensor, nn

from mflow_kernels.layers.bijection import Instructed
from mflow_kernels.layers.folding import ActNormConv
from mflow_kernels.ops.checks import check_count, check_device
from mflow_kernels.ops.folding import plu
from mflow_kernels.reversible.steps import Step, Steps


class InvertibleConv1x1(Instructed):
    """y_p = W x_p with W = P L (U + diag(s)) (Glow, arXiv 1807.03039, section 3.2).

    P is a fixed permutation, L is unit lower and U strictly upper triangular, and s keeps its
    initial signs. W is therefore invertible for all values of its parameters, and
    log |det W| = sum log |s| costs C additions. W is initialized as a random rotation, drawn from
    torch's global generator.

    Args:
        channels: C of the states (N, C, *spatial).
        n_split: n, if groups of n channels share one n x n matrix, as in Glow-TTS (arXiv
            2005.11129). A group has n / 2 neighbouring channels of the first half of the channels,
            and those at the same place of the second half. n is even, and C a multiple of it. By
            default W is one C x C matrix.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, *, n_split: int | None = None) -> None:
        super().__init__()
        check_count("channels", channels, 1)
        if n_split is not None:
            check_count("n_split", n_split, 2, channels)
            if n_split % 2 or channels % n_split:
                raise ValueError(
                    f"n_split: expected an even divisor of {channels} channels, got {n_split}"
                )
        self.channels: int = channels
        self.n_split = n_split
        n = n_split or channels
        self.lower = nn.Parameter(torch.empty(n, n))
        self.upper = nn.Parameter(torch.empty(n, n))
        self.log_diagonal = nn.Parameter(torch.empty(n))
        self.register_buffer("permutation", torch.empty(n, n))
        self.register_buffer("sign", torch.empty(n))
        self.factor_(torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0])

    def weight(self) -> Tensor:
        """W (C, C), differentiable in its factors."""
        return plu(*self.factors())

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """P, L and U (C, C), the signs of s and log |s| (C,), of the whole W."""
        own = self.permutation, self.lower, self.upper, self.sign, self.log_diagonal
        if self.n_split is None:
            return own
        # Channels of one group keep their order, so the factors of W are those of its groups.
        c, n, groups = self.channels, self.n_split, self.channels // self.n_split
        same = torch.eye(groups, dtype=self.sign.dtype, device=self.sign.device)
        ones = same.new_ones(1, groups, 1)
        p, lower, upper = (
            (m.view(2, 1, n // 2, 2, 1, n // 2) * same.view(1, groups, 1, 1, groups, 1)).view(c, c)
            for m in own[:3]
        )
        sign, log_diagonal = ((v.view(2, 1, n // 2) * ones).view(c) for v in own[3:])
        return p, lower, upper, sign, log_diagonal

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
        """Factor W (C, C), or with n_split the n x n matrix of a group, by pivoted LU, and set
        permutation and signs too.

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
        return [Steps([Step(ActNormConv(None, self), None)], masked=self.masked)]

    def checked(self, name: str, value: object) -> Tensor:
        x = super().checked(name, value)
        check_device(name, x, self.log_diagonal)
        return x


def condition_number(weight: Tensor) -> Tensor:
    """Largest singular value over the smallest; infinite if the matrix is 0 or not finite."""
    if not weight.isfinite().all():
        return weight.new_full((), math.inf)
    singular = torch.linalg.svdvals(weight)
    return (singular[0] / singular[-1]).nan_to_num(math.inf, math.inf)  # 0 / 0 of W = 0
