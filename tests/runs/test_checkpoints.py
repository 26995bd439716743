"""Killed runs, damaged checkpoints and full disks."""

import itertools
import os
import signal
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_run, checkpoint, exit_code, metrics, spy, start

from mflow_kernels.data import files
from mflow_kernels.runs.checkpoints import LAST, PREVIOUS
from mflow_kernels.training import checkpoints
from mflow_kernels.training.callbacks import MetricsCsv
from mflow_kernels.training.checkpoints import _Sink
from mflow_kernels.training.cli import main


def every_call(*args, **kwargs):
    return True


def kill_before(owner, name, which, number):
    """Kill this process before the `number`-th call of `owner.name` that satisfies `which`."""
    calls = itertools.count(1)

    def note(*args, **kwargs):
        if which(*args, **kwargs) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    spy(pytest.MonkeyPatch(), owner, name, note)


def test_a_run_that_is_killed_again_and_again_ends_the_same(command, trained, tmp_path):
    """Each process saves after every step, and dies at another moment of its second checkpoint."""
    folder, command = tmp_path / "run", [*command, "--save-steps", "1"]
    moments = [
        (_Sink, "write", every_call, 700),  # in the file: the first checkpoint has 524 writes
        (files, "sync", lambda path: LAST in path.name, 2),
        (os, "replace", lambda old, new: new.name == PREVIOUS, 2),
        (os, "replace", lambda old, new: new.name == LAST and old.suffix == ".tmp", 2),
        (MetricsCsv, "log_metrics", every_call, 2),
    ]
    for moment in moments:
        resume = ["--resume"] if folder.exists() else []
        child = start([*command, *resume], partial(kill_before, *moment))
        assert exit_code(child) == -signal.SIGKILL
    assert main([*command, "--resume"]) == 0
    assert_same_run(folder, trained)
    assert not list(folder.glob(".*.tmp"))


def torn(path):
    path.write_bytes(path.read_bytes()[:-2000])


def flipped(path):
    """Flip one bit of the largest tensor, which torch reads without a word."""
    with zipfile.ZipFile(path) as file:
        tensors = [record for record in file.infolist() if "/data/" in record.filename]
        content = file.read(max(tensors, key=lambda record: record.file_size))
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "global_step": 9}, path)


@pytest.mark.parametrize("damage", [torn, flipped, emptied, foreign, Path.unlink])
def test_the_one_before_a_damaged_checkpoint_is_taken(damage, command, run, trained, capsys):
    damage(run / LAST)
    step = checkpoint(run, PREVIOUS)["global_step"]
    assert step == 4
    assert main([*command, "--resume"]) == 0
    message = capsys.readouterr().err
    if damage is not Path.unlink:
        assert f"{run / LAST}" in message
        assert f"using previous.ckpt of step {step}" in message
    assert_same_run(run, trained)
    assert checkpoint(run, PREVIOUS)["global_step"] == step


def test_a_full_disk_is_reported_and_leaves_the_last_checkpoint(command, run, trained, capsys):
    (run / LAST).unlink()  # continue from the checkpoint of step 4
    before = (run / PREVIOUS).read_bytes()
    full = run / f".{LAST}.{os.getpid()}.tmp"

    def fill():
        full.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mflow_kernels.training.train.remove_temporary", lambda _: fill())
        assert main([*command, "--resume"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"mflow: error: could not write {run / LAST}: No space left on device"
    assert (run / LAST).read_bytes() == before
    assert not full.is_symlink()
    assert main([*command, "--resume"]) == 0
    assert_same_run(run, trained)


def test_a_row_of_metrics_that_a_power_cut_tore_is_left_out(command, run, trained):
    with (run / "metrics.csv").open("a") as file:
        file.write("3,0.1,2")
    assert main([*command, "--resume"]) == 0
    assert metrics(run) == metrics(trained)


def test_metrics_are_on_the_disk_before_each_checkpoint(command, tmp_path, monkeypatch):
    """Otherwise a power cut could lose rows of steps that a checkpoint includes."""
    events = []
    monkeypatch.setattr(
        checkpoints, "sync", lambda path: events.append((path.name, len(metrics(path.parent))))
    )
    spy(monkeypatch, torch, "save", lambda state, _: events.append(state["global_step"]))
    assert main([*command, "--save-steps", "1"]) == 0
    steps = [event for event in events if isinstance(event, int)]
    assert steps == [1, 2, 3, 4, 5, 6]
    synced = events[::2]
    assert [name for name, _ in synced] == ["metrics.csv"] * 6
    assert all(count >= step for (_, count), step in zip(synced, steps, strict=True))
