"""Train a manifold flow on your own data tensor: 8x8 images with two degrees of freedom.

python examples/manifold_flow.py
"""

import math

import torch

from mflow_kernels import Glow, ManifoldFlow, ManifoldObjective


def data(n: int) -> torch.Tensor:
    """Return images (N, 1, 8, 8) of a spot of random size, at a random place on a circle."""
    angle, size = 2 * math.pi * torch.rand(n, 1, 1), 0.15 + 0.2 * torch.rand(n, 1, 1)
    grid = torch.linspace(-1, 1, 8)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    distance = (x - 0.5 * angle.cos()) ** 2 + (y - 0.5 * angle.sin()) ** 2
    images = torch.exp(-distance / size) - 0.5
    return (images + 0.01 * torch.randn(n, 8, 8))[:, None]


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    images = data(256)
    flow = ManifoldFlow(
        Glow((1, 8, 8), levels=2, steps=2, width=16),
        manifold_dim=8,
        objective=ManifoldObjective("data", "l2", weight=100.0),
    )
    flow.initialize(images)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for step in range(steps):
        terms = flow.terms(images[torch.randint(len(images), (64,))])
        optimizer.zero_grad()
        terms.loss.mean().backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {terms.loss.mean().item():.1f} nats")

    test = data(64)
    with torch.no_grad():
        u, projected = flow.encode(test), flow.project(test)
        error = (projected - test).square().mean().sqrt()
        samples = flow.sample(4)
    print(f"u {tuple(u.shape)}, samples {tuple(samples.shape)}")
    print(f"off the manifold by {error:.3f} per pixel")


if __name__ == "__main__":
    main()
