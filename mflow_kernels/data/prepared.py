"""Prepared files: images that are decoded once and then read through a memory map.

A prepared file is a safetensors file (https://github.com/huggingface/safetensors), so that other
programs can read it. It holds three uint8 tensors:

    images  (N, C, H, W)  in the order of their names
    part    (N,)          0 train, 1 valid, 2 test
    record  (bytes,)      JSON: the origin of the images and their processing (see Record)

The images start at byte 4096, the size of a page. The header has a checksum of part and record; the
record has the digests of the images. A file that is still being written has another
name.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mflow_kernels.data.decoding import Format, digest
from mflow_kernels.data.manifest import Manifest
from mflow_kernels.data.printable import printable
from mflow_kernels.data.sources import DataError

HEADER_BYTES = 4096
PARTS = ("train", "valid", "test")
_ANY_KIND = "mflow images "
_KIND = f"{_ANY_KIND}3"
_LISTED = 20  # number of skipped files that a summary lists
_VERIFIED_AT_A_TIME = 256  # number of images between two reports of progress


@dataclass(frozen=True)
class Record:
    """The description of a prepared file that the file itself holds.

    Args:
        source: absolute path of the folder or zip.
        listing: checksum of the source's names, sizes and times, and of the requested size.
        size, channels, crop: see `decoding.Format`.
        partition: "official" or "random".
        count: number of images in train, valid and test.
        names: file name of each image, relative to the source.
        skipped: files that could not be read, and the reasons.
        enlarged: number of images that were smaller than the result.
        digests: digest of each image, see `decoding.digest`.
        attributes: for each attribute of CelebA, one bit per image, packed as `numpy.packbits` does
            and written in hexadecimal; empty for other images.
    """

    source: str
    listing: str
    size: int
    channels: int
    crop: int | None
    partition: str
    count: list[int]
    names: list[str]
    skipped: dict[str, str]
    enlarged: int
    digests: list[str]
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        return Format(self.size, self.channels, self.crop)

    def encode(self) -> bytes:
        """Return the record as JSON."""
        return json.dumps(asdict(self), ensure_ascii=True).encode()


@dataclass(frozen=True)
class Prepared:
    """An open prepared file. `images` (N, C, H, W) and `part` (N,) are memory-mapped uint8."""

    path: Path
    images: np.ndarray
    part: np.ndarray
    record: Record

    @property
    def manifest(self) -> Manifest:
        """The name, part and digest of each image."""
        return Manifest(self.record.names, np.asarray(self.part), self.record.digests)

    @property
    def attributes(self) -> dict[str, np.ndarray]:
        """For each attribute of CelebA, bool (N,): the images that have it."""
        packed = {
            name: np.frombuffer(bytes.fromhex(bits), np.uint8)
            for name, bits in self.record.attributes.items()
        }
        count = len(self.images)
        return {name: np.unpackbits(bits)[:count] > 0 for name, bits in packed.items()}

    def summary(self) -> str:
        """Return a description of the file in a few lines."""
        record, (count, *shape) = self.record, self.images.shape
        parts = ", ".join(
            f"{number:,} {name}" for name, number in zip(PARTS, record.count, strict=True) if number
        )
        lines = [
            f"{printable(str(self.path))}: {count:,} images of {'x'.join(map(str, shape))} "
            f"({self.path.stat().st_size / 1e6:,.1f} MB): {parts} ({record.partition} partition)"
        ]
        if record.enlarged:
            lines.append(f"{record.enlarged:,} of them were smaller than this and were enlarged")
        if record.skipped:
            lines.append(f"skipped {len(record.skipped):,} files (the record lists all of them):")
            first = list(record.skipped.items())[:_LISTED]
            lines += [f"  {printable(name)}: {printable(why)}" for name, why in first]
            if len(record.skipped) > _LISTED:
                lines.append("  ...")
        return "\n".join(lines)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every image and compare its digest.

        Args:
            progress: is called with the number of images read so far.

        Raises:
            DataError: an image is damaged.
        """
        for row, (image, expected) in enumerate(zip(self.images, self.record.digests, strict=True)):
            if digest(image) != expected:
                raise DataError(
                    f"data: {self.path} is damaged: image {row} ({self.record.names[row]}) does "
                    "not match its digest; prepare it again with --overwrite"
                )
            if progress is not None and (row + 1) % _VERIFIED_AT_A_TIME == 0:
                progress(row + 1)


def checksum(part: np.ndarray, record: bytes) -> str:
    """Return the SHA-256 of all that follows the images, in hexadecimal."""
    return hashlib.sha256(part.tobytes() + record).hexdigest()


def header(form: Format, count: int, record_bytes: int, checksum: str) -> bytes:
    """Return the first HEADER_BYTES bytes of a prepared file of `count` images."""
    shapes = {"images": (count, *form.shape), "part": (count,), "record": (record_bytes,)}
    entries: dict[str, object] = {"__metadata__": {"kind": _KIND, "sha256": checksum}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape)
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode().ljust(HEADER_BYTES - 8)
    return struct.pack("<Q", len(text)) + text


def is_prepared(path: Path) -> bool:
    """Whether a file begins like a prepared file of this or an earlier version."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _ANY_KIND.encode() in file.read(HEADER_BYTES)


def open_prepared(path: Path) -> Prepared:
    """Map a prepared file into memory.

    Header, record and parts are read and checked by the checksum and the file's length. The images
    are not read.

    Raises:
        DataError: the file is of another kind or version, or is damaged.
        OSError: the file cannot be read.
    """
    if not is_prepared(path):
        came = "a file of another kind" if path.exists() else "nothing"
        raise DataError(f"data: expected a file of mflow prepare, got {came} at {path}")
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if _KIND.encode() not in head:
        raise DataError(
            f"data: {path} was made by another version of mflow prepare; prepare it again with "
            "--overwrite"
        )
    try:
        count, form, record_bytes, expected = _read_header(head, path.stat().st_size)
        images = _map(path, HEADER_BYTES, (count, *form.shape))
        part = _map(path, HEADER_BYTES + images.size, (count,))
        text = _map(path, HEADER_BYTES + images.size + count, (record_bytes,)).tobytes()
        if checksum(part, text) != expected:
            raise ValueError("its record does not match its checksum")
        record = Record(**json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"data: {path} is damaged or cut short: {error}") from None
    return Prepared(path, images, part, record)


def _read_header(head: bytes, file_bytes: int) -> tuple[int, Format, int, str]:
    """Read the number of images, their format (without the crop), the record's length in bytes and
    the checksum.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: `header` did not make this header, or the
            file has another length.
    """
    entries = json.loads(head[8:])
    count, channels, height, width = entries["images"]["shape"]
    (record_bytes,) = entries["record"]["shape"]
    numbers = (count, channels, height, width, record_bytes)
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"its header lists the shapes {numbers}")
    form, expected = Format(height, channels), entries["__metadata__"]["sha256"]
    # These values determine the header, so making it again checks every dtype and offset.
    if channels not in (1, 3) or head != header(form, count, record_bytes, expected):
        raise ValueError("its header is not one that mflow prepare writes")
    if file_bytes != HEADER_BYTES + count * (math.prod(form.shape) + 1) + record_bytes:
        raise ValueError("its length does not agree with its header")
    return count, form, record_bytes, expected


def _map(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    # The safetensors library maps files privately and writable, which Linux refuses if the file is
    # larger than the machine's memory.
    return np.memmap(path, np.uint8, "r", offset=offset, shape=shape)
