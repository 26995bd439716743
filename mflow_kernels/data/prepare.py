"""Decode and resize a data set once, into a prepared file (see `prepared`).

Threads decode the images, because Pillow decodes and resizes without Python's lock. They write them
to a hidden file beside the result, and list them in a journal (see `journal`). If the process is
killed, the next one continues with the images that are not written. At the end the file is renamed.
"""

import errno
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mflow_kernels.data.decoding import UnreadableError, decode
from mflow_kernels.data.files import sync
from mflow_kernels.data.journal import Work, lock_journal, open_hidden, resume_work, write_at
from mflow_kernels.data.manifest import TEST, TRAIN
from mflow_kernels.data.prepared import (
    HEADER_BYTES,
    Prepared,
    Record,
    checksum,
    header,
    open_prepared,
)
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.sources import DataError, Source

_HELD_OUT_FRACTION = 0.1
SPLIT_SEED = 20220606  # fixed, so that runs of different seeds hold out the same images
_BLOCK = 64  # images that a thread decodes before it reports its progress


def is_prepared_from(out: Path, source: Source, image_size: int) -> bool:
    """Whether `out` is a prepared file of exactly these images at this size."""
    try:
        return open_prepared(out).record.listing == _identity(source, image_size)
    except (DataError, OSError):
        return False


def prepare_images(
    source: Source, out: Path, image_size: int, workers: int | None = None, overwrite: bool = True
) -> Prepared:
    """Write the prepared file `out`, or continue to write it. Wait if another process writes it.

    Args:
        source: the images, from `find_images`.
        out: the file to write.
        image_size: side of the square results in pixels.
        workers: number of threads that decode; by default one per core.
        overwrite: replace an existing file of that name.

    Returns:
        The file, open.

    Raises:
        DataError: no image can be read, an image is smaller than the crop, or `out` exists and may
            not be replaced.
        OSError: ENOSPC if the disk is full, or before decoding if the images will not fit. Images
            that are written are kept for the next call.
    """
    identity = _identity(source, image_size)
    partial, journal = (out.with_name(f".{out.name}.{end}") for end in ("partial", "journal"))
    with lock_journal(journal) as (lines, waited):
        if waited and is_prepared_from(out, source, image_size):
            journal.unlink()
            return open_prepared(out)
        if out.exists() and not overwrite:
            journal.unlink()
            raise DataError(f"out: another process wrote {out} while this one waited")
        try:
            with open_hidden(partial) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about repaired files
                work = resume_work(lines, file, source, image_size, identity)
                _check_space(work, source, out)
                _decode_rest(work, source, workers)
                _complete(work, source, identity)
        except DataError:  # another try would fail in the same way
            partial.unlink()
            journal.unlink()
            raise
        except OSError as error:
            begun = partial.exists() and partial.stat().st_size > HEADER_BYTES
            if not begun:  # there is no image to keep
                partial.unlink(missing_ok=True)
                journal.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                again = f"continues from {partial.name}" if begun else "starts again"
                raise OSError(
                    error.errno,
                    f"no space left for {out} ({error.strerror}); free some space and repeat the "
                    f"command, which then {again}",
                ) from None
            raise
        os.replace(partial, out)
        sync(out.parent)
        journal.unlink()
    return open_prepared(out)


def _identity(source: Source, image_size: int) -> str:
    return hashlib.sha256(f"{image_size} {source.listing_hash()}".encode()).hexdigest()


def _decode_rest(work: Work, source: Source, workers: int | None) -> None:
    total, done = len(source.entries), len(work.written)
    rest = [number for number in range(total) if number not in work.written]

    def finish(block: Sequence[int]) -> int:
        for number in block:
            try:
                work.add(number, *decode(source.entries[number], work.form))
            except UnreadableError as error:
                work.skipped[number] = str(error)
        return len(block)

    blocks = (rest[i : i + _BLOCK] for i in range(0, len(rest), _BLOCK))
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        with progress_bar("preparing", total, done) as progress:
            for count in pool.map(finish, blocks):
                done += count
                progress(done)
    finally:
        pool.shutdown(cancel_futures=True)


def _complete(work: Work, source: Source, identity: str) -> None:
    """Close the gaps of skipped files, write parts and record, then the header; sync the file."""
    kept = sorted(work.written)
    if not kept:
        first, why = min(work.skipped.items())
        raise DataError(
            f"data: expected images in {source.root}, but no file there can be read as an image "
            f"({source.entries[first].name}: {why})"
        )
    for row, number in enumerate(kept):
        if row != number:
            write_at(work.file, work.read(number), work.place(row))
    digests, enlarged = zip(*(work.written[number] for number in kept), strict=True)
    if source.parts is None:
        part = _random_parts(len(kept))
    else:
        part = np.array([source.parts[number] for number in kept], np.uint8)
    skipped = {name: "listed in the partition, but missing" for name in source.missing}
    skipped |= {source.entries[i].name: why for i, why in sorted(work.skipped.items())}
    attributes = {
        name: np.packbits([values[number] for number in kept]).tobytes().hex()
        for name, values in source.attributes.items()
    }
    record = Record(
        source=os.path.realpath(source.root),
        listing=identity,
        size=work.form.size,
        channels=work.form.channels,
        crop=work.form.crop,
        partition="random" if source.parts is None else "official",
        count=np.bincount(part, minlength=3).tolist(),
        names=[source.entries[number].name for number in kept],
        skipped=skipped,
        enlarged=sum(enlarged),
        digests=list(digests),
        attributes=attributes,
    ).encode()
    end = work.place(len(kept))
    write_at(work.file, part.tobytes() + record, end)
    work.file.truncate(end + len(part) + len(record))
    write_at(work.file, header(work.form, len(kept), len(record), checksum(part, record)), 0)
    os.fsync(work.file.fileno())


def _random_parts(count: int) -> np.ndarray:
    """Draw a tenth of the images as the test part; the rest is for training.

    The run's seed does not change the draw.
    """
    part = np.full(count, TRAIN, np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    part[order[: held_out_count(count)]] = TEST
    return part


def held_out_count(count: int) -> int:
    """Return the number of images that a random split of `count` images holds out: a tenth."""
    return math.ceil(count * _HELD_OUT_FRACTION)


def _check_space(work: Work, source: Source, out: Path) -> None:
    needed = (len(source.entries) - len(work.written)) * work.image_bytes
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
