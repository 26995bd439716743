"""The journal of a preparation: which images are written, so that the next process continues.

The first line has the identity and the channels of the images. Each file of the source has a line
of fixed length after it, which is empty until its image is written: the digest of the image, and
"+" if it was enlarged. The image has its own place in the file beside the journal, and counts as
written if the pixels there have that digest. Whatever a killed process or a power cut left undone
or damaged is therefore decoded again, in whichever order the disk got it.

The journal is locked, so that a second process waits; the lock ends with its process.
"""

import errno
import fcntl
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mflow_kernels.data.decoding import DIGEST_LENGTH, Format, any_in_colour, digest
from mflow_kernels.data.prepared import HEADER_BYTES
from mflow_kernels.data.printable import printable
from mflow_kernels.data.sources import Source

_LINE = DIGEST_LENGTH + 2  # bytes


@dataclass
class Work:
    """A file of images in the making, and its journal. Threads can add different images at once.

    Attributes:
        written: digest of each written image, and whether it was enlarged, by the number of its
            file in the source.
        skipped: the reason why a file could not be read, by its number.
    """

    lines: BinaryIO
    file: BinaryIO
    form: Format
    first_line: bytes
    written: dict[int, tuple[str, bool]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def image_bytes(self) -> int:
        return math.prod(self.form.shape)

    def place(self, number: int) -> int:
        """Return the offset of an image in the file."""
        return HEADER_BYTES + number * self.image_bytes

    def read(self, number: int) -> bytes:
        return os.pread(self.file.fileno(), self.image_bytes, self.place(number))

    def add(self, number: int, pixels: np.ndarray, enlarged: bool) -> None:
        """Write an image and its line; OSError if the disk is full."""
        found = digest(pixels)
        write_at(self.file, pixels.tobytes(), self.place(number))
        line = f"{found}{'+' if enlarged else '-'}\n".encode()
        write_at(self.lines, line, len(self.first_line) + number * _LINE)
        self.written[number] = found, enlarged


def resume_work(
    lines: BinaryIO, file: BinaryIO, source: Source, image_size: int, identity: str
) -> Work:
    """Find the images that are written; if they are those of other files, remove them."""
    known = os.pread(lines.fileno(), os.fstat(lines.fileno()).st_size, 0)
    firsts = {channels: f"{identity} {channels}\n".encode() for channels in (1, 3)}
    channels = next((c for c, first in firsts.items() if known.startswith(first)), None)
    if channels is None:
        channels, known = (3 if any_in_colour(source.entries) else 1), b""
        for each in (lines, file):
            each.truncate(0)
        write_at(lines, firsts[channels], 0)
    form = Format(image_size, channels, source.crop)
    work = Work(lines, file, form, firsts[channels])
    for number in range(len(source.entries)):
        begin = len(work.first_line) + number * _LINE
        line = known[begin : begin + _LINE]
        if line.strip(b"\0"):
            found = digest(np.frombuffer(work.read(number), np.uint8))
            if line[:DIGEST_LENGTH] == found.encode():
                work.written[number] = found, line[DIGEST_LENGTH:] == b"+\n"
    return work


@contextmanager
def lock_journal(journal: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open and lock the journal. Yield it, and whether this process waited for another one."""
    waited = False
    while True:
        with open_hidden(journal) as lines:
            try:
                fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"waiting for another process, which holds {journal}"
                print(printable(message), file=sys.stderr)
                waited = True
                fcntl.flock(lines, fcntl.LOCK_EX)
            # A process that finishes removes its journal, so the locked file may be a removed one.
            if journal.exists() and journal.stat().st_ino == os.fstat(lines.fileno()).st_ino:
                yield lines, waited
                return


def write_at(file: BinaryIO, data: bytes, place: int) -> None:
    """Write bytes at an offset of an unbuffered file; OSError if the disk is full."""
    if os.pwrite(file.fileno(), data, place) != len(data):  # a full disk writes only a part
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_hidden(path: Path) -> BinaryIO:
    """Open a hidden file beside the result for reading and writing, without a buffer, and create it
    if it is missing.

    A symbolic link is refused: whoever put it there would choose which file is overwritten.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    return open(path, "r+b", 0, opener=opener)
