"""The Frechet distance, by the features of a small classifier of a set's images."""

from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.manifold.sets import SETS, Images, Part

FEATURES, CLASSIFIER_PASSES = 32, 8


class Judge:
    """A small classifier whose features give Frechet distances."""

    def __init__(self, images: Images) -> None:
        train = images.train
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, FEATURES),
        )  # fmt: skip
        classes = nn.Linear(FEATURES, int(train.labels.max()) + 1)
        self.classify = net = nn.Sequential(self.features, nn.ReLU(), classes)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(CLASSIFIER_PASSES):
            for index in torch.randperm(len(train.images)).split(64):
                optimizer.zero_grad()
                out = net(_scaled(train.images[index]))
                nn.functional.cross_entropy(out, train.labels[index]).backward()
                optimizer.step()
        self.accuracy = self.right(images.test.images, images.test.labels)

    @torch.no_grad()
    def right(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images that the classifier assigns to their label."""
        found = self.classify(_scaled(images)).argmax(1)
        return (found == labels).float().mean().item()

    @torch.no_grad()
    def frechet(self, images: Tensor, reference: Part) -> float:
        """Return the Frechet distance between two sets of images (Heusel et al., arXiv 1706.08500).

        It fits Gaussians to the classifier's features of both sets:
        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
        """
        means, covariances = [], []
        for part in (images, reference.images):
            features = self.features(_scaled(part)).double()
            means.append(features.mean(0))
            covariances.append(features.T.cov())
        root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt().sum()
        trace = covariances[0].trace() + covariances[1].trace() - 2 * root
        return ((means[0] - means[1]).square().sum() + trace).item()


@cache
def judge(name: str) -> Judge:
    """Train the classifier of a set from a fixed seed."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        return Judge(SETS[name]())


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 128 - 1
