"""The commands of `mflow` that prepare images and train. Docstrings are the help texts.

A command checks its input and returns a function that does the work. Bad input therefore stops it
before anything is written, and an error during the work is not mistaken for bad input. Commands
import torch and Lightning inside the functions, so that --help is fast. `run_commands` has the
commands that read a trained run.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflow_kernels.data.printable import counted, printable
from mflow_kernels.runs.options import check_at_least

if TYPE_CHECKING:
    from mflow_kernels.runs.config import TrainConfig

Work = Callable[[], None]


def train(
    options: dict[str, Any],
    run_dir: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    find_learning_rate: bool = False,
    preset: str | None = None,
) -> Work:
    """Train a manifold flow on images.

    Without options, trains on handwritten digits in a few minutes on a CPU. Writes a run folder
    with the configuration, metrics (CSV and TensorBoard), a checkpoint, pictures and an evaluation.

    Args:
        run_dir: Folder to write; by default a folder in runs/, named after the options.
        overwrite: Replace the run folder if it exists.
        resume: Continue the run in the run folder from its last checkpoint.
        find_learning_rate: Do not train. Test increasing learning rates over 100 steps of each
            stage, and print a suggested rate for each.
        preset: Name of a preset (mflow presets lists them) or a YAML file with options; options on
            the command line override it.
    """
    from mflow_kernels.runs.config import TrainConfig

    config = TrainConfig(**options)
    folder = Path(run_dir or config.default_run_dir())
    if find_learning_rate:
        return _find_learning_rate(config, resume=resume)

    from mflow_kernels.training.checks import check_run, describe_resume
    from mflow_kernels.training.interrupts import exit_on_signals
    from mflow_kernels.training.train import train_and_evaluate

    checked = check_run(config, folder, overwrite=overwrite, resume=resume)

    def work() -> None:
        if not checked.ranks.rank:
            report_skipped(checked.splits.skipped)
            if checked.resumes:
                print(describe_resume(checked), file=sys.stderr)
        with exit_on_signals():
            pictures = train_and_evaluate(checked)
        if not pictures:  # only rank 0 draws
            return
        print(f"\nRun folder: {printable(str(folder))}\nPictures:")
        for picture in pictures:
            print(f"  {printable(str(picture))}")

    return work


def _find_learning_rate(config: "TrainConfig", resume: bool) -> Work:
    from mflow_kernels.training.checks import load
    from mflow_kernels.training.interrupts import exit_on_signals
    from mflow_kernels.training.range_test import describe_tests, find_learning_rates

    if resume:
        raise ValueError(
            "find_learning_rate: expected a new run, got --resume (--init-from RUN tests rates "
            "from the weights of a run)"
        )
    loaded = load(config)
    if loaded.ranks.world > 1:
        raise ValueError(
            f"find_learning_rate: expected one process, got {loaded.ranks.world} of torchrun"
        )

    def work() -> None:
        try:
            with exit_on_signals():
                tests = find_learning_rates(loaded)
        except SystemExit:
            print("interrupted; nothing was written", file=sys.stderr)
            raise
        print(describe_tests(tests, loaded.config.stages))

    return work


def prepare(
    data: str, out: str, overwrite: bool, image_size: int = 64, workers: int | None = None
) -> Work:
    """Decode and resize a data set into one file that training reads without decoding.

    Give that file to --data of the other commands. If preparation is interrupted, the same command
    continues it. If the file is complete, the command verifies it.

    Args:
        data: Folder or zip of images; CelebA as downloaded keeps its official partition.
        out: File to write, such as celeba64.safetensors.
        overwrite: Replace the file if it exists.
        image_size: Side of the square images in pixels.
        workers: Number of threads that decode; by default one for each core.
    """
    from mflow_kernels.data.files import follow_links
    from mflow_kernels.data.prepare import is_prepared_from, prepare_images
    from mflow_kernels.data.prepared import is_prepared, open_prepared
    from mflow_kernels.data.progress import progress_bar
    from mflow_kernels.data.sources import find_images

    path = follow_links(Path(out), "out")
    check_at_least("image_size", image_size, 1)
    if workers is not None:
        check_at_least("workers", workers, 1)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"out: expected a folder that can be written, got {Path(out).parent}")
    images = Path(os.path.realpath(data))
    if path.is_dir() or images in (path, *path.parents):
        raise ValueError(f"out: expected a file outside of the images' folder, got {out!r}")
    if path.exists() and overwrite and not is_prepared(path):
        raise ValueError(
            f"out: expected a file of mflow prepare to overwrite, got another kind: {out}"
        )
    source = find_images(data)
    complete = not overwrite and is_prepared_from(path, source, image_size)
    if path.exists() and not complete and not overwrite:
        raise ValueError(
            f"out: {out} exists and was not made from these images at {image_size}x{image_size} "
            "(--overwrite replaces it)"
        )

    def work() -> None:
        if complete:
            prepared = open_prepared(path)
            with progress_bar("checking", len(prepared.images)) as progress:
                prepared.verify(progress)
            print("the file is complete; every image is intact")
        else:
            try:
                prepared = prepare_images(source, path, image_size, workers, overwrite)
            except KeyboardInterrupt:
                print("interrupted; the same command continues the preparation", file=sys.stderr)
                raise SystemExit(128 + signal.SIGINT) from None
        print(prepared.summary())

    return work


def plan(
    options: dict[str, Any],
    gpu_memory: str | None = None,
    channels: int | None = None,
    images: int | None = None,
    preset: str | None = None,
) -> Work:
    """Predict the memory, steps, disk and hours that training needs.

    Takes the options of mflow train, allocates nothing and reads no image. Give a file of mflow
    prepare or the name of a data set as --data. For a folder or zip, give --image-size and
    --channels too, and without data also --images.

    Args:
        gpu_memory: Also find the largest batch that fits a GPU of this size, e.g. 80GB.
        channels: Colour channels of the images; by default 3, or those of the named data set.
        images: Number of training images; by default that of the data, for which every file in a
            folder or zip counts as an image.
        preset: Name of a preset (mflow presets lists them) or a YAML file with options; options on
            the command line override it.
    """
    import dataclasses

    import torch

    from mflow_kernels.data.prepared import is_prepared, open_prepared
    from mflow_kernels.data.splits import count_training_images
    from mflow_kernels.runs.config import TrainConfig
    from mflow_kernels.training.memory import choose_states, resolve_config, walk
    from mflow_kernels.training.plan import (
        describe_fit,
        describe_peak,
        describe_training,
        parse_memory,
    )

    if images is not None:
        check_at_least("images", images, 1)
    room = None if gpu_memory is None else parse_memory(gpu_memory)
    if options["data"] and is_prepared(path := Path(options["data"])):
        form = open_prepared(path).record.format
        options["image_size"] = options["image_size"] or form.size
        channels = channels if channels is not None else form.channels
    data = options["data"] or ""
    config = TrainConfig(**{**options, "data": data})
    if images is None:
        images = count_training_images(data)
    there = config.device == "auto" and torch.cuda.is_available()
    gpu = room is not None or config.device == "cuda" or there
    resolved = resolve_config(config, channels, gpu=gpu)
    memory, stored = room, None
    if memory is None and there:
        memory = torch.cuda.get_device_properties(0).total_memory
    if memory is not None:
        stored = choose_states(resolved, config, memory, processes=1)
    steps = walk(resolved) if stored is None or resolved.reversible else stored
    parts = [describe_peak(resolved, steps)]
    if not gpu and config.device != "cpu":  # the hours are those of GPUs, which this machine lacks
        on_gpu = dataclasses.replace(resolved, device="cuda")
        parts.append(describe_training(on_gpu, walk(on_gpu), images))
    else:
        parts.append(describe_training(resolved, steps, images))
    if room is not None:
        other = stored if resolved.reversible else None
        parts.append(describe_fit(resolved, steps, room, other))
    return lambda: print("\n\n".join(parts))


def presets(name: str | None = None) -> Work:
    """Print a preset of mflow train, or the names of all presets.

    Args:
        name: Preset to print; by default all names are listed.
    """
    from mflow_kernels.runs.presets import PRESETS, preset_text

    text = "\n".join(PRESETS) if name is None else preset_text(name).rstrip()
    return lambda: print(text)


def report_skipped(skipped: Sequence[str]) -> None:
    """Print the names of files that could not be read as images, if there are any."""
    if skipped:
        names = ", ".join(map(printable, skipped[:5]))
        more = ", ..." if len(skipped) > 5 else ""
        files = counted(len(skipped), "file")
        print(f"skipped {files} that cannot be read: {names}{more}", file=sys.stderr)
