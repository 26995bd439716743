"""Weights of the penalty for the CelebA presets, from the errors of low-pass filters.

    python -m benchmarks.celeba.weights

A weight w fits a mean squared error of 1 / w. The error of a trained flow is unknown before the
training; this command estimates it by that of a simple projection with as many numbers: the lowest
frequencies of the discrete cosine transform. The images are six photographs and the face of the
astronaut, which scikit-image and scikit-learn contain. An image smaller than the preset's is left
at its own size, and keeps the same number of frequencies.
"""

import statistics

import numpy as np
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from benchmarks.harness.output import markdown_table
from benchmarks.photographs import PHOTOGRAPHS
from mflow_kernels.runs.presets import PRESETS, preset_options

FACE = (slice(0, 200), slice(125, 325))  # of the astronaut


def main() -> None:
    pictures = {name: load() for name, load in PHOTOGRAPHS.items()}
    rows = []
    for preset in PRESETS:
        options = preset_options(preset)
        if options["data"] == "digits":
            continue
        size, d = options["image_size"], options["manifold_dim"]
        face = low_pass_error(square(pictures["astronaut"][FACE], size), d)
        errors = [low_pass_error(square(x, size), d) for x in pictures.values()]
        middle = statistics.median(errors)
        spread = f"{middle:.4f} ({min(errors):.4f} to {max(errors):.4f})"
        weights = f"{1 / face:.0f}, {1 / middle:.0f}"
        rows.append([f"`{preset}`", f"{d} of {3 * size**2:,}", f"{face:.4f}", spread, weights])
    head = ("preset", "dimensions", "MSE, a face", "MSE, photographs: median (range)", "1 / MSE")
    print(markdown_table(head, rows))


def square(pixels: np.ndarray, size: int) -> Tensor:
    """Return the middle square of (H, W, 3), (3, S, S) in [0, 1], with S at most `size`."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x = torch.from_numpy(pixels[top : top + side, left : left + side].copy())
    x = x.permute(2, 0, 1).float() / 255
    if side <= size:
        return x
    how = {"size": (size, size), "mode": "bicubic", "antialias": True}
    return torch.nn.functional.interpolate(x[None], **how)[0].clamp(0, 1)


def low_pass_error(x: Tensor, numbers: int) -> float:
    """Return the mean squared error of x (C, S, S) when about `numbers` of its frequencies remain.

    They are the k lowest of each axis, with k = sqrt(numbers / C), rounded.
    """
    kept = round((numbers / len(x)) ** 0.5)
    waves = dctn(x.double().numpy(), axes=(1, 2), norm="ortho")
    waves[:, kept:], waves[:, :, kept:] = 0, 0
    return float(np.square(idctn(waves, axes=(1, 2), norm="ortho") - x.numpy()).mean())


if __name__ == "__main__":
    main()
