"""Measure how many images per second the loader alone reads.

The loader reads batches as training does, in a global shuffle. It reads the prepared FILE or, if
none is given, a file of noise for each of four image sizes. The columns:

    disk    the first pass, after the page cache of the file was dropped
    memory  the fastest of three more passes, which read from the page cache
    core    the best of these three passes per second of processor time, not of wall-clock time
    device  a pass that also sends each batch to the GPU (the CPU if there is none), flips it and
            dequantizes it with 5 bits

--run adds the images per second that training in a run folder reached.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.output import command_parser, text_table
from mflow_kernels.data.batches import BatchStream, flip_at_random
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.prepared import open_prepared
from mflow_kernels.data.sources import DataError
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.runs.checkpoints import METRICS
from mflow_kernels.training.callbacks import read_metrics

BYTES = 256 * 10**6  # size of a file of noise
SIZES = {64: 256, 128: 128, 256: 32, 1024: 4}  # largest image side: batch size
PASSES = 3
PASS_BYTES = 10**9  # a pass reads at most this much of a file


def main() -> None:
    parser = command_parser("benchmarks.celeba.loader", __doc__)
    parser.add_argument("file", nargs="?", type=Path, help="file made by mflow prepare")
    parser.add_argument("--run", type=Path, help="run folder of a trained model to compare with")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.run and not (arguments.run / METRICS).is_file():
        parser.error(f"--run: expected a run folder with {METRICS}, got {arguments.run}")
    if arguments.file:
        try:
            prepared = open_prepared(arguments.file)
        except DataError as error:
            parser.error(str(error))
        rows = [measure(arguments.file, prepared.images, device)]
    else:
        rows = [measure_noise(size, device) for size in SIZES]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"images per second, on {name}")
    print(text_table(("shape", "batch", "disk", "memory", "core", "GB/s, core", "device"), rows))
    if arguments.run:
        speeds = [
            row["images_per_second"]
            for row in read_metrics(arguments.run / METRICS)
            if "images_per_second" in row
        ]
        print(f"training in {arguments.run} reached {statistics.median(speeds):,.0f} (median)")


def measure_noise(size: int, device: torch.device) -> list[object]:
    """Return the table row of a file of noise."""
    count = BYTES // (3 * size**2)
    noise = np.random.default_rng(0).integers(0, 256, 3 * size**2, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "noise")
        with path.open("wb") as file:
            for shift in range(count):
                file.write(np.roll(noise, shift).tobytes())
            os.fsync(file.fileno())
        images = np.memmap(path, np.uint8, "r", shape=(count, 3, size, size))
        return measure(path, images, device)


def measure(path: Path, images: np.ndarray, device: torch.device) -> list[object]:
    """Return the table row of a prepared file."""
    _, channels, size, _ = images.shape
    batch_size = next((batch for side, batch in SIZES.items() if size <= side), 1)
    stream = BatchStream(ImageSet(images), batch_size, seed=0)
    batches = min(stream.batches_per_pass, max(1, PASS_BYTES // (batch_size * images[0].size)))
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    disk, _ = rate(stream, batches, lambda batch: None)
    passes = [rate(stream, batches, lambda batch: None) for _ in range(PASSES)]
    memory, core = (max(rates) for rates in zip(*passes, strict=True))

    def use(batch: Tensor) -> None:
        generator = stream_generator(0, Stream.TRAINING_NOISE, device=device)
        sent = batch.to(device, non_blocking=True)
        dequantize(flip_at_random(sent, generator), 5, generator)

    used, _ = rate(stream, math.ceil(batches / 8), use)  # fewer batches: a CPU is slow here
    gigabytes = core * images[0].size / 1e9
    shape = f"{channels}x{size}x{size}"
    return [shape, batch_size, *(f"{x:,.0f}" for x in (disk, memory, core)),
            f"{gigabytes:.1f}", f"{used:,.0f}"]  # fmt: skip


def rate(stream: BatchStream, batches: int, use: Callable[[Tensor], None]) -> tuple[float, float]:
    """Return images per second of wall-clock time and of this process's processor time."""
    clock, core = time.perf_counter(), time.process_time()
    count = 0
    for batch in islice(stream, batches):
        use(batch)
        count += len(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count / (time.perf_counter() - clock), count / (time.process_time() - core)


if __name__ == "__main__":
    main()
