"""The counters of Lightning's training loop."""

from lightning.pytorch import Trainer


def resume_loops(trainer: Trainer, step: int, validates: bool) -> None:
    """Set the counters of a new trainer to their values after `step` steps.

    The counters that Lightning saves in a checkpoint depend on the hook that wrote it. They would
    shift validation by one step.

    Args:
        trainer: the trainer, before `fit`.
        step: optimizer steps taken.
        validates: whether to validate first.
    """
    epochs, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs.epoch_progress.increment_ready()
    epochs.epoch_progress.increment_started()
    batches.batch_progress.increment_by(step)
    batches.scheduler_progress.increment_by(step)
    optimizer = batches.automatic_optimization.optim_progress.optimizer
    optimizer.step.increment_by(step)
    optimizer.zero_grad.increment_by(step)
    if validates:  # set the counters as if validation had been interrupted
        batches.val_loop.batch_progress.increment_ready()
        batches.val_loop.batch_progress.increment_started()
    epochs.restarting = True
