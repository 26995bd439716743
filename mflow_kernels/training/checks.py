"""The checks of `mflow train`: everything that can fail before the first step, without writing."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from filelock import FileLock

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, VectorFlow
from mflow_kernels.data.files import check_is_text, follow_links, lock_folder
from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.data.printable import printable
from mflow_kernels.data.splits import Splits, load_splits
from mflow_kernels.runs.changes import Change, changed_options
from mflow_kernels.runs.checkpoints import METRICS, Checkpoint, Expected, newest_checkpoint
from mflow_kernels.runs.config import RunConfig, TrainConfig, check_precision
from mflow_kernels.runs.folder import (
    build_model,
    check_new_run,
    checkpoint_tensors,
    initialize_from,
    pick_device,
    read_config,
    read_manifest,
)
from mflow_kernels.training.callbacks import read_metrics
from mflow_kernels.training.memory import choose_states
from mflow_kernels.training.muon import moments_of
from mflow_kernels.training.schedule import Schedule


class Ranks(NamedTuple):
    """Place of this process among those that train together: its rank, the number of processes, and
    the number of processes on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 1

    @classmethod
    def of_this_process(cls) -> "Ranks":
        """Read the environment of torchrun; without torchrun, this process is the only one."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


@dataclass(frozen=True)
class Loaded:
    """The start of training: options that passed every check, images and a model."""

    config: RunConfig
    splits: Splits
    model: HierarchicalFlow
    device: torch.device
    ranks: Ranks


@dataclass(frozen=True)
class CheckedRun(Loaded):
    """A run that passed every check. Nothing is written yet."""

    folder: Path
    resumes: bool  # continue the run in an existing folder
    lock: FileLock | None  # held on an existing run folder, by rank 0
    checkpoint: Checkpoint | None  # checkpoint to resume from
    changes: Sequence[Change] = ()  # options that change on resume

    @property
    def first_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def load(config: TrainConfig) -> Loaded:
    """Check the options, load the images and build the model, with the weights of --init-from.

    Raises:
        ValueError: a value is bad, or the data cannot be read.
    """
    device, ranks = _check_options(config)
    loaded = _load(config, device, ranks)
    if loaded.config.init_from is not None:
        _initialize(loaded, loaded.config.init_from)
    return loaded


def _initialize(loaded: Loaded, folder: str) -> None:
    warning = initialize_from(loaded.model, folder)
    if warning is not None and not loaded.ranks.rank:
        print(f"warning: {printable(warning)}", file=sys.stderr)


def check_run(
    config: TrainConfig, folder: Path, *, overwrite: bool = False, resume: bool = False
) -> CheckedRun:
    """Check everything that can be checked before training, without writing anything.

    Raises:
        ValueError: a value is bad; the data cannot be read; the run folder exists (or, to resume,
            does not exist), cannot be written or is in use by another process. On resume also: an
            option differs that may not change, the checkpoint does not fit the run, or the images
            differ from those that the run was trained on.
    """
    if overwrite and resume:
        raise ValueError("resume: expected either --resume or --overwrite, got both")
    device, ranks = _check_options(config)
    folder = follow_links(folder, "run_dir")
    check_is_text(folder, "run_dir")  # TensorBoard takes no other path
    recorded = read_config(folder, "run_dir") if resume else None
    lock = None
    if ranks.rank == 0:
        if not resume:
            check_new_run(folder, overwrite)
            images = Path(os.path.realpath(config.data))
            if config.data not in NAMED_DATASETS and images in folder.parents:
                # The next run would take the run's pictures for images.
                raise ValueError(
                    f"run_dir: expected a folder outside of the images' folder, got {folder}"
                )
        if folder.exists():
            lock = lock_folder(folder, "run_dir")
    try:
        loaded = _load(config, device, ranks)
        checkpoint = None
        changes: list[Change] = []
        if recorded is not None:
            changes = changed_options(loaded.config, recorded)
            checkpoint = _resumable(folder, loaded.model, loaded.splits, recorded)
        if loaded.config.init_from is not None and checkpoint is None:
            _initialize(loaded, loaded.config.init_from)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return CheckedRun(
        **vars(loaded),
        folder=folder,
        resumes=resume,
        lock=lock,
        checkpoint=checkpoint,
        changes=changes,
    )


def _check_options(config: TrainConfig) -> tuple[torch.device, Ranks]:
    config.check()
    ranks = Ranks.of_this_process()
    if config.batch_size % ranks.world:
        raise ValueError(
            f"batch_size: expected a multiple of the {ranks.world} processes that share it, "
            f"got {config.batch_size}"
        )
    device = pick_device(config.device)
    check_precision(config.precision, device.type)
    return device, ranks


def _load(config: TrainConfig, device: torch.device, ranks: Ranks) -> Loaded:
    splits = load_splits(config.data, config.image_size, config.classes)
    resolved = config.resolve(splits.train.image_shape, splits.crop, splits.class_names)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        choose_states(resolved, config, memory, ranks.world)
    model = build_model(resolved)
    _check_batches(resolved, model, splits)
    return Loaded(resolved, splits, model, device, ranks)


def describe_resume(run: CheckedRun) -> str:
    """Return one line for each change of an option, and one with the steps that are left."""
    step = run.first_step
    lines = [f"from step {step:,} on: {change}" for change in run.changes]
    start = run.checkpoint.progress if run.checkpoint else None
    schedule = Schedule(run.config, len(run.splits.train), start)
    stage, total = schedule.stage_of(step), schedule.total_steps
    if step == total:
        stage_options = (
            "--stage-epochs or --stage-max-steps" if stage else "--epochs or --max-steps"
        )
        lines.append(
            f"the run has taken all of its {total:,} steps; larger {stage_options} lengthen its "
            "last stage"
        )
    else:
        lines.append(f"continuing from step {step:,} of {total:,}, in stage {stage + 1}")
    return "\n".join(lines)


def _resumable(
    folder: Path, model: HierarchicalFlow, splits: Splits, config: RunConfig
) -> Checkpoint | None:
    """Load the checkpoint to resume from. Raise ValueError if a file in the folder does not fit the
    run, or if the images differ from those that the run was trained on."""
    manifest = read_manifest(folder)
    different = splits.manifest.difference(manifest) if manifest else None
    if different:
        raise ValueError(
            f"data: expected the images that the run was trained on, but these differ: {different}"
        )
    read_metrics(folder / METRICS)
    moments = [found for stage in model.stages for found in moments_of(stage, config.optimizer)]
    expected = Expected(checkpoint_tensors(model), moments, len(model.stages), len(splits.train))
    return newest_checkpoint(folder, expected)


def _check_batches(config: RunConfig, model: HierarchicalFlow, splits: Splits) -> None:
    """Raise ValueError if a batch is too small to initialize a stage's actnorm, which needs two
    values of each channel. Otherwise a later stage would fail only when its training starts."""
    images = min(config.batch_size, len(splits.train))
    for number, stage in enumerate(cast(list[ManifoldFlow], list(model.stages)), start=1):
        shapes = cast(Glow | VectorFlow, stage.flow).latent_shapes
        positions = min(math.prod(shape[1:]) for shape in shapes)
        if images * positions < 2:
            cause = "" if images == config.batch_size else ", the number of training images"
            raise ValueError(
                f"batch_size: expected at least 2 images in a step, because stage {number} "
                f"initializes its scales from them, got {images}{cause}"
            )
