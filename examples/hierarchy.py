"""Train a hierarchy by hand: a manifold flow on images, then one on its coordinates u.

python examples/hierarchy.py
"""

import torch

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, VectorFlow


def images(n: int) -> torch.Tensor:
    """Return images (N, 1, 4, 4): random mixtures of three patterns, with a little noise."""
    patterns = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)) / 4
    weights = torch.rand(n, 3).square()
    return (weights @ patterns + 0.01 * torch.randn(n, 16)).view(n, 1, 4, 4)


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    x = images(256)
    stages = HierarchicalFlow(
        [
            ManifoldFlow(Glow((1, 4, 4), levels=1, steps=3, width=16), manifold_dim=6),
            ManifoldFlow(VectorFlow(6, steps=3, width=16), manifold_dim=3),
        ]
    )
    for stage, flow in enumerate(stages.stages):
        # Stage 0 is trained on images, stage 1 on the u of stage 0, which is then frozen.
        with torch.no_grad():
            flow.initialize(x if stage == 0 else stages.stages[0].encode(x))
        optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
        first = last = 0.0
        for step in range(steps):
            batch = x[torch.randint(len(x), (64,))]
            loss = stages.terms(batch, stage=stage).loss.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first, last = first if step else loss.item(), loss.item()
        print(f"stage {stage}: {first:.1f} nats at first, {last:.1f} after {steps} steps")

    with torch.no_grad():
        codes = stages.encode(x[:5])
        samples = stages.sample(4)
    print(f"codes {tuple(codes.shape)}, samples {tuple(samples.shape)}")


if __name__ == "__main__":
    main()
