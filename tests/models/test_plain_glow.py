"""This package's Glow and a Glow in plain PyTorch have the same loss curve in training.

The plain one is that of the benchmarks, with separate operations, whose activations autograd
stores. Both models start from the same weights.
"""

import copy
import math

import pytest
import torch
from cases import perturbed
from torch import Tensor, nn

from benchmarks.harness.plain_glow import multiscale
from mflow_kernels import Glow
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.splits import load_splits
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close

STEPS = 25
SHAPE = (1, 28, 28)
BATCH = 16


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


# tests/layers/test_step.py combines each scale with both ways to store states.
@pytest.mark.parametrize(("scale", "reversible"), [("tanh", True), ("sigmoid", False)])
def test_one_loss_curve(scale, reversible, device):
    images = load_splits("digits").train.first(BATCH * (STEPS + 1))
    first, *rest = dequantize(images, 8, torch.Generator().manual_seed(0)).double().split(BATCH)
    # Adam's first step is lr times the sign of the gradient. No gradient is zero up to rounding,
    # because the weights are perturbed, and actnorm is initialized from a batch of its own.
    glow = Glow(SHAPE, 2, 2, 16, scale=ScaleFunction(scale), reversible=reversible)
    perturbed(glow, 0.02).initialize(first.float())
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
