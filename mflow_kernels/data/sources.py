"""List the image files of a folder, a zip, or CelebA as its authors distribute it.

Nothing is decoded here. A zip inside a folder is read in place, as if it were unpacked there.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

CELEBA_CROP = 148  # images have 178x218 pixels; this is the usual crop to the face
CELEBA_IMAGES = "img_align_celeba"
CELEBA_PARTITION = "list_eval_partition.txt"
CELEBA_ATTRIBUTES = "list_attr_celeba.txt"
_PIECE_BYTES = 2**14
_LARGEST_MEMBER = 2**30  # bytes; Pillow refuses images of more than 179 million pixels


class DataError(ValueError):
    """Images are missing or not as expected. The message says what was found."""


class Entry(NamedTuple):
    """A file, or a member of a zip."""

    name: str  # relative to the source's root, with slashes
    file: str
    member: str | None
    stamp: str  # changes with the content: size and time, or size and checksum in a zip

    def open(self) -> BinaryIO:
        """Open the content, seekable.

        Raises:
            Exception: the file cannot be read, is encrypted, or fails the zip's checksum. zipfile
                and its decompressors raise many types of errors.
        """
        if self.member is None:
            return open(self.file, "rb")
        content = io.BytesIO()
        with _cached_zip(self.file).open(self.member) as member:
            # Small pieces bound the memory: bz2 and LZMA inflate each piece as a whole.
            while piece := member.read(_PIECE_BYTES):
                if content.write(piece) and content.tell() > _LARGEST_MEMBER:
                    raise ValueError(f"inflates to more than {_LARGEST_MEMBER >> 20} MiB")
        content.seek(0)
        return content


@dataclass(frozen=True)
class Source:
    """The files of a data set, in an order that depends only on their names.

    Args:
        root: the folder or zip.
        entries: the files, some of which may not be images.
        parts: part of each entry in the official partition (0 train, 1 valid, 2 test); None if the
            data set has no official partition.
        missing: names in the partition that have no file.
        crop: side of the central square that is cut out of each image; None stands for the largest
            square.
        attributes: for each attribute of CelebA, whether each entry has it; empty without
            list_attr_celeba.txt.
    """

    root: Path
    entries: list[Entry]
    parts: list[int] | None = None
    missing: tuple[str, ...] = ()
    crop: int | None = None
    attributes: dict[str, list[bool]] = field(default_factory=dict)

    def listing_hash(self) -> str:
        """Return a checksum of all names, stamps and parts, which changes with the images."""
        digest = hashlib.sha256(repr((self.crop, self.parts)).encode())
        for name, values in self.attributes.items():
            digest.update(f"{name}\0".encode() + bytes(values))
        for entry in self.entries:
            digest.update(f"{entry.name}\0{entry.stamp}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def find_images(data: str | Path) -> Source:
    """List a folder or zip of images.

    A folder img_align_celeba or a zip img_align_celeba.zip is CelebA, and so is a folder that
    contains one at most two folders deep. The file list_eval_partition.txt must then lie in it,
    beside it or in a folder Eval beside it, as in the authors' download. The optional file
    list_attr_celeba.txt may lie beside it or in a folder Anno beside it.

    Raises:
        DataError: `data` does not exist or holds no file, a zip is damaged, or CelebA's partition
            is missing or malformed.
    """
    root = Path(data)
    if not root.is_dir() and not root.is_file():
        raise DataError(f"data: expected a folder or zip of images, found none at {str(data)!r}")
    celeba = _find_celeba(root)
    source = _read_celeba(root, *celeba) if celeba else Source(root, _list(root))
    if not source.entries:
        raise DataError(f"data: expected images in {root}, found none")
    return source


def _find_celeba(root: Path) -> tuple[Path, list[Path]] | None:
    """Return CelebA's images (a folder or zip), and the folders that may hold the partition."""
    for folder in _with_subfolders(Path(os.path.abspath(root)), depth=2):
        for path in (folder, folder / CELEBA_IMAGES, folder / f"{CELEBA_IMAGES}.zip"):
            if path.name == CELEBA_IMAGES and path.is_dir():
                return path, [folder, path.parent, path.parent.parent]
            if path.suffix == ".zip" and path.is_file():
                named = path.stem == CELEBA_IMAGES
                if named or any(_is_inside_celeba(e.member or "") for e in _list(path)):
                    return path, [path.parent, path.parent.parent]
    return None


