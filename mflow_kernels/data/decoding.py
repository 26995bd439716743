"""One image file to one square of pixels. docs/data.md states this protocol for people.

Imports neither torch nor anything slow: the processes of `prepare` start with this file.
"""

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from mflow_kernels.data.sources import DataError, Entry

# Named, because Pillow would try every format it knows, and runs Ghostscript on EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
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
        DataError: an image that is smaller than the crop, or a zip that cannot be opened any more.
        OSError: ENOMEM where an image does not fit in memory.
    """
    pixels = np.empty((len(entries), *form.shape), np.uint8)
    skipped: dict[int, str] = {}
    enlarged = 0
    for position, entry in enumerate(entries):
        image = _read(entry)
        if isinstance(image, str):
            skipped[position] = image[:_REASON_LENGTH]
            continue
        if form.crop is not None and min(image.size) < form.crop:
            raise DataError(
                f"data: expected images of at least {form.crop}x{form.crop} pixels, got "
                f"{image.width}x{image.height} in {entry.name}"
            )
        enlarged += min(form.crop or form.size, *image.size) < form.size
        mode = "L" if form.channels == 1 else "RGB"
        square = np.asarray(crop_and_resize(image.convert(mode), form.size, form.crop))
        row = pixels[position - len(skipped)]
        row[:] = square if form.channels == 1 else square.transpose(2, 0, 1)
    pixels = pixels[: len(entries) - len(skipped)]
    return Decoded(pixels, [digest(row) for row in pixels], skipped, enlarged)


def digest(pixels: np.ndarray) -> str:
    """The first 64 bits of the SHA-256 of an image's bytes, in hexadecimal: enough to notice damage
    and to recognize an image among millions."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()[:DIGEST_LENGTH]


def crop_and_resize(image: Image.Image, size: int, crop: int | None = None) -> Image.Image:
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
            with _opened(entry) as image:
                if not _is_grey(image):
                    return True
        except Exception:  # see `_read`
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


@contextmanager
def _opened(entry: Entry) -> Iterator[Image.Image]:
    """The image of a file, its header read. Nothing is printed: Pillow warns of what it mends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with entry.open() as file, Image.open(file, formats=FORMATS) as image:
            yield image


def _read(entry: Entry) -> Image.Image | str:
    """The decoded image of a file as `_plain` makes it, or why it could not be read."""
    try:
        with _opened(entry) as image:
            return _plain(image)
    except UnidentifiedImageError:
        return f"not an image in one of the formats {', '.join(FORMATS)}"
    except MemoryError:
        raise OSError(errno.ENOMEM, f"too little memory to decode {entry.name}") from None
    except DataError:  # the whole zip is gone, not one image
        raise
    except Exception as error:  # zipfile, its decompressors and Pillow raise any kind for bad bytes
        return " ".join(str(error).split()) or type(error).__name__


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _plain(image: Image.Image) -> Image.Image:
    """Upright by its EXIF tag, decoded, 8 bits a colour: mode L if it is grey, else RGB.

    Raises:
        ValueError: grey values whose black and white are unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image)
    return ImageOps.exif_transpose(image).convert("L" if _is_grey(image) else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits of grey values that have more, as Pillow takes them of 16-bit colours, and
    as `dequantize` takes fewer: each 8-bit level stands for equally many values.

    Values of up to 16 bits without sign fill their range in every format. Floats, and integers of
    32 bits or with a sign, have no agreed white.
    """
    bits, inverted = 16, False  # PNG, and PGM, whose values Pillow scales to 16 bits
    if image.format == "TIFF":
        tags = cast(TiffImageFile, image).tag_v2
        bits = tags[BITSPERSAMPLE][0]
        inverted = tags[PHOTOMETRIC_INTERPRETATION] == 0
        if tags.get(SAMPLEFORMAT, (1,))[0] != 1 or bits > 16:
            raise ValueError("grey values with a sign, of 32 bits or of floats: no agreed white")
    elif image.mode == "F":
        raise ValueError("grey values of floats: no agreed white")
    values = np.asarray(ImageOps.exif_transpose(image)) >> (bits - 8)
    grey = values.clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey)
