"""Images that are not handwritten digits, for out-of-distribution scores. Nothing is downloaded.

Each set has grey images of one size, uint8 (N, 1, size, size). Letters are white on black, as
digits are.
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


def other_images(held_out: Tensor, count: int) -> dict[str, Tensor]:
    """Return sets of `count` images by name (100 for faces), of the size of the digits."""
    size = held_out.shape[-1]
    draw = np.random.default_rng(0)
    digits = held_out[:count]
    shuffled = torch.from_numpy(draw.permutation(size * size))
    return {
        "digits of another data set": _resized(load_digits().images[:count] * (255 / 16), size),
        "letters": _letters(count, size, draw),
        "faces": _resized(data.lfw_subset()[:100] * 255.0, size),
        "photographs": _patches(count, size, draw),
        "digits upside down": digits.flip(2),
        "digits with shuffled pixels": digits.flatten(1)[:, shuffled].view_as(digits),
        "blank": torch.zeros_like(digits),
        **made_up_sets(digits),
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
