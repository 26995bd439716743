"""Affine couplings that do not keep half of the channels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.ops.scale import ScaleFunction


class AffineMap(nn.Module):
    """An affine map of all channels but the first `kept`, which the network `net` reads.

    With kept = 0 the scales and shifts depend on the conditions only.
    """

    def __init__(self, net: nn.Module, scale: ScaleFunction, kept: int) -> None:
        super().__init__()
        self.net, self.scale, self.kept = net, scale, kept

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(x, context, ops.affine_coupling)

    def inverse(self, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(y, context, ops.affine_coupling_inverse)

    def _map(self, x: Tensor, context: tuple[Tensor, ...], run: Any) -> tuple[Tensor, Tensor]:
        params = self.net(x[:, : self.kept], *context)
        # The operator keeps as many channels as it changes. It does not see more than these, and
        # zeros stand for those that are missing.
        more = 2 * self.kept - x.shape[1]
        if more < 0:
            y, log_det = run(F.pad(x, (0, 0) * (x.dim() - 2) + (-more, 0)), params, self.scale)
            return y[:, -more:], log_det
        y, log_det = run(x[:, more:], params, self.scale)
        return torch.cat([x[:, :more], y], dim=1), log_det
