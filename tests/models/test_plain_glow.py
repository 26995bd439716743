"""This package's Glow and a Glow in plain PyTorch have the same loss curve in training.

The plain one is written here from the paper (arXiv 1807.03039), with separate operations: actnorm,
F.conv2d with torch.slogdet, and couplings in a few lines. Autograd stores every activation. Both
models start from the same weights.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels import FlowStep, Glow, Split, Squeeze
from mflow_kernels.data.batches import BatchStream
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.splits import load_splits
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close

STEPS = 25
SHAPE = (1, 28, 28)
BATCH = 16


class PlainGlow(nn.Module):
    """A Glow that takes only its weights from the layers; this class computes everything else."""

    def __init__(self, glow: Glow, scale: str) -> None:
        super().__init__()
        self.layers = copy.deepcopy(glow.chain.layers)
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        latents, logdet = [], x.new_zeros(x.shape[0])
        for layer in self.layers:
            if isinstance(layer, Squeeze):
                x = F.pixel_unshuffle(x, 2)
            elif isinstance(layer, FlowStep):
                x, change = self.step(layer, x)
                logdet = logdet + change
            elif isinstance(layer, Split):
                x, change = self.couple(layer.coupling.net, x)
                logdet = logdet + change
                x, latent = x.chunk(2, dim=1)
                latents.append(latent)
        return [*latents, x], logdet

    def step(self, step: FlowStep, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = x.shape[2] * x.shape[3]
        bias, log_scale = (p.view(1, -1, 1, 1) for p in (step.actnorm.bias, step.actnorm.log_scale))
        x = (x + bias) * log_scale.exp()
        conv = step.conv
        lower = conv.lower.tril(-1) + torch.eye(len(conv.lower)).to(conv.lower)
        upper = conv.upper.triu(1) + torch.diag(conv.sign * conv.log_diagonal.exp())
        weight = conv.permutation @ lower @ upper
        x = F.conv2d(x, weight[:, :, None, None])
        x, coupling = self.couple(step.coupling.net, x)
        return x, coupling + pixels * (log_scale.sum() + torch.linalg.slogdet(weight).logabsdet)

    def couple(self, net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x_a, x_b = x.chunk(2, dim=1)
        raw, shift = net(x_a).chunk(2, dim=1)
        if self.scale == "sigmoid":
            log_s = F.logsigmoid(raw + 2)
        else:
            log_s = torch.tanh(raw)
        y_b = (x_b + shift) * log_s.exp()
        return torch.cat([x_a, y_b], dim=1), log_s.flatten(1).sum(1)


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """The first STEPS + 1 batches of dequantized digits in a training run, in float64."""
    stream = iter(BatchStream(load_splits("digits").train, BATCH, seed=0))
    return [
        dequantize(next(stream), 8, stream_generator(0, Stream.TRAINING_NOISE, step)).double()
        for step in range(STEPS + 1)
    ]


def train(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Train with Adam and return the bits per dimension at every step."""
    like = next(model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve = []
    for x in batches:
        latents, logdet = model(x.to(like))
        normal = sum((z.square() + math.log(2 * math.pi)).flatten(1).sum(1) for z in latents) / 2
        loss = (normal - logdet).mean() / (math.prod(SHAPE) * math.log(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve)


def start(scale: str, reversible: bool, first: Tensor) -> Glow:
    """Return a Glow without gradients that are zero up to rounding.

    Adam's first step is lr times the sign of the gradient. If that sign came from rounding, the
    curves would differ by 1e-4. The networks' last layers are therefore not zero, and actnorm is
    initialized from a batch that is not used in training, on which its bias has no gradient.
    """
    glow = Glow(SHAPE, 2, 2, 16, scale=ScaleFunction(scale), reversible=reversible)
    for name, parameter in glow.named_parameters():
        if "net.4.weight" in name:
            nn.init.normal_(parameter, std=0.02)
    glow.initialize(first.float())
    return glow


# tests/layers/test_step.py combines each scale with both ways to store states.
@pytest.mark.parametrize(("scale", "reversible"), [("tanh", True), ("sigmoid", False)])
def test_one_loss_curve(scale, reversible, batches, device):
    first, *rest = batches
    glow = start(scale, reversible, first)
    plain = PlainGlow(glow, scale)
    curves = {
        (name, dtype): train(copy.deepcopy(model).to(device, dtype), rest)
        for dtype in (torch.float64, torch.float32)
        for name, model in (("mflow_kernels", glow), ("plain", plain))
    }
    exact = curves.pop(("plain", torch.float64))
    assert exact[-1] < exact[0] - 0.2  # training works

    # Each step rounds weights and loss with a random sign, so errors add up like a sum of STEPS
    # terms. The losses are of order one.
    for (name, dtype), curve in curves.items():
        assert_close(curve, exact, terms=STEPS, scale=1.0, name=f"{name}, {dtype}")
