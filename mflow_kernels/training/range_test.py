"""A range test of the learning rate of each stage (Smith, arXiv 1506.01186, section 3.3).

Lightning's `Tuner.lr_find` does not fit here: it gives all stages one rate, and it stops when the
loss exceeds four times the best loss, which means nothing for a loss that can be negative.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mflow_kernels.data.progress import progress_bar
from mflow_kernels.runs.options import StageOptions
from mflow_kernels.training.checks import Loaded
from mflow_kernels.training.conditions import singular_means_divergence
from mflow_kernels.training.loops import resume_loops
from mflow_kernels.training.module import FlowTraining
from mflow_kernels.training.schedule import Schedule
from mflow_kernels.training.train import new_trainer

STEPS = 100  # steps of each stage, unless it diverges earlier
LOWEST, HIGHEST = 1e-5, 1.0  # range of the rates
_SMOOTHING = 0.9  # weight of the earlier losses in their running mean


class RangeTest(NamedTuple):
    """The loss of a stage at each of its growing learning rates, until it is not finite."""

    losses: tuple[float, ...]

    @property
    def best_rate(self) -> float:
        """The rate at which the running mean of the loss was lowest."""
        means = _running_means(self.losses)
        return rate_at(means.index(min(means)))

    @property
    def suggestion(self) -> float | None:
        """The suggested highest learning rate: a third of `best_rate`.

        It is lower than `best_rate` for two reasons. The running mean lags behind the loss by half
        an order of magnitude of the rate. A rate that lowers the loss for a few steps may be too
        high for many.

        The suggestion is None if it would be below every rate that was tested. The loss then rose
        from the lowest rates on.
        """
        return self.best_rate / 3 if self.best_rate >= 3 * LOWEST else None


def describe_tests(tests: Sequence[RangeTest], stages: Sequence[StageOptions]) -> str:
    """Return a table with one row per stage, and the options for training at the rates found.

    `stages` are the further flows that were tested.

    For a stage without a suggested rate, the text says what to try instead of the options.
    """
    rates = ["none" if t.suggestion is None else f"{t.suggestion:.2g}" for t in tests]
    lines = ["stage  loss lowest at rate  suggested rate"]
    for number, (test, rate) in enumerate(zip(tests, rates, strict=True), start=1):
        lines.append(f"{number:5}  {test.best_rate:19.2g}  {rate:>14}")
    for number, rate in enumerate(rates, start=1):
        if rate == "none":
            lines.append(
                f"The loss of stage {number} rose from the lowest tested rates on (from "
                f"{LOWEST:g}), so no rate can be suggested. A larger --batch-size makes its loss "
                "less noisy. Weights of --init-from that are fully trained cannot improve."
            )
    if "none" not in rates:
        first, *further = rates
        options = f"--learning-rate {first}"
        if len(further) == 1:
            options += f" --stage-learning-rate {further[0]}"
        elif further:
            pairs = zip(stages, map(float, further), strict=True)
            found = ", ".join(str(dataclasses.replace(s, learning_rate=rate)) for s, rate in pairs)
            options += f" --stages '[{found}]'"
        lines.append(f"To train with them: mflow train {options} ...")
    return "\n".join(lines)


def rate_at(step: int) -> float:
    """Return the learning rate of a step of the test."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))


def _running_means(losses: Sequence[float]) -> list[float]:
    """Return the exponential running mean of the losses, without its bias towards 0."""
    mean, means = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        means.append(mean / (1 - _SMOOTHING**count))
    return means


class _GrowingRate(Schedule):
    """A schedule in which the rate of each stage grows exponentially."""

    def learning_rate(self, stage: int, done: int) -> float:
        return rate_at(done)


class _Recorder(Callback):
    """Records the losses of one stage and its best weights; stops at a loss that is not finite."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self.losses: list[float] = []
        self.weights: dict[str, Tensor] = {}
        self._best = math.inf
        self._show = show

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training = cast(FlowTraining, pl_module)
        loss = float(training.loss)  # computed with the weights before this step
        if not math.isfinite(loss):
            trainer.should_stop = True
            return
        self.losses.append(loss)
        mean = _running_means(self.losses)[-1]
        if mean < self._best:
            self._best = mean
            state = training.model.stages[training.trained_stage].state_dict()
            self.weights = {name: value.clone() for name, value in state.items()}
        self._show(trainer.global_step)


def find_learning_rates(loaded: Loaded) -> list[RangeTest]:
    """Test learning rates for each stage in turn.

    After its test, a stage keeps the weights of its lowest loss, and the next stage is tested on
    them. Nothing is written. The model's weights change.

    Raises:
        FloatingPointError: a stage has no finite loss.
    """
    stages = [dataclasses.replace(s, epochs=None, max_steps=None) for s in loaded.config.stages]
    config = dataclasses.replace(loaded.config, max_steps=STEPS, stages=stages, loss_spike=1e30)
    training = FlowTraining(loaded.model, loaded.splits, config, schedule=_GrowingRate)
    tests = []
    with progress_bar(
        "testing learning rates", training.schedule.total_steps, unit="steps"
    ) as show:
        for number, (stage, average) in enumerate(
            zip(training.model.stages, training.averaged.stages, strict=True)
        ):
            recorder = _Recorder(show)
            trainer = new_trainer(
                loaded,
                max_steps=training.schedule.ends[number],
                callbacks=[recorder],
                logger=False,
                limit_val_batches=0,
            )
            resume_loops(trainer, training.schedule.begins[number], validates=False)
            # Divergence at a high rate is the expected end of a test.
            with contextlib.suppress(FloatingPointError), singular_means_divergence(training):
                trainer.fit(training)
            if not recorder.losses:
                raise FloatingPointError(f"the loss of stage {number + 1} is not finite")
            for each in (stage, average):
                each.load_state_dict(recorder.weights)
            tests.append(RangeTest(tuple(recorder.losses)))
    return tests
