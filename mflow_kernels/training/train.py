"""`mflow train`: everything from a configuration to a run folder with its pictures and figures."""

import logging
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from filelock import FileLock
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, VectorFlow
from mflow_kernels.data.files import follow_links, lock_folder, remove_temporary
from mflow_kernels.data.splits import Splits, load_splits
from mflow_kernels.evaluation.likelihood import evaluate_model
from mflow_kernels.evaluation.pictures import draw_curves, draw_images, draw_residuals
from mflow_kernels.evaluation.samples import TEMPERATURES, draw_samples, project_images
from mflow_kernels.runs.checkpoints import (
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
    EVALUATION,
    METRICS,
    build_model,
    changed_options,
    check_new_run,
    checkpoint_tensors,
    create_run,
    pick_device,
    read_config,
    read_manifest,
    record_config,
)
from mflow_kernels.training.callbacks import MetricsCsv, ProgressReport, read_metrics
from mflow_kernels.training.module import (
    FlowTraining,
    compile_networks,
    explaining_singular,
    parameter_groups,
    resume_loops,
)

_COLUMNS = 12


class Ranks(NamedTuple):
    """The processes that train together: this one's rank, how many, and how many of them here."""

    rank: int = 0
    world: int = 1
    local: int = 1

    @classmethod
    def of_this_process(cls) -> "Ranks":
        """As torchrun says; one alone without it."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


@dataclass(frozen=True)
class Plan:
    """A run that passed every check: nothing is written yet."""

    folder: Path
    config: RunConfig
    splits: Splits
    model: HierarchicalFlow
    device: torch.device
    ranks: Ranks
    resumes: bool  # the run folder exists and is to be continued
    lock: FileLock | None  # of the run folder that is resumed or replaced
    checkpoint: Checkpoint | None  # to go on from

    @property
    def first_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def plan_run(
    config: TrainConfig, folder: Path, *, overwrite: bool = False, resume: bool = False
) -> Plan:
    """Check everything that can go wrong before a step is taken, and write nothing.

    Raises:
        ValueError: any bad value, unreadable data, a run folder that exists (or, to resume, that
            does not), that cannot be written or that another process writes, a checkpoint that
            does not belong to it, other images than the run was trained on.
    """
    if overwrite and resume:
        raise ValueError("resume: expected either --resume or --overwrite, got both")
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
    folder = follow_links(folder, "run_dir")
    recorded = read_config(folder, "run_dir") if resume else None
    lock = None
    if ranks.rank == 0:
        if not resume:
            check_new_run(folder, overwrite)
        if folder.exists():
            lock = lock_folder(folder, "run_dir")
    try:
        splits = load_splits(config.data, config.image_size)
        resolved = config.resolve(splits.train.image_shape)
        model = build_model(resolved)
        _check_batches(resolved, model, splits)
        checkpoint = None
        if recorded is not None:
            changed = changed_options(resolved, recorded)
            if changed:
                raise ValueError(changed)
            checkpoint = _resumable(folder, model, splits, resolved)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return Plan(folder, resolved, splits, model, device, ranks, resume, lock, checkpoint)


def _resumable(
    folder: Path, model: HierarchicalFlow, splits: Splits, config: RunConfig
) -> Checkpoint | None:
    """The checkpoint of a run folder to resume from; ValueError if there is something in the
    folder that the run would not have written, or the images are others."""
    then = read_manifest(folder)
    different = splits.manifest.difference(then) if then else None
    if different:
        raise ValueError(
            f"data: expected the images that the run was trained on, but since then {different}"
        )
    read_metrics(folder / METRICS)
    groups = [group for stage in model.stages for group in parameter_groups(stage)]
    expected = Expected(
        checkpoint_tensors(model),
        [parameter for group in groups for parameter in group],
        FlowTraining(model, splits, config).total_steps,
    )
    return newest_checkpoint(folder, expected)


def _check_batches(config: RunConfig, model: HierarchicalFlow, splits: Splits) -> None:
    """ValueError if a stage could not take actnorm's scales from a batch: it needs two values of
    each channel. A later stage would only fail when its turn comes."""
    images = min(config.batch_size, len(splits.train))
    for number, stage in enumerate(cast(list[ManifoldFlow], list(model.stages)), start=1):
        shapes = cast(Glow | VectorFlow, stage.flow).latent_shapes
        positions = min(math.prod(shape[1:]) for shape in shapes)
        if images * positions < 2:
            cause = "" if images == config.batch_size else ", which is all there are to train on"
            raise ValueError(
                f"batch_size: expected at least 2 images in a step, from which stage {number} "
                f"takes its first scales, got {images}{cause}"
            )


def run(plan: Plan) -> list[Path]:
    """Train (or go on training) all stages, then draw and evaluate into the run folder.

    Returns:
        The pictures; of several ranks the first draws and evaluates alone.

    Raises:
        FolderError: the run folder could not be made.
        FloatingPointError: too many steps in a row were skipped, or rebuilt states drifted; the
            last checkpoint stays.
        OSError: a file could not be written, as on a full disk; the last checkpoint stays.
        SystemExit: on SIGTERM or SIGINT, after a checkpoint.
    """
    if plan.ranks.rank:
        _fit(plan)
        return []
    lock = plan.lock
    if not plan.resumes or lock is None:
        lock = create_run(plan.folder, plan.config, plan.splits.manifest, plan.lock)
    try:
        if plan.resumes:
            remove_temporary(plan.folder)
            record_config(plan.folder, plan.config)
        model = _fit(plan).to(plan.device).eval()
        config = plan.config
        with explaining_singular(model):
            pictures = _draw(plan, model)
            evaluation = evaluate_model(
                model, plan.splits.test, config.n_bits, data=config.data_name, device=plan.device
            )
        evaluation.write(plan.folder / EVALUATION)
        evaluation.print()
    finally:
        lock.release()
    return pictures


def _fit(plan: Plan) -> HierarchicalFlow:
    """Train, and return the averaged model."""
    config = plan.config
    training = FlowTraining(plan.model, plan.splits, config, plan.checkpoint)
    if config.compile:
        compile_networks(plan.model)
    loggers: list[Logger] = []
    reports: list[Callback] = []
    if plan.ranks.rank == 0:
        loggers.append(MetricsCsv(plan.folder / METRICS, plan.first_step))
        loggers.append(TensorBoardLogger(plan.folder, name="", version="tensorboard"))
        reports.append(ProgressReport())
    _quieten_lightning()
    trainer = Trainer(
        accelerator="gpu" if plan.device.type == "cuda" else "cpu",
        devices=plan.ranks.local,
        num_nodes=plan.ranks.world // plan.ranks.local,
        # Stages that are not trained have no gradients; buffers are the same everywhere.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
        if plan.ranks.world > 1
        else "auto",
        max_steps=training.total_steps,
        max_epochs=-1,
        val_check_interval=training.validation_interval,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=training.log_interval,
        default_root_dir=plan.folder,
        logger=loggers,
        callbacks=[
            *reports,
            Checkpoints(plan.folder, config.save_minutes, config.save_steps, plan.checkpoint),
        ],
        plugins=[CheckpointFiles()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    validates = False
    if plan.checkpoint is not None:
        # A checkpoint is written before validation, which may not have come to its end. Repeated,
        # it gives the same figures.
        step = plan.first_step
        validates = step > 0 and step % training.validation_interval == 0
        resume_loops(trainer, step, validates)
    with explaining_singular(training):
        trainer.fit(training)
        if validates and plan.first_step == training.total_steps:  # `fit` had nothing to do
            trainer.validate(training, verbose=False)
    return training.averaged


def _draw(plan: Plan, model: HierarchicalFlow) -> list[Path]:
    folder = plan.folder
    paths = [folder / f"{name}.png" for name in ("curves", "samples", "projections", "hierarchy")]
    curves, samples, projections, hierarchy = paths
    draw_curves(curves, read_metrics(folder / METRICS))
    draw_images(
        samples,
        "Samples on the manifold at several temperatures",
        {f"T = {t}": draw_samples(model, _COLUMNS, t, plan.config.seed) for t in TEMPERATURES},
    )
    test = plan.splits.test
    originals = test.batch(range(min(_COLUMNS, len(test))))
    draw_residuals(
        projections,
        f"Held-out images and their projections on the {plan.config.manifold_dim}-dimensional "
        "manifold",
        originals,
        project_images(model, originals, stages=1),
    )
    if len(model.stages) == 1:
        return paths[:-1]
    rows = {}
    for temperature in (0.7, 1.0):
        for count, name in ((1, "before"), (len(model.stages), "after")):
            images = draw_samples(model, _COLUMNS, temperature, plan.config.seed, count)
            rows[f"{name}, T = {temperature}"] = images
    draw_images(hierarchy, "Samples before and after the hierarchical stages", rows)
    return paths


def _quieten_lightning() -> None:
    """Hide what Lightning says of itself and of torch; warnings about real trouble stay."""
    for name in (
        "lightning.pytorch",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.distributed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # the averaged model
        ".*The dirpath has changed from.*",  # a run folder that was moved, then resumed
        ".*sync_dist=True.*",  # what is logged of several ranks is the same on all
        ".*broadcast_buffers. is deprecated.*",  # torch 2.9 has no other name for it
    ):
        warnings.filterwarnings("ignore", message)
