"""Write a folder in CelebA's format, for tests and rehearsals on machines without CelebA.

The images come from photographs and faces that scikit-image and scikit-learn ship.
"""

import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageOps

from benchmarks.photographs import PHOTOGRAPHS

SIZE = (178, 218)  # width and height of CelebA's aligned and cropped images


def make_celeba(folder: Path, count: int, *, zipped: bool = False, seed: int = 0) -> Path:
    """Write `count` images of 178x218 and their partition file.

    Every second image is one of 100 faces from Labeled Faces in the Wild, enlarged from 25x25; the
    others are crops of six photographs. Each image is shifted, mirrored and brightened at random.
    8 of 10 images are for training, one for validation and one for test; each part has both kinds.

    Args:
        folder: the folder to create; it receives img_align_celeba/ and list_eval_partition.txt.
        count: number of images.
        zipped: whether to write img_align_celeba.zip in place of the image folder.
        seed: seed of all random draws.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "img_align_celeba"
    images.mkdir()
    lines = []
    for number in range(1, count + 1):
        image = _face(random) if number % 2 else _crop(random)
        name = f"{number:06}.jpg"
        image.save(images / name, quality=90)
        lines.append(f"{name} {(0, 0, 0, 0, 0, 0, 0, 0, 1, 2)[number // 2 % 10]}\n")
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    if zipped:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for path in sorted(images.iterdir()):
                archive.write(path, f"img_align_celeba/{path.name}")
                path.unlink()
        images.rmdir()
    return folder


def _face(random: np.random.Generator) -> Image.Image:
    face = Image.fromarray(_faces()[random.integers(100)]).convert("RGB")
    return _varied(face.resize((200, 240), Image.Resampling.BICUBIC), random)


def _crop(random: np.random.Generator) -> Image.Image:
    photograph = _photographs()[random.integers(len(PHOTOGRAPHS))]
    scale = random.uniform(0.5, 1.0)
    width, height = (round(side / scale) for side in SIZE)
    width, height = min(width, photograph.width), min(height, photograph.height)
    left = random.integers(photograph.width - width + 1)
    top = random.integers(photograph.height - height + 1)
    return _varied(photograph.crop((left, top, left + width, top + height)), random)


def _varied(image: Image.Image, random: np.random.Generator) -> Image.Image:
    image = ImageOps.fit(image, (SIZE[0] + 10, SIZE[1] + 10), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    left, top = random.integers(11, size=2)
    image = image.crop((left, top, left + SIZE[0], top + SIZE[1]))
    brightness = random.uniform(0.7, 1.3)
    return image.point(lambda value: min(255, value * brightness))


@lru_cache(maxsize=1)
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(load()) for load in PHOTOGRAPHS.values()]


@lru_cache(maxsize=1)
def _faces() -> np.ndarray:
    faces = skimage.data.lfw_subset()[:100]  # 100 other images follow
    return (255 * (faces - faces.min()) / (faces.max() - faces.min())).astype(np.uint8)