def _with_subfolders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield a folder (or file) and the folders inside it down to `depth`, sorted by name."""
    yield folder
    if depth and folder.is_dir() and folder.name != CELEBA_IMAGES:
        with os.scandir(folder) as found:
            inner = sorted(e.name for e in found if e.is_dir() and not e.name.startswith("."))
        for name in inner:
            yield from _with_subfolders(folder / name, depth - 1)


def _is_inside_celeba(name: str) -> bool:
    return CELEBA_IMAGES in PurePosixPath(name).parts[:-1]


def _read_celeba(root: Path, images: Path, folders: list[Path]) -> Source:
    entries: dict[str, Entry] = {}
    doubled: dict[str, Entry] = {}
    for entry in _list(images):
        name = PurePosixPath(entry.name).name
        if entries.setdefault(name, entry) != entry:
            doubled[name] = entry
    parts = _read_partition(entries.get(CELEBA_PARTITION), images, folders)
    for name in parts:
        if name in doubled:
            raise DataError(
                f"data: expected one file {name} in {images}, "
                f"found {entries[name].name} and {doubled[name].name}"
            )
    there = [name for name in parts if name in entries]
    return Source(
        root,
        [entries[name] for name in there],
        [parts[name] for name in there],
        tuple(name for name in parts if name not in entries),
        CELEBA_CROP,
        _read_attributes(there, images, folders),
    )


def _read_partition(inside: Entry | None, images: Path, folders: list[Path]) -> dict[str, int]:
    """Return the part of each name in the partition file.

    `inside` is that file if it lies among the images, else None.
    """
    path = Path(images, inside.name) if inside else _find_beside(folders, "Eval", CELEBA_PARTITION)
    if path is None:
        raise DataError(
            f"data: expected {CELEBA_PARTITION} beside {images.name} (it is in the folder Eval/ of "
            f"CelebA's download), found none near {images}"
        )
    try:
        with inside.open() if inside else path.open("rb") as opened:
            text = opened.read().decode("utf-8-sig")
    except Exception as error:  # see `Entry.open`
        raise DataError(f"data: cannot read {path}: {error}") from None
    parts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"data: {path}, line {number}"
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(f"{where}: expected a file name and 0, 1 or 2, got {line[:80]!r}")
        name, part = words[0], int(words[1])
        if parts.setdefault(name, part) != part:
            raise DataError(
                f"{where}: expected {name} in one part, got part {part} after {parts[name]}"
            )
    if not parts:
        raise DataError(f"data: expected file names and their parts in {path}, found none")
    return parts


def _read_attributes(names: list[str], images: Path, folders: list[Path]) -> dict[str, list[bool]]:
    """Return, for each attribute, whether each image has it.

    The result is empty if there is no file of attributes.
    """
    path = _find_beside(folders, "Anno", CELEBA_ATTRIBUTES)
    if path is None:
        return {}
    try:
        _, heading, *lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"data: cannot read {path}: {error}") from None
    attributes = heading.split()
    rows: dict[str, list[bool]] = {}
    for number, line in enumerate(lines, start=3):
        name, *values = line.split() or [""]
        if name and (len(values) != len(attributes) or not {*values} <= {"1", "-1"}):
            raise DataError(
                f"data: {path}, line {number}: expected a file name and {len(attributes)} values "
                f"of 1 or -1, got {line[:80]!r}"
            )
        rows[name] = [value == "1" for value in values]
    missing = next((name for name in names if name not in rows), None)
    if missing is not None:
        raise DataError(f"data: expected the attributes of {missing} in {path}, found none")
    return {name: [rows[n][i] for n in names] for i, name in enumerate(attributes)}


def _find_beside(folders: list[Path], below: str, name: str) -> Path | None:
    """Return the first file of this name in a folder or in the folder `below` it."""
    candidates = (folder / inner / name for folder in folders for inner in ("", below))
    return next((path for path in candidates if path.is_file()), None)


def _list(root: Path) -> list[Entry]:
    """Return all files of a folder or zip and of zips in it, except hidden files."""
    if root.is_file():
        return _list_zip(root, "")
    entries: list[Entry] = []
    for folder, inner, files in os.walk(root, onerror=_refuse_unlisted):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            if file.startswith(".") or not path.is_file():
                continue
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() == ".zip":
                entries += _list_zip(path, f"{name}/")
            else:
                there = path.stat()
                stamp = f"{there.st_size} {there.st_mtime_ns}"
                entries.append(Entry(name, str(path), None, stamp))
    return sorted(entries)


def _refuse_unlisted(error: OSError) -> None:
    raise DataError(f"data: cannot list the folder {error.filename}: {error.strerror}")


def _list_zip(path: Path, prefix: str) -> list[Entry]:
    entries = []
    # If members share a name, the last one counts, as it does when a zip is unpacked.
    members = {member.filename: member for member in _cached_zip(str(path)).infolist()}
    for member in members.values():
        parts = [part for part in PurePosixPath(member.filename).parts if part != ".."]
        folder = not member.filename or member.is_dir()
        if folder or "__MACOSX" in parts or any(part.startswith(".") for part in parts):
            continue
        stamp = f"{member.file_size} {member.CRC:08x}"
        entries.append(Entry(prefix + member.filename, str(path), member.filename, stamp))
    return sorted(entries)


def _cached_zip(path: str) -> zipfile.ZipFile:
    try:
        return _open_zip(path, os.stat(path).st_mtime_ns)
    except Exception as error:  # zipfile raises many types for a bad table of contents
        raise DataError(
            f"data: expected a folder or a complete zip, got {path} ({error})"
        ) from None


@lru_cache(maxsize=4)
def _open_zip(path: str, changed: int) -> zipfile.ZipFile:
    # CelebA's table of contents has 200,000 lines. The cache lets each process read it only once.
    return zipfile.ZipFile(path)
