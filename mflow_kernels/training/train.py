"""`mflow train`: from a configuration to a run folder with checkpoints, pictures and metrics."""

import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from filelock import FileLock
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, VectorFlow
from mflow_kernels.data.files import follow_links, lock_folder, remove_temporary
from mflow_kernels.data.printable import printable
from mflow_kernels.data.splits import Splits, load_splits
from mflow_kernels.evaluation.likelihood import evaluate_model
from mflow_kernels.evaluation.pictures import COLUMNS, draw_curves, draw_images
from mflow_kernels.evaluation.samples import (
    draw_projections,
    draw_samples,
    samples_by_temperature,
)
from mflow_kernels.runs.checkpoints import (
    METRICS,
    Checkpoint,
    CheckpointFiles,
    Checkpoints,
    Expected,
    newest_checkpoint,
)
from mflow_kernels.runs.config import (
    RunConfig,
    TrainConfig,
    check_cuda_graphs,
    check_precision,
)
from mflow_kernels.runs.folder import (
    CONFIG,
    EVALUATION,
    Change,
    build_model,
    changed_options,
    check_new_run,
    checkpoint_tensors,
    create_run,
    initialize_from,
    pick_device,
    read_config,
    read_manifest,
    record_changes,
)
from mflow_kernels.training.callbacks import MetricsCsv, TrainingProgress, read_metrics
from mflow_kernels.training.loops import resume_loops
from mflow_kernels.training.module import (
    FlowTraining,
    compile_networks,
    parameter_groups,
    singular_means_divergence,
)
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
        initialize_from(loaded.model, loaded.config.init_from)
    return loaded


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
    recorded = read_config(folder, "run_dir") if resume else None
    lock = None
    if ranks.rank == 0:
        if not resume:
            check_new_run(folder, overwrite)
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
            initialize_from(loaded.model, loaded.config.init_from)
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
    check_cuda_graphs(config.cuda_graphs, device.type)
    return device, ranks


def _load(config: TrainConfig, device: torch.device, ranks: Ranks) -> Loaded:
    splits = load_splits(config.data, config.image_size, config.classes)
    resolved = config.resolve(splits.train.image_shape, splits.crop, splits.class_names)
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
    groups = [group for stage in model.stages for group in parameter_groups(stage)]
    expected = Expected(
        checkpoint_tensors(model),
        [parameter for group in groups for parameter in group],
        len(model.stages),
        len(splits.train),
    )
    checkpoint = newest_checkpoint(folder, expected)
    if checkpoint is None or checkpoint.progress is not None:
        return checkpoint
    # An earlier version wrote it. Options could not change then.
    schedule = Schedule(config, len(splits.train))
    if checkpoint.step > schedule.total_steps:
        raise ValueError(
            f"checkpoint: expected at most {schedule.total_steps} steps as in {CONFIG}, "
            f"got {checkpoint.step} in {checkpoint.path}"
        )
    return checkpoint._replace(progress=schedule.progress(checkpoint.step))


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


def train_and_evaluate(run: CheckedRun) -> list[Path]:
    """Train all stages, or continue training them; then draw pictures and evaluate the model.

    Returns:
        The paths of the pictures. Only rank 0 draws and evaluates; other ranks return an empty
        list.

    Raises:
        FolderError: the run folder could not be created.
        FloatingPointError: too many steps in a row were skipped, or rebuilt states drifted. The
            last checkpoint remains.
        OSError: a file could not be written, for example because the disk is full. The last
            checkpoint remains.
        SystemExit: SIGTERM or SIGINT arrived. If steps were being trained, a checkpoint was
            written first.

    After an OSError or SystemExit, a line on stderr says how to continue.
    """
    if run.ranks.rank:
        _fit(run)
        return []
    lock = run.lock
    if not run.resumes or lock is None:
        lock = create_run(run.folder, run.config, run.splits.manifest, run.lock)
    try:
        if run.resumes:
            remove_temporary(run.folder)
            record_changes(run.folder, run.config, run.changes, run.first_step)
        model = _fit(run).to(run.device).eval()
        config = run.config
        with singular_means_divergence(model):
            pictures = _draw(run, model)
            evaluation = evaluate_model(
                model, run.splits.test, config.n_bits, data=config.data_name, device=run.device
            )
        evaluation.write(run.folder / EVALUATION)
        evaluation.print()
    except (SystemExit, OSError):
        name = shlex.quote(printable(str(run.folder)))
        print(
            f"interrupted; mflow train --resume --run-dir {name} continues the run",
            file=sys.stderr,
        )
        raise
    finally:
        lock.release()
    return pictures


