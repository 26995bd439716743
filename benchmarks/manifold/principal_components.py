"""Principal components as a linear flow."""

import torch
from torch import Tensor, nn

from mflow_kernels.layers import Bijection


class PrincipalComponents(Bijection):
    """The linear flow to whitened principal components, in one latent (D,), largest last.

    The smallest D - d components share one variance, their mean, as in probabilistic principal
    component analysis.

    Args:
        x: data (M, *input_shape) to fit.
        dim: d.
    """

    def __init__(self, x: Tensor, dim: int) -> None:
        super().__init__()
        self.input_shape: tuple[int, ...] = tuple(x.shape[1:])
        self.latent_shapes: tuple[tuple[int, ...], ...] = ((x[0].numel(),),)
        flat = x.flatten(1).double()
        variances, axes = torch.linalg.eigh(flat.T.cov())  # in ascending order
        off = len(variances) - dim
        variances[:off] = variances[:off].mean()
        scale = variances.sqrt()
        self.register_buffer("mean", flat.mean(0).float())
        self.register_buffer("inward", (axes / scale).float())  # x to latents
        self.register_buffer("rest", (axes * scale)[:, :off].float())
        self.components = nn.Parameter((axes * scale)[:, off:].float(), requires_grad=False)
        self.logdet = -scale.log().sum().item()

    def forward(self, x: Tensor, *context: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        z = (x.flatten(1) - self.mean) @ self.inward
        return (z,), torch.full_like(z[:, 0], self.logdet)

    def inverse(self, z: tuple[Tensor, ...], *context: Tensor) -> tuple[Tensor, Tensor]:
        outward = torch.cat([self.rest, self.components], 1)
        x = (z[0] @ outward.T + self.mean).unflatten(1, self.input_shape)
        return x, torch.full_like(z[0][:, 0], -self.logdet)
