"""Glow (arXiv 1807.03039) in plain PyTorch, as it is commonly written.

The packages are compared with it, and `multiscale(glow).double()` is the reference for all of them.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels import FlowStep, Glow, Split
from mflow_kernels.layers.networks import CouplingNetwork
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.ops.scale import log_scale_ref

Latents = tuple[Tensor, ...]


def with_torch_networks(model: nn.Module) -> None:
    """Run the networks of a model by torch's layers alone."""
    for module in model.modules():
        if type(module) is CouplingNetwork:
            module.__class__ = nn.Sequential


class Coupling(nn.Module):
    """An affine coupling in a few lines."""

    def __init__(self, net: nn.Module, scale: ScaleFunction) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        self.scale = scale

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_a, x_b = x.chunk(2, dim=1)
        raw, shift = self.net(x_a).chunk(2, dim=1)
        return x_a, x_b, log_scale_ref(raw, self.scale), shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_a, x_b, log_s, shift = self._parts(x)
        if self.scale.order == "shift-scale":
            y_b = (x_b + shift) * log_s.exp()
        else:
            y_b = x_b * log_s.exp() + shift
        return torch.cat([x_a, y_b], dim=1), log_s.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y_a, y_b, log_s, shift = self._parts(y)
        if self.scale.order == "shift-scale":
            x_b = y_b * (-log_s).exp() - shift
        else:
            x_b = (y_b - shift) * (-log_s).exp()
        return torch.cat([y_a, x_b], dim=1), -log_s.flatten(1).sum(1)


class Step(nn.Module):
    """A step of flow as three separate operations, with copied weights."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, step: FlowStep) -> None:
        super().__init__()
        conv, actnorm = step.conv, step.actnorm
        self.bias = nn.Parameter(actnorm.bias.detach().clone())
        self.log_scale = nn.Parameter(actnorm.log_scale.detach().clone())
        self.lower = nn.Parameter(conv.lower.detach().clone())
        self.upper = nn.Parameter(conv.upper.detach().clone())
        self.log_diagonal = nn.Parameter(conv.log_diagonal.detach().clone())
        self.register_buffer("permutation", conv.permutation.clone())
        self.register_buffer("sign", conv.sign.clone())
        self.register_buffer("eye", torch.eye(len(conv.sign)))
        self.coupling = Coupling(step.coupling.net, step.coupling.scale)

    def weight(self) -> Tensor:
        lower = self.lower.tril(-1) + self.eye
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ lower @ upper

    def log_determinant(self) -> Tensor:
        """Return log |det W|."""
        return self.log_diagonal.sum()

    def mixed(self, x: Tensor) -> Tensor:
        """Actnorm and 1x1 convolution."""
        bias, log_scale = self.bias.view(1, -1, 1, 1), self.log_scale.view(1, -1, 1, 1)
        return F.conv2d(log_scale.exp() * (x + bias), self.weight()[:, :, None, None])

    def logdet(self, x: Tensor) -> Tensor:
        """Return the log-determinant of `mixed` for inputs like x."""
        return x.shape[2] * x.shape[3] * (self.log_scale.sum() + self.log_determinant())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = self.coupling(self.mixed(x))
        return x, logdet + self.logdet(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = self.coupling.inverse(z)
        z = F.conv2d(z, torch.linalg.inv(self.weight())[:, :, None, None])
        bias, log_scale = self.bias.view(1, -1, 1, 1), self.log_scale.view(1, -1, 1, 1)
        return (-log_scale).exp() * z - bias, logdet - self.logdet(z)


class OtherStep(Step):
    """A step with another matrix W and scale function, whose coupling may come first."""

    matrix: Tensor

    def __init__(
        self, step: FlowStep, matrix: Tensor, scale: ScaleFunction, coupling_first: bool = False
    ) -> None:
        super().__init__(step)
        self.register_buffer("matrix", matrix.detach())
        self.coupling.scale, self.coupling_first = scale, coupling_first

    def weight(self) -> Tensor:
        return self.matrix

    def log_determinant(self) -> Tensor:
        return torch.linalg.slogdet(self.matrix).logabsdet

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.coupling_first:
            return super().forward(x)
        x, logdet = self.coupling(x)
        return self.mixed(x), logdet + self.logdet(x)


class Multiscale(nn.Module):
    """Levels of squeeze, steps and split. `z, logdet = model(x)` as for `Glow`."""

    def __init__(self, levels: Sequence[Sequence[nn.Module]], splits: Sequence[nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(level) for level in levels)
        self.splits = nn.ModuleList(splits)

    def forward(self, x: Tensor) -> tuple[Latents, Tensor]:
        latents: list[Tensor] = []
        logdet = x.new_zeros(x.shape[0])
        for i, level in enumerate(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for step in level:
                x, change = step(x)
                logdet = logdet + change
            if i < len(self.splits):
                x, change = self.splits[i](x)
                logdet = logdet + change
                x, latent = x.chunk(2, dim=1)
                latents.append(latent)
        return (*latents, x), logdet

    def inverse(self, z: Latents) -> tuple[Tensor, Tensor]:
        *latents, x = z
        logdet = x.new_zeros(x.shape[0])
        for i in reversed(range(len(self.levels))):
            if i < len(self.splits):
                x, change = self.splits[i].inverse(torch.cat([x, latents[i]], dim=1))
                logdet = logdet + change
            for step in reversed(self.levels[i]):
                x, change = step.inverse(x)
                logdet = logdet + change
            x = F.pixel_shuffle(x, 2)
        return x, logdet


def multiscale(
    glow: Glow,
    step: Callable[[FlowStep], nn.Module] = Step,
    split: Callable[[Split], nn.Module] = lambda s: Coupling(s.coupling.net, s.coupling.scale),
) -> Multiscale:
    """Convert each layer of a Glow with `step` and `split`."""
    levels: list[list[nn.Module]] = []
    splits = []
    for layer in glow.chain.layers:
        if isinstance(layer, FlowStep):
            levels[-1].append(step(layer))
        elif isinstance(layer, Split):
            splits.append(split(layer))
        else:
            levels.append([])
    return Multiscale(levels, splits)
