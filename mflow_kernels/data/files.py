"""Write files and folders that are whole or absent, and lock folders against other writers."""

import errno
import glob
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# The disk, a quota, the limit of a file's size (ulimit -f) or memory is exhausted.
RESOURCE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
LOCK = ".lock"  # name of the lock file in a folder


class FolderError(ValueError):
    """A folder cannot be written, or another process is writing to it."""


def write_atomically(
    path: Path, write: Callable[[Path], object], previous: Path | None = None
) -> None:
    """Call `write(temporary)` with a name beside `path`, then rename the written file to `path`.

    The file is synced to the disk before it is renamed.

    Args:
        path: the file to create or replace.
        write: writes the file to the name it is given.
        previous: a new name for the file that is replaced; by default that file is lost.

    Raises:
        OSError: the file could not be written, for example because the disk is full. The message
            names `path`, which is unchanged.
    """
    temporary = path.with_name(f".{shortened(path.name)}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def shortened(name: str) -> str:
    """Return the first 100 bytes of a name, which leave room for additions: names have up to 255
    bytes. A character that is cut through is left out."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 100 else encoded[:100].decode(errors="ignore")


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file is a pipe or device, which may never end, or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def follow_links(path: Path, argument: str) -> Path:
    """Resolve symbolic links, so that writing the result keeps the link and replaces its target.

    The target need not exist yet.

    Raises:
        ValueError: the links lead in a circle, or no file can have this name. The message names
            `argument`.
    """
    try:
        real = Path(os.path.realpath(path))
        if real.is_symlink():
            raise ValueError("symbolic links lead in a circle")
        _exists(real)
    except (OSError, ValueError) as error:  # ValueError: also a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{argument}: expected a path that can exist, got {path} ({reason})"
        ) from None
    return real


def remove_temporary(folder: Path, name: str = "*") -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    Args:
        folder: where `write_atomically` or `make_folder` wrote.
        name: pattern of the names that they were to get.
    """
    for path in folder.glob(f".{name}.*"):
        process = re.search(r"\.(\d+)\.(tmp|old)$", path.name)
        if process and not _is_another_running(int(process[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def lock_folder(folder: Path, argument: str) -> FileLock:
    """Lock a folder against other writers until the lock is released or this process ends.

    The lock also ends if this process is killed, and it survives a renaming of the folder.

    Raises:
        FolderError: another process holds the lock, or the folder cannot be written. The message
            names `argument`.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderError(f"{argument}: another process is writing to {folder}") from None
    except OSError as error:
        raise _refusal(error, folder, argument) from None
    return lock


@contextmanager
def folder_to_write(folder: Path, argument: str) -> Iterator[Path]:
    """Create a folder if it does not exist, and hold its lock; errors as for `lock_folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(error, folder, argument) from None
    lock = lock_folder(folder, argument)
    try:
        remove_temporary(folder)
        yield folder
    finally:
        lock.release()


def check_can_be_written(folder: Path, argument: str) -> None:
    """Raise FolderError if a folder cannot be written or created. Nothing is written."""
    try:
        for path in (folder.absolute(), *folder.absolute().parents):
            if _exists(path):
                break
    except OSError as error:
        raise _refusal(error, folder, argument) from None
    if not path.is_dir():
        raise FolderError(f"{argument}: expected a folder, but {path} is a file")
    if not os.access(path, os.W_OK | os.X_OK):
        raise FolderError(f"{argument}: cannot write {folder} ({os.strerror(errno.EACCES)})")


def check_is_text(path: Path, argument: str) -> None:
    """Raise ValueError if a path has bytes that are not UTF-8. The message names `argument`."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{argument}: expected a path in UTF-8, got {path}") from None


def _exists(path: Path) -> bool:
    # Path.exists may return False for an error such as a missing permission.
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def make_folder(
    folder: Path, fill: Callable[[Path], object], argument: str, replaced: FileLock | None = None
) -> FileLock:
    """Call `fill(temporary)` with an empty folder beside `folder`, then rename it to `folder`.

    Args:
        folder: the folder to create, with its parents.
        fill: writes the content into the folder it is given.
        argument: the name of the folder in error messages.
        replaced: the lock of an existing folder of that name, which is replaced. The lock is
            released.

    Returns:
        The lock of the new folder.

    Raises:
        FolderError: see `lock_folder`; also if the folder exists and `replaced` is None.
        OSError: no disk space or memory is left. In both cases nothing has changed.
    """
    temporary = folder.with_name(f".{shortened(folder.name)}.{os.getpid()}.tmp")
    old = temporary.with_suffix(".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_temporary(folder.parent, glob.escape(shortened(folder.name)))
        temporary.mkdir()
        lock = lock_folder(temporary, argument)
        fill(temporary)
        if replaced is not None:
            folder.rename(old)
        temporary.rename(folder)
        sync(folder.parent)
        return lock
    except OSError as error:
        raise _refusal(error, folder, argument) from None
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)
        if replaced is not None:
            replaced.release()


def make_result(folder: Path, fill: Callable[[Path], object], argument: str) -> None:
    """Create a new folder as `make_folder` does, and leave no lock in it."""
    lock = make_folder(folder, fill, argument)
    (folder / LOCK).unlink(missing_ok=True)
    lock.release()


def _refusal(error: OSError, folder: Path, argument: str) -> Exception:
    if error.errno in RESOURCE_ERRORS:
        return error
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():
        return FolderError(f"{argument}: expected a new folder, but {folder} exists")
    return FolderError(f"{argument}: cannot write {folder} ({error.strerror})")


def _is_another_running(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except PermissionError:  # it runs and belongs to another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
