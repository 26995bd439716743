"""Helpers of tests that stop a training run, resume it and compare it with a whole one."""

import os

import pytest
import torch
from tiny_runs import checkpoint, metrics

from mflow_kernels.training.cli import main
from mflow_kernels.training.module import FlowTraining
from training.spies import spy


class PowerCut(Exception):
    """An error that nothing in the package catches, like the death of the process."""


def before_step(patch, step, act, hook="training_step"):
    """Call `act()` before a hook of FlowTraining runs in this step, counted from 0."""

    def note(training, *args, **kwargs):
        if training.global_step == step:
            act()

    spy(patch, FlowTraining, hook, note)


def train_until(step, command, monkeypatch, hook="training_step"):
    """Run a command that a power cut ends before a hook of FlowTraining runs in this step."""

    def cut():
        raise PowerCut

    with monkeypatch.context() as patch:
        before_step(patch, step, cut, hook)
        with pytest.raises(PowerCut):
            main(command)


def start(command, prepare=lambda: None):
    """Run `mflow` in a forked process, without its output and after `prepare()`. Return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            prepare()
            code = main(command)
        finally:
            os._exit(code)
    return child


def exit_code(child):
    """Wait for a child process and return its exit code, or its signal's number, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_same_run(folder, whole):
    """Compare checkpoints, metrics and evaluations bit by bit, but not the speed."""
    one, other = checkpoint(folder), checkpoint(whole)
    for run in (one, other):
        for schedule in run["lr_schedulers"]:
            del schedule["_step_count"]  # of calls since the process started
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "progress"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    timed = {"images_per_second": ""}
    rows, expected = ([row | timed for row in metrics(run)] for run in (folder, whole))
    assert rows == expected
    evaluations = [(run / "evaluation.json").read_text() for run in (folder, whole)]
    assert evaluations[0] == evaluations[1]
