"""Images unlike those that a model was trained on, for out-of-distribution scores.

Nothing is downloaded. Each set has grey images of one size, uint8 (N, 1, size, size). Letters are
white on black, as digits are.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from mflow_kernels.evaluation.ood import made_up_sets

_FONTS = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")
# Without letters that look like digits (O, I, l, Z, S), and without small letters that look like
# their capitals.
_LETTERS = "ABCDEFGHJKLMNPQRTUVWXY" + "abdefghjkmnpqrtwy"
_PHOTOGRAPHS = ("camera", "coins", "moon", "brick", "grass", "gravel")


def beside_digits(held_out: Tensor, count: int) -> dict[str, Tensor]:
    """Return sets of `count` images (100 faces) by name, as large as the digits."""
    size = held_out.shape[-1]
    return {
        "digits of another data set": _resized(load_digits().images[:count] * (255 / 16), size),
        "faces": faces(size),
        **_beside(held_out[:count], count),
    }


def beside_faces(held_out: Tensor) -> dict[str, Tensor]:
    """Return sets by name: 100 images, or as many as `held_out` if they are made from these."""
    size = held_out.shape[-1]
    return {
        "patches without a face": _resized(data.lfw_subset()[100:] * 255.0, size),
        "digits": _resized(load_digits().images[:100] * (255 / 16), size),
        **_beside(held_out, 100),
    }


def faces(size: int = 24) -> Tensor:
    """Return the 100 faces of scikit-image, uint8 (100, 1, size, size), reduced from 25x25."""
    return _resized(data.lfw_subset()[:100] * 255.0, size)


def _beside(held_out: Tensor, count: int) -> dict[str, Tensor]:
    draw = np.random.default_rng(0)
    size = held_out.shape[-1]
    shuffled = torch.from_numpy(draw.permutation(size * size))
    return {
        "letters": _letters(count, size, draw),
        "photographs": _patches(count, size, draw),
        "upside down": held_out.flip(2),
        "shuffled pixels": held_out.flatten(1)[:, shuffled].view_as(held_out),
        "blank": torch.zeros_like(held_out),
        **made_up_sets(held_out),
    }


def _resized(images: np.ndarray, size: int) -> Tensor:
    """Resize (N, H, W) with values from 0 to 255 to uint8 (N, 1, size, size)."""
    x = torch.from_numpy(images).float()[:, None]
    x = interpolate(x, (size, size), mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def _letters(count: int, size: int, draw: np.random.Generator) -> Tensor:
    """Draw letters in three fonts and two weights, turned, scaled and moved a little."""
    files = [
        font_manager.findfont(font_manager.FontProperties(family=family, weight=weight))
        for family, weight in itertools.product(_FONTS, ("normal", "bold"))
    ]
    scale = 4  # larger, then reduced, so that edges are smooth as in MNIST
    images = []
    for _ in range(count):
        points = int(draw.uniform(0.6, 0.75) * size * scale)
        font = ImageFont.truetype(files[draw.integers(len(files))], points)
        canvas = Image.new("L", (size * scale, size * scale))
        centre = draw.uniform(0.46, 0.54, 2) * size * scale
        letter = _LETTERS[draw.integers(len(_LETTERS))]
        ImageDraw.Draw(canvas).text(tuple(centre), letter, fill=255, font=font, anchor="mm")
        turned = canvas.rotate(draw.uniform(-15, 15), Image.Resampling.BICUBIC)
        images.append(np.asarray(turned.resize((size, size), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(images))[:, None]


def _patches(count: int, size: int, draw: np.random.Generator) -> Tensor:
    """Cut squares out of photographs at twice the size, and halve them."""

    def cut() -> Iterator[np.ndarray]:
        photographs = [getattr(data, name)() for name in _PHOTOGRAPHS]
        for photograph in itertools.islice(itertools.cycle(photographs), count):
            top, left = (draw.integers(side - 2 * size) for side in photograph.shape)
            yield photograph[top : top + 2 * size, left : left + 2 * size].astype(float)

    return _resized(np.stack(list(cut())), size)
