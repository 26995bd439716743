"""One image file to one square of pixels. docs/data.md states this protocol for people.

Imports neither torch nor anything slow: the processes of `prepare` start with this file.
"""

import hashlib
import multiprocessing
import os
import signal
import struct
import threading
import zipfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mflow_kernels.training.sources import DataError, Entry

# What Pillow and zipfile raise for files that are no images, torn, malformed or absurdly large.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
_REASON_LENGTH = 100
DIGEST_LENGTH = 16  # hexadecimal digits


class Format(NamedTuple):
    """What every image is brought to: `channels` (1 or 3) of `size` x `size` pixels, from the
    `crop` x `crop` pixels at its centre (None: from the largest square)."""

    size: int
    channels: int
    crop: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.size, self.size


class Decoded(NamedTuple):
    """Some images: uint8 pixels (N, C, H, W), the digest of each, why the others could not be read
    (by position among the entries), and how many were smaller than the result."""

    pixels: np.ndarray
    digests: list[str]
    skipped: dict[int, str]
    enlarged: int


def decode(entries: Sequence[Entry], form: Format) -> Decoded:
    """Read, crop and resize images.

    Raises:
        DataError: an image that is smaller than the crop.
    """
    pixels = np.empty((len(entries), *form.shape), np.uint8)
    skipped: dict[int, str] = {}
    enlarged = 0
    for position, entry in enumerate(entries):
        try:
            with entry.open() as file, Image.open(file) as opened:
                image = _plain(opened)
        except UnidentifiedImageError:
            skipped[position] = "no image"
            continue
        except _UNREADABLE as error:
            skipped[position] = " ".join(str(error).split())[:_REASON_LENGTH]
            continue
        if form.crop is not None and min(image.size) < form.crop:
            raise DataError(
                f"data: expected images of at least {form.crop}x{form.crop} pixels, got "
                f"{image.width}x{image.height} in {entry.name}"
            )
        enlarged += min(form.crop or form.size, *image.size) < form.size
        mode = "L" if form.channels == 1 else "RGB"
        square = np.asarray(square_of(image.convert(mode), form.size, form.crop))
        row = pixels[position - len(skipped)]
        row[:] = square if form.channels == 1 else square.transpose(2, 0, 1)
    pixels = pixels[: len(entries) - len(skipped)]
    return Decoded(pixels, [digest(row) for row in pixels], skipped, enlarged)


def digest(pixels: np.ndarray) -> str:
    """The first 64 bits of the SHA-256 of an image's bytes, in hexadecimal: enough to notice damage
    and to recognize an image among millions."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()[:DIGEST_LENGTH]


def square_of(image: Image.Image, size: int, crop: int | None = None) -> Image.Image:
    """The central square of an image, its side `crop` or the image's shorter one, resized."""
    side = crop or min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Not resize(box=...): its filter also reads the pixels just outside of the box.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def any_in_colour(entries: Sequence[Entry]) -> bool:
    """Whether one of the images has colours; reads their headers, up to the first that has."""
    for entry in entries:
        try:
            with entry.open() as file, Image.open(file) as opened:
                if not _is_grey(opened):
                    return True
        except _UNREADABLE:
            continue
    return False


def start_worker() -> None:
    """Make this process one that ends with its parent, however that ends, and not at Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def _plain(opened: Image.Image) -> Image.Image:
    """Upright by its EXIF tag, decoded, 8 bits a colour: mode L if it is grey, else RGB."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("L") would clip
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("L" if _is_grey(image) else "RGB")
