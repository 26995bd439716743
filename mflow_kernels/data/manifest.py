"""The list of a data set's images: name, part and digest of each.

A run folder keeps the list of its data set, so that later commands know which images the run held
out. Splitting the data set again could give other parts: the split depends on the number of images,
so it changes when one is added.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mflow_kernels.data.decoding import DIGEST_LENGTH
from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.printable import counted, printable

MANIFEST = "images.csv"  # file name in a run folder
TRAIN, VALID, TEST = range(3)  # numbers of the parts
_COLUMNS = ["name", "part", "digest"]
_DIGEST = re.compile(f"[0-9a-f]{{{DIGEST_LENGTH}}}")
_NAMED = 3  # number of names that `difference` lists of each kind


@dataclass(frozen=True)
class Manifest:
    """The images of a data set, as the model sees them.

    Args:
        names: file name of each image, relative to the data set's root. Names are unique.
        parts: uint8 (N,), 0 train, 1 valid, 2 test.
        digests: digest of each image's prepared pixels, see `decoding.digest`. Copying, zipping or
            touching a file does not change it.
    """

    names: Sequence[str]
    parts: np.ndarray
    digests: Sequence[str]

    def write(self, path: Path) -> None:
        """Write a CSV file with the columns name, part and digest.

        Raises:
            OSError: see `write_atomically`.
        """

        def write(temporary: Path) -> None:
            # A lone surrogate stands for a byte of a name that is not UTF-8: write that byte.
            with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
                rows = csv.writer(out)
                rows.writerow(_COLUMNS)
                rows.writerows(zip(self.names, self.parts.tolist(), self.digests, strict=True))

        write_atomically(path, write)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a file of `write`.

        Raises:
            ValueError: the file does not exist, or `write` did not write it. The message names the
                file.
        """
        try:
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = csv.reader(file, strict=True)
                header = next(rows, None)
                if header != _COLUMNS:
                    raise ValueError(f"expected the columns {','.join(_COLUMNS)}")
                listed = list(rows)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}: expected the list of a run's images ({error})") from None
        for number, row in enumerate(listed, start=2):
            if len(row) != 3 or row[1] not in ("0", "1", "2") or not is_digest(row[2]):
                raise ValueError(
                    f"{path}, row {number}: expected a name, a part (0, 1 or 2) and a digest, "
                    f"got {','.join(row)[:80]!r}"
                )
        names = [row[0] for row in listed]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{path}: expected at least one image and different names")
        parts = np.array([int(row[1]) for row in listed], np.uint8)
        return cls(names, parts, [row[2] for row in listed])

    def subset(self, rows: np.ndarray) -> "Manifest":
        """Return the images of these rows."""
        names, digests = ([values[row] for row in rows] for values in (self.names, self.digests))
        return Manifest(names, self.parts[rows], digests)

    def difference(self, recorded: "Manifest") -> str | None:
        """Describe how this list differs from a recorded one; None if they are equal.

        For example "2 images added (y.png, z.png), 1 changed (c.png)".
        """
        now, before = self._by_name(), recorded._by_name()
        both = [name for name in now if name in before]
        found = {
            "added": [name for name in now if name not in before],
            "missing": [name for name in before if name not in now],
            "changed": [name for name in both if now[name][1] != before[name][1]],
            "in another part": [name for name in both if now[name][0] != before[name][0]],
        }
        kinds = [(kind, names) for kind, names in found.items() if names]
        if not kinds:
            return None if list(self.names) == list(recorded.names) else "the order of the images"
        phrases: list[str] = []
        for kind, names in kinds:
            more = ", ..." if len(names) > _NAMED else ""
            listed = ", ".join(map(printable, names[:_NAMED])) + more
            count = f"{len(names):,}" if phrases else counted(len(names), "image")
            phrases.append(f"{count} {kind} ({listed})")
        return ", ".join(phrases)

    def held_out_by(self, recorded: "Manifest") -> np.ndarray:
        """Return rows (int64) of the images whose names are in the test part of a recorded list.

        An image that has changed since is left out if it now has the pixels of an image that was
        trained on, for example because two files were swapped.
        """
        before, trained_on = recorded._by_name(), self.trained_on(recorded)
        rows = []
        for row, (name, digest) in enumerate(zip(self.names, self.digests, strict=True)):
            part, recorded_digest = before.get(name, (TRAIN, ""))
            # An unchanged image stays even if the training part has a duplicate: it was held out.
            if part == TEST and (digest == recorded_digest or not trained_on[row]):
                rows.append(row)
        return np.array(rows, np.int64)

    def training_rows(self, recorded: "Manifest") -> np.ndarray:
        """Return rows (int64) of the images in the training part of a recorded list.

        They are found by name. An image that has changed since is left out.
        """
        before = recorded._by_name()
        pairs = enumerate(zip(self.names, self.digests, strict=True))
        rows = [row for row, (name, digest) in pairs if before.get(name) == (TRAIN, digest)]
        return np.array(rows, np.int64)

    def trained_on(self, recorded: "Manifest") -> np.ndarray:
        """Return bool (N,): whether each image was trained on, under any name.

        An image was trained on if the training part of the recorded list has an image with the same
        pixels.
        """
        trained = {
            digest
            for digest, part in zip(recorded.digests, recorded.parts.tolist(), strict=True)
            if part == TRAIN
        }
        return np.array([digest in trained for digest in self.digests], bool)

    def _by_name(self) -> dict[str, tuple[int, str]]:
        """Return the part and digest of each name."""
        return dict(
            zip(self.names, zip(self.parts.tolist(), self.digests, strict=True), strict=True)
        )


def is_digest(value: object) -> bool:
    """Whether a value has the form that `decoding.digest` returns."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None