def _fit(run: CheckedRun) -> HierarchicalFlow:
    """Train the model and return it with averaged weights."""
    config = run.config
    training = FlowTraining(run.model, run.splits, config, run.checkpoint)
    if config.compile:
        compile_networks(run.model)
    schedule, step = training.schedule, run.first_step
    # The checkpoint was written before validation, which may have been interrupted. Validation
    # gives the same numbers when it runs again.
    validates = step > 0 and step % schedule.validation_interval == 0
    loggers: list[Logger] = []
    progress: list[Callback] = []
    if run.ranks.rank == 0:
        loggers.append(MetricsCsv(run.folder / METRICS, step, validates))
        loggers.append(TensorBoardLogger(run.folder, name="", version="tensorboard"))
        progress.append(TrainingProgress())
    checkpoints = Checkpoints(run.folder, config.save_minutes, config.save_steps, run.checkpoint)
    trainer = new_trainer(
        run,
        max_steps=schedule.total_steps,
        val_check_interval=schedule.validation_interval,
        log_every_n_steps=training.log_interval,
        default_root_dir=run.folder,
        logger=loggers,
        callbacks=[*progress, checkpoints],
        plugins=[CheckpointFiles()],
    )
    if run.checkpoint is not None:
        resume_loops(trainer, step, validates)
    with singular_means_divergence(training):
        trainer.fit(training)
        if validates and step == schedule.total_steps:  # `fit` has no step left
            trainer.validate(training, verbose=False)
    return training.averaged


def new_trainer(loaded: Loaded, **options: Any) -> Trainer:
    """Return a Trainer for a run's device and ranks, without Lightning's own output and files."""
    _silence_lightning()
    ranks = loaded.ranks
    return Trainer(
        accelerator="gpu" if loaded.device.type == "cuda" else "cpu",
        devices=ranks.local,
        num_nodes=ranks.world // ranks.local,
        # Stages that are not trained have no gradients. Buffers are equal on all ranks.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
        if ranks.world > 1
        else "auto",
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _draw(run: CheckedRun, model: HierarchicalFlow) -> list[Path]:
    folder = run.folder
    paths = [folder / f"{name}.png" for name in ("curves", "samples", "projections", "hierarchy")]
    curves, samples, projections, hierarchy = paths
    draw_curves(curves, read_metrics(folder / METRICS))
    draw_images(samples, *samples_by_temperature(model, COLUMNS, run.config.seed))
    title = (
        f"Held-out images and their projections on the {run.config.manifold_dim}-dimensional "
        "manifold"
    )
    draw_projections(projections, title, model, run.splits.test, stages=1)
    if len(model.stages) == 1:
        return paths[:-1]
    rows = {}
    for temperature in (0.7, 1.0):
        for count, name in ((1, "before"), (len(model.stages), "after")):
            images = draw_samples(model, COLUMNS, temperature, run.config.seed, count)
            rows[f"{name}, T = {temperature}"] = images
    draw_images(hierarchy, "Samples before and after the hierarchical stages", rows)
    return paths


def _silence_lightning() -> None:
    """Hide Lightning's messages and harmless warnings. Other warnings remain visible."""
    for name in (
        "lightning.pytorch",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.distributed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # the averaged model
        ".*The dirpath has changed from.*",  # a run folder that was moved before it was resumed
        ".*sync_dist=True.*",  # logged values are equal on all ranks already
        ".*broadcast_buffers. is deprecated.*",  # torch 2.9 knows no other option
    ):
        warnings.filterwarnings("ignore", message)
