"""This package's Glow and a Glow in plain PyTorch have the same loss curve in training.

The plain one is that of the benchmarks, with separate operations, whose activations autograd
stores. Both models start from the same weights.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness.plain_glow import multiscale
from mflow_kernels import Glow
from mflow_kernels.data.batches import BatchStream
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.splits import load_splits
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close

STEPS = 25
SHAPE = (1, 28, 28)
BATCH = 16


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
    plain = multiscale(glow)
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
