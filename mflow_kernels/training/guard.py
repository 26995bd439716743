"""The guard of training steps: it decides on the device whether a step is skipped.

The host reads its state in logged steps only, so it does not wait for the device in the others.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mflow_kernels.layers.actnorm import over_ranks
from mflow_kernels.runs.config import TrainConfig

_MEMORY = 100  # steps over which the mean and variance of the loss are averaged
# Least standard deviation of the loss, as a fraction of its size. Without it, rounding in a
# constant loss would count as a spike.
_LEAST_SPREAD = 0.01


class GuardReading(NamedTuple):
    """State of the guard as `StepGuard.read` returns it."""

    skipped: int  # steps skipped since the start of training
    in_a_row: int  # most steps skipped in a row since the last reading
    drift: float  # largest drift since the last reading
    loss: float  # loss of the last skipped step
    norm: float  # norm of its gradient


class StepGuard(nn.Module):
    """Judges each step by its loss, the norm of its gradient and the drift of rebuilt states.

    A step is skipped if one of the three is not finite, if the drift is above its limit, or if the
    loss is a spike: above the mean of about the last hundred losses by more than `spike` of their
    standard deviations. Skipped losses do not enter the mean and the deviation. With
    torch.distributed, all ranks reach the same decision.

    Args:
        spike: limit of the loss, in standard deviations above the mean.
        max_drift: largest drift allowed.
    """

    state: Tensor
    seen: Tensor

    def __init__(self, spike: float, max_drift: float) -> None:
        super().__init__()
        self._spike, self._max_drift = spike, max_drift
        # Saved with the weights: mean, variance and number of losses; steps skipped in a row; steps
        # skipped in all.
        self.register_buffer("state", torch.zeros(5, dtype=torch.float64))
        # Since the last reading: most steps skipped in a row; largest drift; loss and gradient norm
        # of the last skipped step.
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor, drift: Tensor | None) -> Tensor:
        """Return 1 if the step must be skipped and 0 otherwise, as a float32 scalar on the device.

        This is the form in which fused optimizers take `found_inf`.
        """
        drift = torch.zeros_like(loss) if drift is None else drift
        drifted = ~(drift <= self._max_drift)
        pair = torch.stack([loss.double(), drifted.double()])
        mean_loss, drifted_ranks = mean_over_ranks(pair).unbind()
        mean, variance, count, streak, skipped = self.state.unbind()
        spread = torch.maximum(variance.sqrt(), _LEAST_SPREAD * (1 + mean.abs()))
        spike = (count >= _MEMORY) & (mean_loss > mean + self._spike * spread)
        bad = ~(mean_loss.isfinite() & norm.isfinite()) | spike | (drifted_ranks > 0)
        weight = 1 / (count + 1).clamp(max=_MEMORY)
        delta = mean_loss - mean
        updated = torch.stack(
            [mean + weight * delta, (1 - weight) * (variance + weight * delta**2)]
        )
        streak = torch.where(bad, streak + 1, 0.0)
        self.state = torch.cat(
            [
                torch.where(bad, self.state[:2], updated),
                torch.stack([torch.where(bad, count, count + 1), streak, skipped + bad]),
            ]
        )
        longest, largest, last_loss, last_norm = self.seen.unbind()
        self.seen = torch.stack(
            [
                torch.maximum(longest, streak),
                torch.maximum(largest, drift.double()),
                torch.where(bad, mean_loss, last_loss),
                torch.where(bad, norm.double(), last_norm),
            ]
        )
        return bad.float()

    def begin_stage(self) -> None:
        """Forget the losses of the stage before."""
        self.state[:4] = 0

    def read(self) -> GuardReading:
        """Wait for the device, return the state, and begin the next interval between readings."""
        skipped, longest, drift, loss, norm = torch.cat([self.state[4:], self.seen]).tolist()
        self.seen.zero_()
        return GuardReading(int(skipped), int(longest), drift, loss, norm)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of x over all ranks; x itself without torch.distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return over_ranks(x) / torch.distributed.get_world_size() if distributed else x


def problem_of(reading: GuardReading, config: TrainConfig, where: str) -> str | None:
    """Say why training cannot continue after the step `where`, or return None if it can."""
    loss = f"{reading.loss:.4g}"
    if not reading.drift <= config.max_drift:
        if not math.isfinite(reading.drift) and not math.isfinite(reading.loss):
            return f"the loss is {loss} {where}; a lower --learning-rate may help"
        every = config.checkpoint_every
        closer = f"--checkpoint-every {every // 2 if every else 4} or " if every != 1 else ""
        return (
            f"rebuilt states drifted by {reading.drift:.2g} {where}, more than --max-drift "
            f"{config.max_drift:g}: the gradients would be wrong; --resume with "
            f"{closer}--no-reversible continues the run with more memory"
        )
    if reading.in_a_row >= config.max_skipped:
        return (
            f"{reading.in_a_row} steps in a row were skipped, the last of them with a loss of "
            f"{loss} and a gradient norm of {reading.norm:.4g}, {where}; the last checkpoint has "
            "the weights from before these steps; a lower --learning-rate may help"
        )
    return None
