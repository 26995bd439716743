"""Decode an image file into a square of pixels, as docs/data.md describes."""

import errno
import hashlib
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

# An explicit list: by default Pillow tries every format, and runs Ghostscript on EPS files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_REASON_LENGTH = 100
DIGEST_LENGTH = 16  # hexadecimal digits


class Format(NamedTuple):
    """The format of prepared images: `channels` (1 or 3) of `size` x `size` pixels.

    They are resized from the central `crop` x `crop` pixels; None stands for the largest square.
    """

    size: int
    channels: int
    crop: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.size, self.size


class UnreadableError(Exception):
    """A file cannot be read as an image. The message says why."""


def decode(entry: Entry, form: Format) -> tuple[np.ndarray, bool]:
    """Read, crop and resize an image.

    Returns:
        The pixels, uint8 (C, H, W), and whether the image was smaller than these.

    Raises:
        UnreadableError: the file is no image of a known format, or is damaged.
        DataError: the image is smaller than the crop, or a zip can no longer be opened.
        OSError: ENOMEM if the image does not fit in memory.
    """
    image = _read(entry)
    if form.crop is not None and min(image.size) < form.crop:
        raise DataError(
            f"data: expected images of at least {form.crop}x{form.crop} pixels, got "
            f"{image.width}x{image.height} in {entry.name}"
        )
    mode = "L" if form.channels == 1 else "RGB"
    square = np.asarray(crop_and_resize(image.convert(mode), form.size, form.crop))
    pixels = np.atleast_3d(square).transpose(2, 0, 1)
    return pixels, min(form.crop or form.size, *image.size) < form.size


def digest(pixels: np.ndarray) -> str:
    """Return the first 64 bits of the SHA-256 of an image's bytes, in hexadecimal.

    They suffice to detect damage and to recognize an image among millions.
    """
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()[:DIGEST_LENGTH]


def crop_and_resize(image: Image.Image, size: int, crop: int | None = None) -> Image.Image:
    """Cut out the central square, of side `crop` or the image's shorter side, and resize it."""
    side = crop or min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # resize(box=...) would not do: its filter also reads pixels just outside the box.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def any_in_colour(entries: Sequence[Entry]) -> bool:
    """Whether any image has colours. Reads headers only, and stops at the first such image."""
    for entry in entries:
        try:
            with _opened(entry) as image:
                if not _is_grey(image):
                    return True
        except Exception:  # see `_read`
            continue
    return False


@contextmanager
def _opened(entry: Entry) -> Iterator[Image.Image]:
    """Open an image and read its header."""
    with entry.open() as file, Image.open(file, formats=FORMATS) as image:
        yield image


def _read(entry: Entry) -> Image.Image:
    """Return the decoded image of an entry (see `plain`); errors as for `decode`."""
    try:
        with _opened(entry) as image:
            return plain(image)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UnreadableError(f"not an image in one of the formats {known}") from None
    except MemoryError:
        raise OSError(errno.ENOMEM, f"too little memory to decode {entry.name}") from None
    except DataError:  # the zip itself cannot be opened
        raise
    except Exception as error:  # zipfile, decompressors and Pillow raise any type for bad bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(reason[:_REASON_LENGTH]) from None


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def plain(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits per channel, in mode L if it is grey, else in mode RGB.

    Its EXIF tag is used to turn it upright.

    Raises:
        ValueError: the image has no pixels, or its format does not define which grey value is
            white.
    """
    if 0 in image.size:
        raise ValueError(f"expected pixels, got an image of {image.width}x{image.height}")
    _load(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image)
    return ImageOps.exif_transpose(image).convert("L" if _is_grey(image) else "RGB")


def _load(image: Image.Image) -> None:
    """Decode an image that Pillow has opened.

    For a TIFF opened by its path, hide the path from Pillow: up to version 13 it would map the file
    and mix up the pixels of an image that EXIF turns by 90 degrees.
    """
    if not isinstance(image, TiffImageFile):
        return
    name, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = name


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the upper 8 bits of grey values with more bits, as Pillow converts 16-bit colours.

    For unsigned values of up to 16 bits, white is the largest value in every format. No standard
    defines white for floats, signed integers and 32-bit integers, so they are refused.
    """
    bits, inverted = 16, False  # this holds for PGM too: Pillow scales its values to 16 bits
    if image.format == "TIFF":
        tags = cast(TiffImageFile, image).tag_v2
        bits = tags[BITSPERSAMPLE][0]
        inverted = tags[PHOTOMETRIC_INTERPRETATION] == 0
        if tags.get(SAMPLEFORMAT, (1,))[0] != 1 or bits > 16:
            raise ValueError(
                "no standard defines white for grey values that are signed, 32-bit or floats"
            )
    elif image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("no standard defines white for grey values that are 32-bit or floats")
    values = np.asarray(ImageOps.exif_transpose(image)) >> (bits - 8)
    grey = values.clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey)
