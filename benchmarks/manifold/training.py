"""Training of a method: its phases, each with Adam, an average of weights and a share of time."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.manifold.peers import Autoencoder
from mflow_kernels import HierarchicalFlow
from mflow_kernels.training.averaging import WeightAverage

Batches = Iterator[Tensor]
Loss = Callable[[Tensor, float], Tensor]
WARM_UP = 50  # steps in which the learning rate rises, or a tenth of the phase if that is less
AVERAGE = 0.99  # decay of the average of the weights, which each phase ends with
FINAL_RATE = 0.02  # learning rate at the end of a phase, as a share of the highest one
TIMED_STEPS = 5  # steps that measure the cost of a step, after equally many to warm up


@dataclass(frozen=True)
class Phase:
    """Minimize `loss(x, progress)` (N,) over the parameters of `trained`.

    Attributes:
        share: share of the method's CPU time.
        initialize: sets the actnorms from the first batch.
        loss: progress rises from 0 to 1 during the phase.
    """

    share: float
    trained: nn.Module
    initialize: Callable[[Tensor], object]
    loss: Loss


@dataclass(frozen=True)
class Method:
    """A model and its training phases.

    Attributes:
        density: whether the model has a density in the space of x, or a bound of it, so that
            samples can have v drawn.
        ambient: whether the method's own samples are those with v drawn.
    """

    model: HierarchicalFlow | Autoencoder
    phases: Sequence[Phase]
    density: bool
    ambient: bool = False

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def train(method: Method, batches: Batches, steps: Sequence[int], rate: float) -> float:
    """Train all phases with Adam, gradients clipped to norm 1; return the CPU seconds.

    In each phase the rate rises linearly and then falls along a cosine.

    Args:
        steps: number of steps of each phase.
        rate: highest learning rate.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
    """
    started = time.process_time()
    for phase, count in zip(method.phases, steps, strict=True):
        step, average = _stepper(phase, batches, rate, count)
        for i in range(count):
            step(i)
        with torch.no_grad():
            averaged = average.model.parameters()
            for weight, mean in zip(phase.trained.parameters(), averaged, strict=True):
                weight.copy_(mean)
    method.model.eval()
    return time.process_time() - started


def step_seconds(method: Method, batches: Batches, rate: float) -> list[float]:
    """Return the CPU seconds of one step in each phase, as a mean over the phase."""
    costs = []
    for phase in method.phases:
        step, _ = _stepper(phase, batches, rate, TIMED_STEPS)
        times = []
        for i in [*range(TIMED_STEPS), *range(TIMED_STEPS)]:
            started = time.process_time()
            step(i)
            times.append(time.process_time() - started)
        costs.append(statistics.fmean(times[TIMED_STEPS:]))
    return costs


def _stepper(
    phase: Phase, batches: Batches, rate: float, count: int
) -> tuple[Callable[[int], None], WeightAverage]:
    """Start a phase of `count` steps; return the function of step i, and its averaged weights."""
    phase.initialize(next(batches))
    average = WeightAverage(phase.trained, AVERAGE)
    # Gradients of other stages' parameters, if there are any, are ignored.
    parameters = list(phase.trained.parameters())
    optimizer = torch.optim.Adam(parameters, rate, fused=True)
    warm_up = min(WARM_UP, math.ceil(count / 10))

    def step(i: int) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * i / count))
        falling = FINAL_RATE + (1 - FINAL_RATE) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate * min((i + 1) / warm_up, falling)
        loss = phase.loss(next(batches), (i + 0.5) / count).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if i % 50 == 0 and not math.isfinite(loss.item() + norm.item()):
            raise FloatingPointError(f"loss {loss.item()} at step {i} of {count}")
        optimizer.step()
        average.update([(phase.trained, average.model)], i)

    return step, average
