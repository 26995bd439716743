"""Open a prepared file, or prepare a folder or zip in a cache and open the result."""

import hashlib
import os
import sys
from pathlib import Path

from mflow_kernels.data.named import DEFAULT_SIZE, NAMED_DATASETS
from mflow_kernels.data.prepare import is_prepared_from, prepare_images
from mflow_kernels.data.prepared import Prepared, is_prepared, open_prepared
from mflow_kernels.data.printable import printable
from mflow_kernels.data.sources import DataError, find_images

_ANNOUNCED_MEGABYTES = 100  # a line on stderr announces a larger file before it is written


def open_or_prepare(data: str, image_size: int | None) -> Prepared:
    """Open a prepared file. Prepare a folder or zip in the cache first, unless it is there already.

    Args:
        data: a prepared file, or a folder or zip of images.
        image_size: side of the images in pixels; by default the prepared file's own, else 64.

    Raises:
        DataError: `data` does not exist or holds no readable image, a prepared file has another
            size, or the cache cannot be written.
        OSError: ENOSPC if the cache's disk is full.
    """
    path = Path(data)
    if is_prepared(path):
        prepared = open_prepared(path)
        size = prepared.record.size
        if image_size not in (None, size):
            raise DataError(
                f"data: expected images of {image_size}x{image_size} pixels, got {size}x{size} in "
                f"{data}"
            )
        return prepared
    check_exists(data)
    size = image_size or DEFAULT_SIZE
    source = find_images(path)
    cached = _cached_file(path, size)
    if is_prepared_from(cached, source, size):
        return open_prepared(cached)
    megabytes = len(source.entries) * 3 * size**2 / 1e6
    if megabytes > _ANNOUNCED_MEGABYTES:
        print(printable(f"preparing {data} in {cached} ({megabytes:,.0f} MB)"), file=sys.stderr)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data: cannot write prepared images to {cached.parent} ({error.strerror}); set "
            "MFLOW_CACHE to another folder, or give a file of mflow prepare"
        ) from None
    return prepare_images(source, cached, size)


def check_exists(data: str) -> None:
    """Raise DataError unless `data` names a data set, or a file or folder that exists.

    An empty name is refused: to Path it is the current folder.
    """
    if data not in NAMED_DATASETS and not (data and Path(data).exists()):
        names = ", ".join(map(repr, NAMED_DATASETS))
        raise DataError(
            f"data: expected {names}, a folder or zip of images, or a file of mflow prepare, "
            f"got {data!r}"
        )


def _cached_file(path: Path, size: int) -> Path:
    """Return the name of a folder's or zip's prepared file in the cache.

    The cache is $MFLOW_CACHE, or the folder mflow_kernels in the user's cache folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("MFLOW_CACHE") or Path(base, "mflow_kernels"))
    real = Path(os.path.realpath(path))
    place = hashlib.sha256(os.fsencode(real)).hexdigest()[:10]
    # File names hold 255 bytes, and a character may take four: 40 characters leave enough room.
    return cache / f"{real.stem[:40]}-{size}px-{place}.safetensors"
