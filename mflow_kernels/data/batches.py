"""Batches of a set of images, and their augmentation."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.splits import ImageSet


class LabelledImages(NamedTuple):
    """A batch of a set that has classes: uint8 (N, C, H, W), and int64 (N,)."""

    images: Tensor
    classes: Tensor


# Batches of a set without classes are the images alone.
Batch = Tensor | LabelledImages


def images_and_classes(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the two parts of a batch; the second is None if the set has no classes."""
    return (batch, None) if isinstance(batch, Tensor) else (batch.images, batch.classes)


_READERS = 4  # threads, so that a disk gets more than one request at a time


class Position(NamedTuple):
    """A place in a stream of batches: `used` images of pass `number` precede it."""

    number: int = 0
    used: int = 0

    def after(self, batches: int, batch_size: int, images: int) -> "Position":
        """Return the position after `batches` more batches, if a pass has `images` images."""
        left = (images - self.used) // batch_size
        if batches < left:
            return Position(self.number, self.used + batches * batch_size)
        passes, batches = divmod(batches - left, images // batch_size)
        return Position(self.number + 1 + passes, batches * batch_size)


class BatchStream:
    """Endless shuffled batches, uint8 (batch_size, C, H, W), from the position `first` on.

    A batch depends on the seed, its position and its size alone. Each pass has its own order of the
    whole set; the images that do not fill a last batch are left out of that pass. A batch never
    holds more than the set. The next batches are read while one is used.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, seed: int, first: Position | None = None
    ) -> None:
        self._images = images
        self._batch_size = min(batch_size, len(images))
        self._seed = seed
        self._first = first or Position()

    @property
    def batches_per_pass(self) -> int:
        return len(self._images) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        return _read_ahead(self._images, self._orders())

    def _orders(self) -> Iterator[Tensor]:
        number, used = self._first
        while True:
            order = torch.randperm(
                len(self._images), generator=stream_generator(self._seed, Stream.DATA_ORDER, number)
            )
            for begin in range(used, len(order) - self._batch_size + 1, self._batch_size):
                yield order[begin : begin + self._batch_size]
            number, used = number + 1, 0


class OrderedBatches:
    """All images once, in order, as uint8 batches; the last may be smaller. The next ones are read
    while one is used."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        self._images = images
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return _read_ahead(self._images, torch.arange(len(self._images)).split(self._batch_size))


def flip_at_random(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image (N, C, H, W), of any dtype, left to right with probability 1/2."""
    flips = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flips, images.flip(-1), images)


def _read_ahead(images: ImageSet, orders: Iterable[Tensor]) -> Iterator[Batch]:
    """Yield the batch of each order, while threads read the next ones.

    A DataLoader's processes would send batches through pipes; a thread finds the images in the page
    cache.
    """
    pool = ThreadPoolExecutor(_READERS)
    ahead: deque[Future[Batch]] = deque()

    def read(order: Tensor) -> Batch:
        batch = images.batch(order)
        return batch if images.classes is None else LabelledImages(batch, images.classes[order])

    try:
        for order in orders:
            ahead.append(pool.submit(read, order))
            if len(ahead) > _READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
