"""The range test of learning rates."""

import math
import re
from itertools import pairwise

import pytest
import torch
from tiny_runs import listing, refused

from mflow_kernels.runs.arguments import read_stages
from mflow_kernels.runs.options import StageOptions
from mflow_kernels.training import range_test
from mflow_kernels.training.cli import main
from mflow_kernels.training.module import FlowTraining
from mflow_kernels.training.range_test import RangeTest, describe_tests, rate_at


def test_the_rates_grow_from_the_lowest_to_the_highest():
    rates = [rate_at(step) for step in range(100)]
    assert (rates[0], rates[-1]) == pytest.approx((1e-5, 1.0))
    ratios = [b / a for a, b in pairwise(rates)]
    assert ratios == pytest.approx([10 ** (5 / 99)] * 99)


def test_the_suggestion_is_below_the_rate_of_the_lowest_loss():
    """The loss falls until step 60 and then rises; the running mean turns a few steps later."""
    test = RangeTest(tuple(abs(step - 60) / 60 for step in range(100)))
    assert rate_at(60) < test.best_rate < rate_at(70)
    assert test.suggestion == test.best_rate / 3
    falling = RangeTest(tuple(float(-step) for step in range(20)))
    text = describe_tests([test, falling], [StageOptions()])
    assert f"1  {test.best_rate:19.2g}  {test.suggestion:14.2g}" in text
    rates = f"--learning-rate {test.suggestion:.2g} --stage-learning-rate {rate_at(19) / 3:.2g}"
    assert text.endswith(f"mflow train {rates} ...")
    text = describe_tests([test, falling, falling], [StageOptions(dim=9), StageOptions(dim=4)])
    (options,) = re.findall(" --stages '(.*)' ...", text)
    rate = float(f"{falling.suggestion:.2g}")
    assert read_stages(options) == [StageOptions(dim, learning_rate=rate) for dim in (9, 4)]


@pytest.mark.parametrize("fall", [1, 5])
def test_no_rate_is_suggested_for_a_loss_that_rises_from_the_start(fall):
    """A third of the best rate would be below every rate that was tested."""
    rising = RangeTest(tuple(abs(step - fall) + 1.0 for step in range(100)))
    assert rising.best_rate / 3 < rate_at(0)
    assert rising.suggestion is None
    falling = RangeTest(tuple(float(-step) for step in range(20)))
    text = describe_tests([falling, rising], [StageOptions()])
    assert f"1  {falling.best_rate:19.2g}  {falling.suggestion:14.2g}\n" in text
    assert f"2  {rising.best_rate:19.2g}            none\n" in text
    assert "The loss of stage 2 rose from the lowest tested rates on (from 1e-05)" in text
    assert "--batch-size" in text
    assert "To train with them" not in text


def test_each_stage_is_tested_on_the_best_weights_of_the_one_before(
    command, tmp_path, monkeypatch, capsys
):
    """The loss of stage 1 is made to rise from its step 4 on, and to overflow at its step 7."""
    monkeypatch.setattr(range_test, "STEPS", 10)
    steps, weights = [], {}
    original = FlowTraining.on_train_batch_end

    def on_train_batch_end(self, *args):
        original(self, *args)
        stage, done = self.trained_stage, self.global_step - 1
        steps.append((stage, done, self.optimizers().param_groups[2 * stage]["lr"]))
        flow = self.model.stages[0].flow
        weights[done] = [p.detach().clone() for p in flow.parameters()]

    def loss(self):
        done = self.global_step - 1
        return torch.tensor({7: math.inf}.get(done, abs(done - 3.0)))

    settable = property(loss, lambda *_: None)
    monkeypatch.setattr(FlowTraining, "loss", settable, raising=False)
    monkeypatch.setattr(FlowTraining, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(range_test, "_SMOOTHING", 0.0)
    before = listing(tmp_path)
    assert main([*command, "--find-learning-rate"]) == 0
    assert listing(tmp_path) == before
    assert [(stage, step) for stage, step, _ in steps[:8]] == [(0, step) for step in range(8)]
    assert [(stage, step) for stage, step, _ in steps[8:]] == [(1, step) for step in range(10, 20)]
    best, later = weights[3], weights[10]
    assert all(a.equal(b) for a, b in zip(best, later, strict=True))
    out = capsys.readouterr().out
    assert f"1  {rate_at(3):19.2g}  {rate_at(3) / 3:14.2g}" in out


def test_it_is_refused_on_resume(run, command, tmp_path, capsys):
    command = [*command, "--resume", "--find-learning-rate"]
    assert "--find-learning-rate: expected a new run, got --resume" in refused(
        command, tmp_path, capsys
    )
