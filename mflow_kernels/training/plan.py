"""The text of `mflow plan`: the memory, steps, disk space and hours of a training run.

The functions take a configuration and its `steps`, which are `walk(config)`.
"""

import dataclasses
import re
from collections.abc import Sequence

from rich.filesize import decimal

from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.data.printable import counted
from mflow_kernels.evaluation.likelihood import evaluation_batch_size
from mflow_kernels.runs.config import RunConfig
from mflow_kernels.training.cards import CARDS
from mflow_kernels.training.memory import (
    AVERAGE,
    OPTIMIZER,
    Step,
    checkpoint_bytes,
    evaluation_memory,
    highest,
    largest_batch,
    walk,
)

ROOFLINE_SHARE = 0.5  # assumed ratio of the lower bound of a step's time to its real time


def _describe_flow(config: RunConfig) -> str:
    if config.flow == "glow":
        return f"{config.levels} levels of {config.steps} steps"
    blocks = counted(config.depth, "block")
    return f"{config.couplings} couplings of {blocks} on patches of {config.patch} pixels"


def describe_peak(config: RunConfig, steps: Sequence[Step]) -> str:
    """Return the part of `mflow plan` on the configuration and its peak memory."""
    step, gpu = highest(steps), config.device != "cpu"
    states = "rebuilt" if config.reversible else "stored"
    if config.reversible and config.checkpoint_every is not None:
        states = f"rebuilt, one in {config.checkpoint_every} kept"
    size = config.image_size
    parts = f", in {config.accumulate} parts" if config.accumulate > 1 else ""
    lines = [
        f"Batches of {counted(config.batch_size, 'image')} of {config.channels}x{size}x{size}"
        f"{parts}; {_describe_flow(config)}, width {config.width}",
        f"States {states}; networks in {config.precision}; penalty in the {config.domain} domain",
        "",
        f"Predicted peak of a training step on a {'GPU' if gpu else 'CPU'}"
        + (f", while stage {step.stage + 1} trains" if config.stages else ""),
    ]
    rows = {label: value for label, value in step.peak.items() if value}
    rows["total"] = step.total
    width = max(map(len, rows)) + 2
    lines += [f"  {label:{width}}{decimal(value):>10}" for label, value in rows.items()]
    if parts:
        first = evaluation_memory(config, config.batch_size)
        first += step.peak[AVERAGE] + step.peak[OPTIMIZER]
        lines.append(
            f"The first batch of a stage passes whole, without gradients: {decimal(first)}"
        )
    batch = evaluation_batch_size(config.image_shape)
    evaluated = decimal(evaluation_memory(config, batch))
    lines += [
        "",
        f"Evaluation, {counted(batch, 'image')} at a time: {evaluated}; "
        "without --quick, its Jacobians take up to 1.1 GB more",
    ]
    if gpu:
        lines += [
            "",
            "The prediction is within 10% of peaks measured on a CPU. It is not verified on a GPU.",
            "Leave room for the CUDA context (about 0.5 GB), cuDNN and the caching allocator.",
        ]
    return "\n".join(lines)


def parse_memory(text: str) -> int:
    """Convert a size such as "80GB", "16GiB" or "900MB" to bytes.

    Raises:
        ValueError: the text is not such a size.
    """
    units = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG]i?B)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"gpu_memory: expected a size such as 80GB or 16GiB, got {text}")
    return int(float(found[1]) * units[found[2].upper()])


def describe_training(config: RunConfig, steps: Sequence[Step], images: int | None) -> str:
    """Return the part of `mflow plan` on parameters, steps, disk and hours.

    `images` is the number of training images. If it is None, the text says how to give the number.
    """
    on_gpu = config.device != "cpu"
    head = ["", "parameters", "steps", *(f"{card} hours" for card in CARDS if on_gpu)]
    rows = [head]
    for step in steps:
        flow = config.flows[step.stage]
        count = flow.max_steps
        if images is not None:
            count = flow.optimizer_steps(images // min(config.batch_size, images))
        cells = [f"stage {step.stage + 1}", f"{step.parameters:,}"]
        cells.append("?" if count is None else f"{count:,}")
        for card in CARDS.values() if on_gpu else ():
            hours = card.lower_bound(step.kernels) / ROOFLINE_SHARE / 3600
            cells.append("?" if count is None else f"{count * hours:.2f}")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    lines[0] = f"{'stage':{widths[0]}}{lines[0][widths[0] :]}"
    if any("?" in row for row in rows):
        lines.append("?: give the number of training images, such as --images 162770 for CelebA.")
    if on_gpu:
        lines += [
            "The hours are estimates; no GPU has been measured. The bytes and operations of steps,",
            "over the published bandwidth and tensor throughput, give a lower bound of their time.",
            f"Training is assumed to reach {ROOFLINE_SHARE:.0%} of that roofline. Validation "
            "and evaluation are not included.",
        ]
    checkpoint = checkpoint_bytes(steps)
    lines += [
        "",
        f"Disk: two checkpoints of {decimal(checkpoint)} each, and a third while one is written",
    ]
    if images is not None and config.data not in NAMED_DATASETS:
        size = images * config.channels * (config.image_size or 0) ** 2
        lines.append(f"      {decimal(size)} of prepared training images, without held-out ones")
    return "\n".join(lines)


def describe_fit(
    config: RunConfig, steps: Sequence[Step], gpu_memory: int, other: Sequence[Step] | None = None
) -> str:
    """Return the lines of `mflow plan` that say what fits in the memory, and which options help.

    Args:
        steps: `walk(config)`.
        other: the same with states stored in place of rebuilt, or rebuilt in place of stored, if
            they are known.
    """
    batch, room = largest_batch(config, gpu_memory, steps), decimal(gpu_memory)
    fits = config.batch_size <= batch
    largest = f"{batch:,}" if batch else "none fits"
    lines = [f"{'Fits' if fits else 'Does not fit'} in {room}. Largest batch in {room}: {largest}"]
    if batch > config.batch_size:
        lines.append(
            "Nobody has trained with batches of that size, or tuned a learning rate for it."
        )
    other = other or walk(dataclasses.replace(config, reversible=not config.reversible))
    needed = highest(other).total
    rebuilt, stored = steps[0].kernels, other[0].kernels
    if not config.reversible:
        rebuilt, stored = stored, rebuilt
    hours = CARDS["H100"].lower_bound(rebuilt) / CARDS["H100"].lower_bound(stored) - 1
    if config.reversible and needed <= gpu_memory:
        moved = 1 - sum(k.moved for k in stored) / sum(k.moved for k in rebuilt)
        flops = 1 - sum(k.flops for k in stored) / sum(k.flops for k in rebuilt)
        lines.append(
            f"--no-reversible fits too ({decimal(needed)}). In a step of stage 1 it saves "
            f"{moved:.0%} of the bytes\nand {flops:.0%} of the operations; "
            f"by the H100's lower bounds, rebuilding takes {hours:.0%} more time."
        )
    elif config.reversible and fits:
        lines.append(f"--no-reversible does not fit: it takes {decimal(needed)}.")
    elif not config.reversible and fits:
        lines.append(
            "mflow train stores states where they fit with some room. With --reversible it takes "
            f"{decimal(needed)}\nand, by the H100's lower bounds, {hours:.0%} more time."
        )
    elif not config.reversible and needed <= gpu_memory:
        lines.append(f"--reversible fits: it takes {decimal(needed)}.")
    return "\n".join(lines)
