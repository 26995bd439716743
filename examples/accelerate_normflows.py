"""Accelerate a Glow of normflows, built as in its examples, with one line.

pip install mflow_kernels[interop] && python examples/accelerate_normflows.py
"""

import copy

import normflows as nf
import torch

from mflow_kernels import graphed
from mflow_kernels.interop import accelerate, decelerate


def glow(levels: int = 2, steps: int = 4, hidden: int = 16, classes: int = 10) -> nf.MultiscaleFlow:
    base, merges, flows = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(channels, hidden) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
        size = 16 // 2 ** (levels - i)
        latent = (channels // 2 if i else channels, size, size)
        base.append(nf.distributions.ClassCondDiagGaussian(latent, classes))
    return nf.MultiscaleFlow(base, flows, merges)


def main() -> None:
    torch.manual_seed(0)
    model = glow()
    x, y = torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    model.log_prob(x, y)  # initializes actnorm from data
    original = copy.deepcopy(model)

    print(accelerate(model, reversible=True))  # the one line

    difference = (model.log_prob(x, y) - original.log_prob(x, y)).abs().max()
    print(f"log p differs by {difference:.1e} nats of {original.log_prob(x, y).mean():.0f}")

    loss_of = graphed(model, model.forward_kld)  # on a GPU, a step is two CUDA graphs
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3)
    for step in range(5):
        loss = loss_of(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {loss.item():.1f} nats")

    original.load_state_dict(model.state_dict())  # both have the same checkpoints
    decelerate(model)  # restores normflows' own classes, with the trained weights
    assert torch.equal(model.log_prob(x, y), original.log_prob(x, y))


if __name__ == "__main__":
    main()
