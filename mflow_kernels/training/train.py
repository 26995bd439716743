"""`mflow train`, once the run is checked: train, draw pictures and evaluate."""

import dataclasses
import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy

from mflow_kernels import HierarchicalFlow
from mflow_kernels.data.files import remove_temporary
from mflow_kernels.data.printable import printable
from mflow_kernels.evaluation.likelihood import evaluate_model
from mflow_kernels.evaluation.pictures import COLUMNS, draw_curves, draw_images
from mflow_kernels.evaluation.samples import draw_projections, draw_samples, samples_by_temperature
from mflow_kernels.ops.fastest import choices
from mflow_kernels.runs.changes import record_changes
from mflow_kernels.runs.checkpoints import METRICS
from mflow_kernels.runs.folder import EVALUATION, create_run
from mflow_kernels.training.callbacks import MetricsCsv, TrainingProgress, read_metrics
from mflow_kernels.training.checkpoints import CheckpointFiles, Checkpoints
from mflow_kernels.training.checks import CheckedRun, Loaded
from mflow_kernels.training.compilation import compile_kernels
from mflow_kernels.training.conditions import singular_means_divergence
from mflow_kernels.training.coupling_networks import compile_networks
from mflow_kernels.training.loops import resume_loops
from mflow_kernels.training.module import FlowTraining


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
            images = run.splits.test
            evaluation = evaluate_model(model, images, config.n_bits, data=config.data_name)
        evaluation.write(run.folder / EVALUATION)
        evaluation.print()
    except (SystemExit, OSError):
        name = shlex.quote(printable(str(run.folder)))
        print(
            f"interrupted; mflow train --resume --run-dir {name} continues the run", file=sys.stderr
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
    world, local = run.ranks.world, run.ranks.local
    if run.device.type == "cuda" and run.ranks.rank % local == 0:
        # The other ranks of this machine wait for this one where `fit` connects them.
        own = dataclasses.replace(config, batch_size=config.batch_size // world)
        compile_kernels(own, run.device)
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
    if run.ranks.rank == 0 and run.device.type == "cuda":
        for network, choice in choices(run.device, stored=False).items():
            print(f"coupling network, {network}: {choice}", file=sys.stderr)
    return training.averaged


def new_trainer(loaded: Loaded, **options: Any) -> Trainer:
    """Return a Trainer for a run's device and ranks, without Lightning's own output and files."""
    _silence_lightning()
    ranks = loaded.ranks
    return Trainer(
        accelerator="gpu" if loaded.device.type == "cuda" else "cpu",
        devices=ranks.local,
        num_nodes=ranks.world // ranks.local,
        # Buffers are equal on all ranks.
        strategy=DDPStrategy(broadcast_buffers=False) if ranks.world > 1 else "auto",
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
    rows = {
        name: draw_samples(model, COLUMNS, 1.0, run.config.seed, count)
        for name, count in (("before", 1), ("after", len(model.stages)))
    }
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
