"""Use fused steps of flow in your own model, with a condition, and check that it is a bijection.

python examples/fused_step.py
"""

import torch
from torch import Tensor, nn

from mflow_kernels import Bijection, FlowStep
from mflow_kernels.testing import check_bijection


class Conditioner(nn.Module):
    """Computes scales and shifts from the unchanged half and an optional condition (N, 4)."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.into = nn.Conv2d(channels // 2, width, 3, padding=1)
        self.condition = nn.Linear(4, width)
        self.out = nn.Conv2d(width, 2 * (channels - channels // 2), 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.into(x)
        if condition is not None:
            hidden = hidden + self.condition(condition)[:, :, None, None]
        return self.out(hidden.relu())


class MyFlow(Bijection):
    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(FlowStep(channels, Conditioner(channels)) for _ in range(depth))

    def forward(self, x: Tensor, *condition: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for step in self.steps:
            x, logdet = step(x, *condition)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor, *condition: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        for step in reversed(self.steps):
            z, logdet = step.inverse(z, *condition)
            total = total + logdet
        return z, total


if __name__ == "__main__":
    torch.manual_seed(0)
    flow = MyFlow(channels=4, depth=3)
    x, condition = 3 + 2 * torch.randn(8, 4, 6, 6), torch.randn(8, 4)
    flow.initialize(x, condition)  # sets every actnorm from a first batch, before training
    check_bijection(flow, (2, 4, 2, 2))  # round trip, Jacobian, log-determinants, dtypes
    z, logdet = flow(x, condition)
    print(f"first actnorm: means {[round(-b.item(), 1) for b in flow.steps[0].actnorm.bias]}")
    back, _ = flow.inverse(z, condition)
    print(f"logdet {tuple(logdet.shape)}, round trip within {(back - x).abs().max():.1e}")
