"""The journal of a preparation: which images are written, so that the next process continues.

Each line of the journal is JSON. The first has the identity of the images; each further line
describes a block of images in the file beside it. The journal is locked, so that a second process
waits; the lock ends with its process.
"""

import errno
import fcntl
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from mflow_kernels.data.decoding import Format, any_in_colour, digest
from mflow_kernels.data.manifest import is_digest
from mflow_kernels.data.prepared import HEADER_BYTES
from mflow_kernels.data.printable import printable
from mflow_kernels.data.sources import Source

_T = TypeVar("_T")


@dataclass
class Work:
    """The work that is finished: all entries before `end`."""

    identity: str
    form: Format
    end: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    enlarged: int = 0
    digests: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.digests)

    @property
    def image_bytes(self) -> int:
        return math.prod(self.form.shape)

    def check(self, line: dict, file: BinaryIO, total: int) -> None:
        """Check that the file holds the next block as the journal lists it.

        Args:
            line: the block's line in the journal.
            file: positioned at the start of the block; it is read to the end of the block.
            total: number of entries of the source.

        Raises:
            ValueError, TypeError, KeyError: the line does not continue this work, or the file holds
                other images.
        """
        end, enlarged, digests = line["end"], line["enlarged"], line["digests"]
        skipped = {int(position): why for position, why in line["skipped"].items()}
        if not (
            type(end) is type(enlarged) is int
            and self.end < end <= total
            and len(digests) + len(skipped) == end - self.end
            and 0 <= enlarged <= len(digests)
            and all(self.end <= position < end for position in skipped)
            and all(isinstance(why, str) for why in skipped.values())
            and all(map(is_digest, digests))
        ):
            raise ValueError("the line does not continue the journal")
        for expected in digests:
            if digest(np.frombuffer(file.read(self.image_bytes), np.uint8)) != expected:
                raise ValueError("the images are not those that the journal lists")

    def add(self, line: dict) -> None:
        """Count the block of a line as finished."""
        self.skipped |= {int(position): why for position, why in line["skipped"].items()}
        self.enlarged += line["enlarged"]
        self.digests += line["digests"]
        self.end = line["end"]

    def of_images(self, values: Iterable[_T]) -> list[_T]:
        """Leave out the values, one for each entry, of entries that could not be read."""
        return [value for i, value in enumerate(values) if i not in self.skipped]


def resume_work(
    lines: BinaryIO, file: BinaryIO, source: Source, image_size: int, identity: str
) -> Work:
    """Find the finished blocks, and cut journal and file back to them.

    They end before the first line that is torn or wrong, or whose images are damaged.
    """
    total = len(source.entries)
    work, end = None, 0
    lines.seek(0)
    file.seek(HEADER_BYTES)
    for line in lines.read().splitlines(keepends=True):
        try:
            values = json.loads(line)
            if not line.endswith(b"\n"):
                break
            if work is not None:
                work.check(values, file, total)
                work.add(values)
            elif values["identity"] == identity and values["channels"] in (1, 3):
                work = Work(identity, Format(image_size, int(values["channels"]), source.crop))
            else:
                break
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            break
        end += len(line)
    if work is None:
        colour = any_in_colour(source.entries)
        work, end = Work(identity, Format(image_size, 3 if colour else 1, source.crop)), 0
    lines.truncate(end)
    lines.seek(end)
    if not end:
        append_line(lines, {"identity": identity, "channels": work.form.channels})
    file.truncate(HEADER_BYTES + work.rows * work.image_bytes)
    file.seek(0, os.SEEK_END)
    return work


@contextmanager
def lock_journal(journal: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open and lock the journal. Yield it, and whether this process waited for another one."""
    waited = False
    while True:
        with open_hidden(journal, buffering=0) as lines:
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


def append_line(lines: BinaryIO, values: dict) -> None:
    """Write a line of JSON; OSError if the disk is full."""
    line = json.dumps(values).encode() + b"\n"
    if lines.write(line) != len(line):  # an unbuffered write may be short if the disk is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_hidden(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a hidden file beside the result for reading and writing, and create it if it is missing.

    A symbolic link is refused: whoever put it there would choose which file is overwritten.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    return open(path, "r+b", buffering, opener=opener)
