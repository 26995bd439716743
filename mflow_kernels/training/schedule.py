"""Which steps train which stage, on which images and at which learning rate.

The options may change when a run resumes. A checkpoint therefore records its progress, and the
schedule is a function of that progress and of the options from then on.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.progress import Progress

_FINAL_RATE = 0.02  # learning rate at the end of a stage, as a fraction of the highest


class Schedule:
    """Assigns steps to stages and images to steps.

    Stages that have ended by `start` keep their steps. The stage in training ends after its epochs
    or steps, counted from its beginning; it ends at once if it has already had that many.

    Args:
        config: options from `start` on.
        images: number of training images.
        start: progress at the step where training starts or resumes.

    Attributes:
        begins, ends: the first step of each stage, and the step after its last.
        validation_interval: number of steps between two validations.
    """

    def __init__(self, config: TrainConfig, images: int, start: Progress | None = None) -> None:
        self._config, self._start = config, (start := start or Progress())
        self._highest_rates = [stage.learning_rate for stage in config.flows]
        self._images = images
        self._batch = min(config.batch_size, images)
        self._per_pass = per_pass = images // self._batch
        current = len(start.begins) - 1
        self.begins = [*start.begins]
        self.ends = [*start.begins[1:]]
        for number, stage in enumerate(config.flows[current:], start=current):
            steps = stage.optimizer_steps(per_pass)
            if number > current:
                self.begins.append(self.ends[-1])
            elif stage.max_steps is None:
                left = math.ceil((stage.epochs - start.passes) * per_pass)
                steps = start.step - start.begins[-1] + max(0, left)
            self.ends.append(max(start.step, self.begins[-1] + steps))
        self.validation_interval = min(per_pass, *map(self.steps, range(len(self.ends))))

    @property
    def total_steps(self) -> int:
        return self.ends[-1]

    def steps(self, stage: int) -> int:
        """Return the number of steps of a stage."""
        return self.ends[stage] - self.begins[stage]

    def stage_of(self, step: int) -> int:
        """Return the stage that a step trains; the last one for steps after the end."""
        return next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)

    def active(self, stage: int) -> list[int]:
        """Return the stages whose weights change while `stage` is trained."""
        return list(range(stage + 1)) if self._config.release else [stage]

    def rate_of(self, stage: int) -> Callable[[int], float]:
        """Return the learning rate of a stage's weights as a function of the step."""

        def rate(step: int) -> float:
            trained = self.stage_of(step)
            if step >= self.total_steps or stage not in self.active(trained):
                return 0.0
            return self.learning_rate(trained, step - self.begins[trained])

        return rate

    def learning_rate(self, stage: int, done: int) -> float:
        """Return the learning rate after `done` steps of a stage: a linear warm-up, then a cosine
        or a constant."""
        steps, rate = self.steps(stage), 1.0
        warm_up = max(1, min(self._config.warm_up, steps // 5))
        if self._config.schedule == "cosine":
            rate = _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done / steps))
        return self._highest_rates[stage] * min((done + 1) / warm_up, rate)

    def progress(self, step: int) -> Progress:
        """Return the progress after `step` steps, counted from the start of the whole run."""
        start, taken = self._start, step - self._start.step
        begins = (0, *(begin for begin in self.begins[1:] if begin < step))
        passes = Fraction(step - max(begins[-1], start.step), self._per_pass)
        if len(begins) == len(start.begins):
            passes += start.passes
        position = start.position.after(taken, self._batch, self._images)
        return Progress(step, begins, passes, position)
