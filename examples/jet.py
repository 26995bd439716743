"""Train a Jet, a flow whose networks are vision transformers, on 8x8 images of two classes.

python examples/jet.py
"""

import torch

from mflow_kernels import Jet


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (n, 1, 8, 8) of smooth waves, and their classes (n,): along rows or columns."""
    phase, classes = 6.3 * torch.rand(n, 1, 1), torch.randint(2, (n,))
    waves = torch.sin(torch.arange(8) * 0.8 + phase).expand(n, 8, 8)
    images = torch.where(classes[:, None, None] == 0, waves, waves.mT)
    return 0.3 * (images + 0.1 * torch.randn(n, 8, 8))[:, None], classes


def main(steps: int = 101) -> None:
    torch.manual_seed(0)
    images, classes = data(512)
    jet = Jet((1, 8, 8), patch=2, couplings=9, depth=1, width=16, heads=2, context_channels=2)
    jet.initialize(images, classes)
    optimizer = torch.optim.AdamW(jet.parameters(), lr=5e-3, weight_decay=1e-4)
    for step in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = -jet.log_prob(images[rows], context=classes[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.1f} nats")

    test, labels = data(256)
    with torch.no_grad():
        each = torch.stack([jet.log_prob(test, context=k) for k in range(2)], 1)
        samples = jet.sample(4, context=torch.tensor([0, 0, 1, 1]))
    print(f"classes by Bayes' rule: {(each.argmax(1) == labels).float().mean():.1%} right")
    print(f"samples {tuple(samples.shape)}")


if __name__ == "__main__":
    main()
