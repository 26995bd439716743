"""Files that are either whole or absent, also after a power cut."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(
    path: Path, write: Callable[[Path], object], previous: Path | None = None
) -> None:
    """Call `write(temporary)` with a name beside `path`, then rename what it wrote to `path`.

    What was written is on the disk before it takes the name.

    Args:
        path: the file to make or to replace.
        write: is called with the temporary name.
        previous: a name that the replaced file takes.

    Raises:
        OSError: with `path` in its text, a full disk among the reasons; `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def follow_links(path: Path, argument: str) -> Path:
    """The file or folder that is written when `path` is: symbolic links are followed, also a last
    one that leads to nothing yet.

    A command that replaces `path` replaces what the link leads to, and the link stays.

    Raises:
        ValueError: links that lead in a circle; it names `argument`.
    """
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise ValueError(f"{argument}: symbolic links lead in a circle: {path}")
    return real


def remove_temporary(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder when its process was killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
