"""A model and images so small that a test may train on them."""

import zipfile

import numpy as np
from PIL import Image

# A model that trains in a moment: two stages of three steps on ten images of 8x8.
TINY = [
    *("--image-size", "8", "--levels", "1", "--steps", "1", "--width", "8"),
    *("--manifold-dim", "6", "--stage-dims", "4", "--stage-steps", "1", "--stage-width", "8"),
    *("--batch-size", "4", "--max-steps", "3", "--device", "cpu"),
]


def write_images(folder, count=12, size=(8, 8), channels=1, seed=0):
    """Smooth random images, PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        coarse = random.integers(0, 256, (3, 3, channels), dtype=np.uint8)
        image = Image.fromarray(coarse if channels == 3 else coarse[..., 0])
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    return folder


def zip_up(folder, path):
    """Every file below a folder in a zip, stored as it is; returns its path."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def listing(folder):
    """Everything below a folder, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
