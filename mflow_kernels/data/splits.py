"""Open a data set: its images, their names and the training, validation and test parts.

Named data sets (see `named`) are held in memory. Every other data set is read from a prepared file,
which `mflow prepare` or the first use writes. docs/data.md states how images are cropped, resized
and split, so that results can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mflow_kernels.data.cache import open_or_prepare
from mflow_kernels.data.classes import attribute_names, classes_of_attributes, classes_of_folders
from mflow_kernels.data.decoding import crop_and_resize, digest
from mflow_kernels.data.manifest import TEST, TRAIN, VALID, Manifest
from mflow_kernels.data.named import LABELS, NAMED_DATASETS, NamedDataset
from mflow_kernels.data.prepare import SPLIT_SEED, held_out_count
from mflow_kernels.data.prepared import PARTS, Prepared, is_prepared, open_prepared
from mflow_kernels.data.sources import DataError, find_images


class ImageSet:
    """uint8 images of shape (C, H, W), in memory or in a memory-mapped file.

    Args:
        images: uint8 (N, C, H, W), a tensor or an array. Only the indexed rows of a memory-mapped
            array are read.
        rows: rows of `images` that belong to the set, in this order; all by default.
        classes: class of each of the N images, if they have classes.

    Attributes:
        classes: class of each image of the set, int64 (len(set),), or None.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: `images` is not (N, C, H, W), or is empty.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        rows: np.ndarray | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        if images.dtype not in (torch.uint8, np.uint8):
            raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
        if len(images.shape) != 4 or 0 in images.shape:
            raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
        self._images = images.numpy() if isinstance(images, Tensor) else images
        self._rows = np.arange(len(images)) if rows is None else rows
        self._classes = classes
        self.classes = None if classes is None else torch.from_numpy(classes[self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self._images.shape
        return channels, height, width

    def subset(self, rows: np.ndarray) -> "ImageSet":
        """Return the images at these positions of the set, in the order of `rows`."""
        return ImageSet(self._images, self._rows[rows], self._classes)

    def first(self, count: int) -> Tensor:
        """Return the first `count` images as `batch` does, or all if there are fewer."""
        return self.batch(range(min(count, len(self))))

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the images at these positions, uint8 (len(indices), C, H, W).

        The batch lies in page-locked memory if there is a GPU, so that copying it there is fast.
        """
        rows = self._rows[np.asarray(indices, np.int64)]
        pinned = torch.cuda.is_available()
        batch = torch.empty((len(rows), *self.image_shape), dtype=torch.uint8, pin_memory=pinned)
        # With mode="raise" numpy would buffer its output. All rows are valid, so "clip" never acts.
        np.take(self._images, rows, axis=0, out=batch.numpy(), mode="clip")
        return batch


@dataclass(frozen=True)
class Splits:
    """A data set and its parts.

    Args:
        images: all images.
        manifest: the name, part and digest of each image.
        skipped: names of the files that could not be read as images.
        class_names: names of the classes, in the order of their numbers, if the images have any.
        crop: side of the square that was cut out of each image; None for the largest square.
    """

    images: ImageSet
    manifest: Manifest
    skipped: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    crop: int | None = None

    @cached_property
    def train(self) -> ImageSet:
        """The images to train on."""
        return self._part(TRAIN)

    @cached_property
    def valid(self) -> ImageSet:
        """The images for validation during training.

        A random split has no validation part, so these are the images of `test`. Training selects
        nothing by them.
        """
        return self._part(VALID) if VALID in self.manifest.parts else self.test

    @cached_property
    def test(self) -> ImageSet:
        """The images for the final evaluation."""
        return self._part(TEST)

    def held_out_by(self, recorded: Manifest) -> ImageSet:
        """Return the images of this data set that a run held out, found by name.

        Args:
            recorded: the manifest that the run recorded.

        Raises:
            DataError: none of these images is left.
        """
        return self._recorded(self.manifest.held_out_by(recorded), recorded, TEST, "held out")

    def trained_on_by(self, recorded: Manifest) -> ImageSet:
        """Return the images of this data set that a run was trained on, found by name.

        Arguments and errors are those of `held_out_by`.
        """
        rows = self.manifest.training_rows(recorded)
        return self._recorded(rows, recorded, TRAIN, "was trained on")

    def _recorded(self, rows: np.ndarray, recorded: Manifest, part: int, did: str) -> ImageSet:
        if not len(rows):
            count = int((recorded.parts == part).sum())
            raise DataError(f"data: expected the {count} images that the run {did}, found none")
        return self.images.subset(rows)

    def _part(self, part: int) -> ImageSet:
        return self.images.subset(np.flatnonzero(self.manifest.parts == part))


class EvaluationSet(NamedTuple):
    """The images of a data set that a model can be evaluated on."""

    images: ImageSet
    skipped: tuple[str, ...]  # names of the files that could not be read as images
    manifest: Manifest  # lists `images`, in their order


def load_splits(data: str, image_size: int | None = None, classes: str | None = None) -> Splits:
    """Open a data set with its parts.

    Args:
        data: the name of a data set (see `named`), a file of mflow prepare, or a folder or zip of
            images (see `find_images`), which is prepared in a cache first.
        image_size: side of the images in pixels. The default is that of the named data set or
            prepared file, and 64 for a folder or zip.
        classes: "labels" for the labels of a named data set, or for the folders that contain the
            images of any other; or names of CelebA's attributes, separated by commas. By default
            there are no classes.

    Raises:
        ValueError: `data` does not exist, holds no readable image or leaves a part empty, it is a
            prepared file of another size, or it has no such classes.
        OSError: ENOSPC if the cache's disk is full.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if data in NAMED_DATASETS:
        return _load_named(NAMED_DATASETS[data], image_size, classes)
    prepared = open_or_prepare(data, image_size)
    official = prepared.record.partition == "official"
    if not official and len(prepared.images) < 2:
        raise DataError("data: expected at least 2 images, one to hold out, got 1")
    for part in (TRAIN, VALID, TEST) if official else (TRAIN, TEST):
        if not prepared.record.count[part]:
            raise DataError(
                f"data: expected images in every part of {data}, found no {PARTS[part]} images"
            )
    return _prepared_splits(prepared, classes)


def _prepared_splits(prepared: Prepared, classes: str | None) -> Splits:
    """Return the images of a prepared file. It is not checked that every part has images."""
    skipped, crop = tuple(prepared.record.skipped), prepared.record.crop
    if classes is None:
        return Splits(ImageSet(prepared.images), prepared.manifest, skipped, crop=crop)
    if classes == LABELS:
        found = classes_of_folders(prepared.record.names)
    else:
        found = classes_of_attributes(classes, prepared.attributes)
    images = ImageSet(prepared.images, classes=found.numbers)
    return Splits(images, prepared.manifest, skipped, found.names, crop)


def count_training_images(data: str) -> int | None:
    """Return the number of training images; None if `data` does not exist or has none of them.

    No image is read. For a folder or zip, every file that is listed counts as an image.

    Raises:
        DataError: a prepared file is damaged or of another version; see also `find_images`.
    """
    if data in NAMED_DATASETS:
        count = NAMED_DATASETS[data].images
        return count - held_out_count(count)
    path = Path(data)
    if is_prepared(path):
        return open_prepared(path).record.count[TRAIN]
    if not data or not path.exists():
        return None
    source = find_images(path)
    count = len(source.entries)
    trained = count - held_out_count(count) if source.parts is None else source.parts.count(TRAIN)
    return trained or None


def count_classes(data: str, classes: str) -> int:
    """Return the number of classes of a named data set, a prepared file, or attributes of CelebA.

    No image of a prepared file is read.

    Raises:
        DataError: as for `load_splits`, or the classes are the folders of images that are not
            prepared.
    """
    if data in NAMED_DATASETS:
        return len(_load_named(NAMED_DATASETS[data], None, classes).class_names)
    if is_prepared(path := Path(data)):
        return len(_prepared_splits(open_prepared(path), classes).class_names)
    if classes == LABELS:
        raise DataError(
            "classes: expected a named data set or a file of mflow prepare as --data, to count "
            f"its classes, got {data or 'none'}"
        )
    return 2 ** len(attribute_names(classes))


def load_evaluation_set(
    data: str, image_size: int | None = None, classes: str | None = None
) -> EvaluationSet:
    """Open the images of a data set that a model can be evaluated on.

    These are all images of a folder, zip or prepared file, but only the test part of CelebA and of
    a named data set. Arguments and errors are those of `load_splits`.
    """
    if data in NAMED_DATASETS:
        splits = _load_named(NAMED_DATASETS[data], image_size, classes)
    else:
        prepared = open_or_prepare(data, image_size)
        splits = _prepared_splits(prepared, classes)
        if prepared.record.partition == "random":
            return EvaluationSet(splits.images, splits.skipped, splits.manifest)
    rows = np.flatnonzero(splits.manifest.parts == TEST)
    return EvaluationSet(splits.test, splits.skipped, splits.manifest.subset(rows))


def _load_named(
    dataset: NamedDataset, image_size: int | None, classes: str | None = None
) -> Splits:
    if classes not in (None, LABELS):
        raise DataError(f"classes: expected {LABELS!r} for a named data set, got {classes!r}")
    images, labels = dataset.read()
    if image_size not in (None, dataset.size):
        resized = [crop_and_resize(Image.fromarray(image), image_size) for image in images]
        images = np.stack([np.asarray(image) for image in resized])
    # The images may be sorted by class: shuffle them, then hold out the first tenth.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
    shuffled = images[order].reshape(*images.shape[:3], dataset.channels)
    images = np.ascontiguousarray(shuffled.transpose(0, 3, 1, 2))
    parts = np.full(len(order), TRAIN, np.uint8)
    parts[: held_out_count(len(order))] = TEST
    manifest = Manifest([str(row) for row in order], parts, [digest(image) for image in images])
    if classes is None:
        return Splits(ImageSet(images), manifest)
    names, numbers = np.unique(labels[order], return_inverse=True)
    splits = ImageSet(images, classes=numbers.astype(np.int64))
    return Splits(splits, manifest, class_names=tuple(map(str, names)))
