"""Decode and resize a data set once, into a prepared file (see `prepared`).

Images are first written to a hidden file beside the result, in blocks. A journal (see `journal`)
gets a line for each block after the block is synced to the disk. If the process is killed, the next
one cuts both files back to the blocks that are whole, and continues from there. At the end the file
is renamed.
"""

import errno
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mflow_kernels.data.decoding import Decoded, Format, decode, start_worker
from mflow_kernels.data.files import sync
from mflow_kernels.data.journal import Work, append_line, lock_journal, open_hidden, resume_work
from mflow_kernels.data.manifest import TEST, TRAIN
from mflow_kernels.data.prepared import HEADER_BYTES, Prepared, Record, header, open_prepared
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.sources import DataError, Entry, Source

_HELD_OUT_FRACTION = 0.1
SPLIT_SEED = 20220606  # fixed, so that runs of different seeds hold out the same images
_BLOCK_BYTES = 16 * 2**20
_BLOCK_IMAGES = 256
_IMAGES_WORTH_A_PROCESS = 256  # decoding this many takes about as long as starting a process


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
        workers: number of decoding processes; by default one per core, or fewer for few images.
        overwrite: replace an existing file of that name.

    Returns:
        The file, open.

    Raises:
        DataError: no image can be read, an image is smaller than the crop, or `out` exists and may
            not be replaced.
        OSError: ENOSPC if the disk is full, or before decoding if the images will not fit. ENOMEM
            if a decoding process was killed. Finished blocks are kept for the next call.
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
            with open_hidden(partial) as file:
                work = resume_work(lines, file, source, image_size, identity)
                _check_space(work, source, file, out)
                _decode_rest(work, source, file, lines, workers)
                _complete(work, source, file)
        except DataError:  # another try would fail in the same way
            partial.unlink()
            journal.unlink()
            raise
        except OSError as error:
            begun = partial.exists() and partial.stat().st_size > HEADER_BYTES
            if not begun:  # there is no block to keep
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


def _decode_rest(
    work: Work, source: Source, file: BinaryIO, lines: BinaryIO, workers: int | None
) -> None:
    total = len(source.entries)
    block = max(1, min(_BLOCK_IMAGES, _BLOCK_BYTES // work.image_bytes))
    blocks = [source.entries[i : i + block] for i in range(work.end, total, block)]
    worthwhile = math.ceil((total - work.end) / _IMAGES_WORTH_A_PROCESS)
    workers = min(workers or len(os.sched_getaffinity(0)), worthwhile, len(blocks))
    with progress_bar("preparing", total, work.end) as progress:
        results = _decode_in_order(blocks, work.form, workers)
        for entries, decoded in zip(blocks, results, strict=True):
            file.write(decoded.pixels.data)
            _sync(file)
            line = {
                "end": work.end + len(entries),
                "skipped": {str(work.end + i): why for i, why in decoded.skipped.items()},
                "enlarged": decoded.enlarged,
                "digests": decoded.digests,
            }
            append_line(lines, line)
            _sync(lines)
            work.add(line)
            progress(work.end)


def _decode_in_order(
    blocks: Sequence[Sequence[Entry]], form: Format, workers: int
) -> Iterator[Decoded]:
    if workers <= 1:
        yield from (decode(block, form) for block in blocks)
        return
    # A fork could inherit locks that torch's threads hold. Spawning is cheap without torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    ahead: deque[Future[Decoded]] = deque()
    try:
        for block in blocks:
            with _interrupts_blocked():
                ahead.append(pool.submit(decode, block, form))
            if len(ahead) > 2 * workers:  # bounds the memory of decoded blocks
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise OSError(
            errno.ENOMEM,
            "a decoding process was killed, perhaps because memory ran out; the same command "
            "continues, and --workers 1 needs less memory",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this process and in processes that start meanwhile.

    Ctrl-C in a terminal reaches every process. Only the main process may end by it; it then
    ends the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _complete(work: Work, source: Source, file: BinaryIO) -> None:
    """Write the parts and the record after the images, then the header, and sync the file."""
    names = work.of_images(entry.name for entry in source.entries)
    if not names:
        first, why = next(iter(work.skipped.items()))
        raise DataError(
            f"data: expected images in {source.root}, but no file there can be read as an image "
            f"({source.entries[first].name}: {why})"
        )
    if source.parts is None:
        part = _random_parts(len(names))
    else:
        part = np.array(work.of_images(source.parts), np.uint8)
    skipped = {name: "listed in the partition, but missing" for name in source.missing}
    skipped |= {source.entries[i].name: why for i, why in sorted(work.skipped.items())}
    attributes = {
        name: np.packbits(work.of_images(values)).tobytes().hex()
        for name, values in source.attributes.items()
    }
    record = Record(
        source=os.path.realpath(source.root),
        listing=work.identity,
        size=work.form.size,
        channels=work.form.channels,
        crop=work.form.crop,
        partition="random" if source.parts is None else "official",
        count=np.bincount(part, minlength=3).tolist(),
        names=names,
        skipped=skipped,
        enlarged=work.enlarged,
        digests=work.digests,
        attributes=attributes,
    ).encode()
    file.write(part.tobytes() + record)
    file.truncate()
    file.seek(0)
    file.write(header(work.form, len(names), len(record)))
    _sync(file)


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


def _check_space(work: Work, source: Source, file: BinaryIO, out: Path) -> None:
    needed = (len(source.entries) - work.end) * work.image_bytes
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
