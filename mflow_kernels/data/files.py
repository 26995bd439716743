"""Files and folders that are either whole or absent, and that one process writes at a time."""

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

RESOURCE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)  # a full disk, a full quota, no memory
LOCK = ".lock"  # in a folder


class FolderError(ValueError):
    """A folder that cannot be written, or that another process writes."""


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


def read_regular(path: Path) -> bytes:
    """The content of a file; OSError also for a pipe or device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


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
        process = re.search(r"\.(\d+)\.tmp$", path.name)
        if process and not _is_another_running(int(process[1])):
            path.unlink(missing_ok=True)


def lock_folder(folder: Path, argument: str) -> FileLock:
    """Keep other processes from writing a folder until the lock is released or this process ends,
    however it ends. The folder may be renamed meanwhile.

    Raises:
        FolderError: another process has it, or it cannot be written; it names `argument`.
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
def folder_to_write(folder: Path, argument: str) -> Iterator[None]:
    """Make a folder if it is not there, and hold its lock meanwhile; errors as `lock_folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(error, folder, argument) from None
    lock = lock_folder(folder, argument)
    try:
        remove_temporary(folder)
        yield
    finally:
        lock.release()


def check_can_be_written(folder: Path, argument: str) -> None:
    """FolderError if it is seen now that a folder cannot be written or made; nothing is written."""
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


def _exists(path: Path) -> bool:
    # Not Path.exists, which takes some errors for an answer.
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
        folder: to make. Folders above it are made, too.
        fill: is called with the temporary name.
        argument: what errors call the folder.
        replaced: the lock of a folder of that name, which is removed; it is released then.

    Returns:
        The lock of the new folder.

    Raises:
        FolderError: see `lock_folder`; also if the folder exists and is not to be replaced.
        OSError: no space or memory is left. In both cases nothing has changed.
    """
    # A part of the name, since the whole with what is added may be longer than names may be.
    temporary = folder.with_name(f".{folder.name[:100]}.{os.getpid()}.tmp")
    old = temporary.with_suffix(".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        temporary.mkdir()
        lock = lock_folder(temporary, argument)
        fill(temporary)
        if replaced is not None:
            folder.rename(old)
        temporary.rename(folder)
        _sync(folder.parent)
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


def _remove_abandoned(folder: Path) -> None:
    """Remove what `make_folder` left beside a folder when its process was killed."""
    for path in folder.parent.glob(f".{glob.escape(folder.name[:100])}.*"):
        if not re.search(r"\.\d+\.(tmp|old)$", path.name) or not path.is_dir():
            continue
        try:
            lock = lock_folder(path, "")
        except FolderError:  # its process runs
            continue
        shutil.rmtree(path, ignore_errors=True)
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
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
