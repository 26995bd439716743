"""Which steps may change the weights. Decided on the device: no step waits for it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mflow_kernels.layers.actnorm import over_ranks

_MEMORY = 100  # steps that the mean and deviation of the loss look back on
_LEAST_SPREAD = 0.01  # of the loss's size: what is constant for long has no spikes of rounding


class Figures(NamedTuple):
    """What a look at the guard shows: of all steps, or since the last look."""

    skipped: int  # of all
    in_a_row: int  # the most, since the last look
    drift: float  # the largest, since the last look
    loss: float  # of the last skipped step
    norm: float  # of its gradient


class StepGuard(nn.Module):
    """Judges each step by its loss, the norm of its gradient and the drift of rebuilt states.

    Skipped are steps of which one of the three is not finite, whose drift is above its limit, or
    whose loss is a spike: above the mean of the last hundred or so by more than `spike` of their
    standard deviations. Skipped losses do not enter these. Where torch.distributed runs, all ranks
    come to the same judgement.

    Args:
        spike: in standard deviations.
        max_drift: largest drift.
    """

    state: Tensor

    def __init__(self, spike: float, max_drift: float) -> None:
        super().__init__()
        self._spike, self._max_drift = spike, max_drift
        # Saved with the weights: mean, variance and number of losses; in a row; skipped.
        self.register_buffer("state", torch.zeros(5, dtype=torch.float64))
        # Since the last look: the most in a row, the largest drift, the last skipped loss and norm.
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64), persistent=False)

    seen: Tensor

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor, drift: Tensor | None) -> Tensor:
        """A float32 scalar on the device: 1 for a step that is to be skipped, 0 for one that is
        not, as the `found_inf` of fused optimizers has it."""
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
        usual = torch.stack([mean + weight * delta, (1 - weight) * (variance + weight * delta**2)])
        streak = torch.where(bad, streak + 1, 0.0)
        self.state = torch.cat(
            [
                torch.where(bad, self.state[:2], usual),
                torch.stack([torch.where(bad, count, count + 1), streak, skipped + bad]),
            ]
        )
        most, largest, *last = self.seen.unbind()
        figures = [torch.maximum(most, streak), torch.maximum(largest, drift.double())]
        now = (mean_loss, norm.double())
        figures += [torch.where(bad, new, old) for new, old in zip(now, last, strict=True)]
        self.seen = torch.stack(figures)
        return bad.float()

    def begin_stage(self) -> None:
        """Forget the losses of another stage."""
        self.state[:4] = 0

    def look(self) -> Figures:
        """Wait for the device, and tell."""
        skipped, most, drift, loss, norm = torch.cat([self.state[4:], self.seen]).tolist()
        self.seen.zero_()
        return Figures(int(skipped), int(most), drift, loss, norm)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of x over all ranks, or x where there is but one."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return over_ranks(x) / torch.distributed.get_world_size() if there else x
