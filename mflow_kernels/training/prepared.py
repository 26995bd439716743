"""Prepared files: images decoded once, read by memory map at the speed of memory.

A prepared file is a safetensors file (https://github.com/huggingface/safetensors), so that other
programs can read it, of three tensors, all uint8:

    images  (N, C, H, W)  in the order of their names
    part    (N,)          0 train, 1 valid, 2 test
    record  (bytes,)      JSON: where the images came from and what was done to them (see Record)

The images start at byte 4096, a page's boundary. A file either is whole or has another name.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from mflow_kernels.training.decoding import Format, digest
from mflow_kernels.training.manifest import Manifest
from mflow_kernels.training.sources import DataError

HEADER_BYTES = 4096
PARTS = ("train", "valid", "test")
_KIND = "mflow images 2"
_TOLD = 20  # skipped files that are named to a person
_VERIFIED_AT_A_TIME = 256  # images between two reports of progress


@dataclass(frozen=True)
class Record:
    """What a prepared file says of itself.

    Args:
        source: the folder or zip, absolute.
        listing: checksum of its names, sizes and times, and of the format asked for.
        size, channels, crop: see decoding.Format.
        partition: "official" or "random".
        count: images of train, valid and test.
        names: of each image its file, below the source.
        skipped: files that could not be read, and why.
        enlarged: how many images were smaller than the result.
        digests: of each image the digest of its bytes, see decoding.digest.
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

    @property
    def format(self) -> Format:
        return Format(self.size, self.channels, self.crop)

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=True).encode()

    @classmethod
    def decode(cls, text: bytes) -> "Record":
        """What `encode` wrote; ValueError or TypeError for anything else."""
        values = json.loads(text)
        if set(values) != {field.name for field in fields(cls)}:
            raise ValueError("another version's record")
        return cls(**values)


@dataclass(frozen=True)
class Prepared:
    """An open prepared file: `images` (N, C, H, W) and `part` (N,), uint8, read when touched."""

    path: Path
    images: np.ndarray
    part: np.ndarray
    record: Record

    @property
    def manifest(self) -> Manifest:
        """The name, part and digest of each image."""
        return Manifest(self.record.names, np.asarray(self.part), self.record.digests)

    def summary(self) -> str:
        """What is in it, in a few lines for a person."""
        record, (count, *shape) = self.record, self.images.shape
        parts = ", ".join(
            f"{number:,} {name}" for name, number in zip(PARTS, record.count, strict=True) if number
        )
        lines = [
            f"{self.path}: {count:,} images of {'x'.join(map(str, shape))} "
            f"({self.path.stat().st_size / 1e6:,.1f} MB): {parts} ({record.partition} partition)"
        ]
        if record.enlarged:
            lines.append(f"{record.enlarged:,} of them were smaller and have been enlarged")
        if record.skipped:
            lines.append(f"skipped {len(record.skipped):,} files, as the file's record tells too:")
            lines += [f"  {name}: {why}" for name, why in list(record.skipped.items())[:_TOLD]]
            if len(record.skipped) > _TOLD:
                lines.append("  ...")
        return "\n".join(lines)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every image and compare digests; `progress` gets the number of images done so far.

        Raises:
            DataError: an image that is not as it was written.
        """
        for row, (image, expected) in enumerate(zip(self.images, self.record.digests, strict=True)):
            if digest(image) != expected:
                raise DataError(
                    f"data: {self.path} is damaged: image {row} ({self.record.names[row]}) is not "
                    "as it was written; prepare it again with --overwrite"
                )
            if progress is not None and (row + 1) % _VERIFIED_AT_A_TIME == 0:
                progress(row + 1)


def header(form: Format, count: int, record_bytes: int) -> bytes:
    """The first HEADER_BYTES of a file with so many images."""
    shapes = {"images": (count, *form.shape), "part": (count,), "record": (record_bytes,)}
    entries: dict[str, object] = {"__metadata__": {"kind": _KIND}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape))
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode().ljust(HEADER_BYTES - 8)
    return struct.pack("<Q", len(text)) + text


def is_prepared(path: Path) -> bool:
    """Whether a file begins as a prepared one does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _KIND.encode() in file.read(HEADER_BYTES)


def open_prepared(path: Path) -> Prepared:
    """Map a prepared file; nothing but its header and record are read.

    Raises:
        DataError: another kind of file, a damaged header, or fewer or more bytes than it says.
    """
    if not is_prepared(path):
        came = "another kind" if path.exists() else "none"
        raise DataError(f"data: expected a file of mflow prepare, got {came}: {path}")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(min(length, HEADER_BYTES)))
        if 8 + length + entries["record"]["data_offsets"][1] != path.stat().st_size:
            raise ValueError("its length is not what its header says")
        arrays = {name: _map(path, 8 + length, entries[name]) for name in entries if name[0] != "_"}
        record = Record.decode(arrays["record"].tobytes())
        if arrays["images"].shape[1:] != record.format.shape or sum(record.count) != len(
            arrays["images"]
        ):
            raise ValueError("its record is another file's")
        return Prepared(path, arrays["images"], arrays["part"], record)
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise DataError(f"data: {path} is damaged or cut short: {error}") from None


def _map(path: Path, begin: int, entry: dict) -> np.ndarray:
    # Not safetensors' own reader: it maps privately and writable, and the kernel refuses to map so
    # what is larger than the machine's memory.
    offset = begin + entry["data_offsets"][0]
    return np.memmap(path, np.uint8, "r", offset=offset, shape=tuple(entry["shape"]))
