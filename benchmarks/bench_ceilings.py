"""Find the largest batch that fits on a GPU, and the images per second that it trains.

The models are Glows on large images with bfloat16 networks: this package's, plain eager PyTorch and
gradient checkpointing, each in a process of its own. Peak memory grows linearly with the batch, so
two small batches predict the largest one. If that does not fit, the batch shrinks by 4% until one
does. Each model is first compared with its reference at a small batch, except on images larger than
256x256, where the reference does not fit.
"""

import gc
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness.measurements import peak_bytes, seconds
from benchmarks.harness.models import Model, Spec, shared_results
from benchmarks.harness.processes import Died, Late, in_fresh_processes
from benchmarks.harness.session import Bench, Group, Measured, Missing, measured_row

test_ceiling = measured_row
VARIANTS = ("mflow_kernels, reversible", "plain", "checkpointing")
SECONDS_PER_VARIANT = 60  # time limit of a variant's process
# Share of the free memory to use; fragmentation and libraries take the rest.
MEMORY_SHARE = 0.97


class Ceiling(NamedTuple):
    spec: Spec
    search: bool  # whether to search for the largest batch; otherwise one step at spec.batch
    variants: tuple[str, ...]


def ceilings(size: str, gpu: bool) -> list[Ceiling]:
    if size == "tiny":
        low = Spec(3, 8, 2, 2, 8, 2, precision="bfloat16")
        return [Ceiling(low, True, VARIANTS), Ceiling(low._replace(side=16), False, VARIANTS[:1])]
    large = Spec(3, 256, 6, 32, 512, 2, precision="bfloat16")
    made = [Ceiling(large, True, VARIANTS)]
    made += [Ceiling(large._replace(side=s, batch=1), False, VARIANTS[:1]) for s in (512, 1024)]
    return made if gpu else []


def groups(size: str, gpu: bool) -> Iterator[Group]:
    chosen = ceilings(size, gpu)
    for ceiling in chosen:
        for variant in ceiling.variants:
            measured = partial(measure, ceiling=ceiling, variant=variant)
            words = tuple(str(ceiling.spec).split())
            yield Group(f"ceiling, {ceiling.spec}", words, [variant], measured)
    if not chosen:
        yield Group("ceilings", (), ["needs-a-GPU"], _needs_gpu)


def _needs_gpu(bench: Bench) -> Measured:
    raise Missing("memory ceilings need a CUDA device")


def _step(model: Model, batch: int) -> tuple[int, float]:
    """Return peak bytes and seconds of one training step at a batch size, without warm-up."""
    model.module.zero_grad()
    model.x = model.spec._replace(batch=batch).images(model.device)
    taken: list[float] = []
    peak = peak_bytes(
        lambda: taken.append(seconds(model.train, model.device, "wall")), model.device
    )
    return peak, taken[0]


def _free(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return 8 * 2**20  # for rehearsals on a CPU


def largest(model: Model) -> tuple[int, int, float]:
    """Return the largest batch size, and the peak bytes and seconds of its step."""
    small = model.spec.batch
    small_peak, double_peak = (_step(model, batch)[0] for batch in (small, 2 * small))
    bytes_per_image = max(1, (double_peak - small_peak) // small) + model.x[0].nbytes
    model.module.zero_grad()
    constant = 2 * small_peak - double_peak
    batch = max(1, int((MEMORY_SHARE * _free(model.device) - constant) // bytes_per_image))
    while True:
        try:
            return batch, *_step(model, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        _free(model.device)
        batch = min(batch - 1, int(0.96 * batch))


def _work(job: tuple[Ceiling, str, str, int, bool]) -> tuple[int, int, float]:
    """Return batch size, peak bytes and seconds of a step."""
    ceiling, variant, device_name, threads, check_only = job
    torch.set_num_threads(threads)
    model = Model(ceiling.spec, variant, torch.device(device_name))
    if ceiling.search:
        # The peers' states are bfloat16, so gradients through 192 steps are too inexact to check.
        model.check("train" if variant.startswith("mflow_kernels") else "forward")
        shared_results.cache_clear()
    else:
        _step(model, ceiling.spec.batch)  # compile kernels and load libraries
    if ceiling.search and not check_only:
        return largest(model)
    return model.spec.batch, *_step(model, model.spec.batch)


def measure(bench: Bench, ceiling: Ceiling, variant: str) -> Measured:
    measured = Measured()
    job = (ceiling, variant, str(bench.device), bench.threads, bench.check_only)
    (result,) = in_fresh_processes(_work, [job], 1, SECONDS_PER_VARIANT)
    if isinstance(result, Died):
        late = isinstance(result, Late)
        measured.faults[variant] = Missing(f"{variant}: {result}") if late else result
        return measured
    batch, peak, taken = result
    measured.seconds[variant] = [taken]
    figures = {
        "largest batch" if ceiling.search else "batch": batch,
        "images/s": round(batch / taken, 2),
        "peak, GiB": round(peak / 2**30, 2),
    }
    spec = ceiling.spec._replace(batch=batch)
    measured.extra[variant] = {"spec": str(spec), "peak_bytes": peak, "figures": figures}
    return measured
