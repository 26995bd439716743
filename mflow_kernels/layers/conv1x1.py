"""Invertible 1x1 convolution with an LU-factored weight."""

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.ops._launch import accumulator, pixels


class InvertibleConv1x1(Bijection):
    """y_p = W x_p with W = P L (U + diag(s)) (Glow, arXiv 1807.03039, section 3.2).

    P is a fixed permutation, L unit lower and U strictly upper triangular, and s keeps the signs it
    starts with, so that W is invertible wherever its parameters go and log |det W| = sum log |s|
    costs C additions. W starts as a random rotation, drawn from torch's global generator.

    Args:
        channels: C of the states (N, C, *spatial).
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        p, lower, upper = torch.linalg.lu(rotation)
        dtype = torch.get_default_dtype()
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log().to(dtype))
        self.register_buffer("permutation", p.to(dtype))
        self.register_buffer("sign", upper.diagonal().sign().to(dtype))

    def weight(self) -> Tensor:
        """W (C, C), differentiable in its factors."""
        return plu(self.permutation, self.lower, self.upper, self.sign, self.log_diagonal)

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ops.conv1x1(x, self.weight()), self._logdet(x)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ops.conv1x1_inverse(z, self.weight()), -self._logdet(z)

    def _logdet(self, x: Tensor) -> Tensor:
        log_det = self.log_diagonal.to(accumulator(x.dtype)).sum()
        return (pixels(x) * log_det).expand(x.shape[0])


def plu(
    permutation: Tensor, lower: Tensor, upper: Tensor, sign: Tensor, log_diagonal: Tensor
) -> Tensor:
    """P L (U + diag(sign * exp(log_diagonal))), batched over leading axes, outside autocast."""
    with torch.autocast(lower.device.type, enabled=False):
        unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        diagonal = torch.diag_embed(sign * log_diagonal.exp())
        return permutation @ (lower.tril(-1) + unit) @ (upper.triu(1) + diagonal)
