"""SIGTERM, and SIGINT (Ctrl-C), at each moment of `mflow train`."""

import itertools
import os
import pty
import signal
import subprocess
import sys

import pytest
import torch
from tiny_runs import assert_same_run, before_step, checkpoint, exit_code, run_as_child, spy

from mflow_kernels.evaluation import likelihood
from mflow_kernels.training import checks, train
from mflow_kernels.training.cli import main
from mflow_kernels.training.module import FlowTraining


def in_a_terminal(command, owner, name, number):
    """Run `mflow` in a child process with a terminal; return its exit code and what it shows.

    The child gets SIGINT, as from Ctrl-C, when the `number`-th call of `owner.name` begins.
    """
    calls = itertools.count(1)

    def note(*args, **kwargs):
        if next(calls) == number:
            os.killpg(0, signal.SIGINT)  # all processes of this terminal

    def prepare():
        # If a script started these tests in the background, SIGINT is ignored so far.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
        spy(pytest.MonkeyPatch(), owner, name, note)

    child, terminal = pty.fork()
    if child == 0:
        run_as_child(command, prepare)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # raised when the child has closed the terminal
        pass
    os.close(terminal)
    return exit_code(child), shown.decode()


MOMENTS = {
    "reading the images": (checks, "load_splits", 1),
    "setting up": (FlowTraining, "configure_optimizers", 1),
    "a step": (FlowTraining, "training_step", 2),
    "validating": (FlowTraining, "validation_step", 1),
    "the last validation": (FlowTraining, "on_validation_epoch_end", 3),
    "drawing": (train, "draw_curves", 1),
    "evaluating": (likelihood, "dequantize", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_says_how_to_continue_and_ends_the_same(moment, command, trained, tmp_path):
    folder = tmp_path / "run"
    code, shown = in_a_terminal(command, *MOMENTS[moment])
    assert code == 130
    assert "Traceback" not in shown
    assert "interrupted" in shown
    resume = [] if moment == "reading the images" else ["--resume"]
    assert folder.exists() == bool(resume)
    assert (f"mflow train --resume --run-dir {folder} continues the run" in shown) == bool(resume)
    if moment == "a step":
        assert checkpoint(folder)["global_step"] == 2
    assert main([*command, *resume]) == 0
    assert_same_run(folder, trained)


@pytest.mark.parametrize(
    ("signals", "code"), [([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)]
)
def test_signals_save_a_checkpoint(signals, code, command, trained, tmp_path, monkeypatch, capsys):
    """They arrive in step 2, between the checkpoints of steps 2 and 4; two SIGINTs act as one."""
    before = signal.getsignal(signals[0])
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: [os.kill(os.getpid(), number) for number in signals])
        with pytest.raises(SystemExit) as leaving:
            main(command)
    assert leaving.value.code == code
    assert signal.getsignal(signals[0]) == before
    resume = f"mflow train --resume --run-dir {tmp_path / 'run'}"
    assert f"interrupted; {resume} continues the run" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["global_step"] == 3
    assert main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", trained)


def test_interrupts_do_not_end_a_checkpoint(command, trained, tmp_path, monkeypatch):
    original = torch.save
    steps = []

    def save(state, file):
        for _ in range(4):
            os.kill(os.getpid(), signal.SIGINT)
        original(state, file)
        steps.append(state["global_step"])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(SystemExit):
            main(command)
    assert checkpoint(tmp_path / "run")["global_step"] == steps[-1]
    assert main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", trained)


def test_further_interrupts_do_not_break_the_end_of_the_process(command):
    """SIGINT arrives every 2 ms from a call on, until the interpreter has ended."""
    program = """
import os, signal, sys, threading, time
from mflow_kernels.training import train
from mflow_kernels.training.cli import run_process

def interrupt():
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)

original = train.draw_curves

def interrupted(*args, **options):
    threading.Thread(target=interrupt, daemon=True).start()
    time.sleep(0.05)
    return original(*args, **options)

train.draw_curves = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(run_process())
"""
    child = subprocess.run([sys.executable, "-c", program, *command], capture_output=True)
    shown = child.stderr.decode()
    assert child.returncode == 130, shown
    assert "interrupted" in shown
    assert "Traceback" not in shown
    assert "Exception ignored" not in shown


def test_the_range_test_writes_nothing(command, tmp_path):
    command = [*command, "--find-learning-rate"]
    code, shown = in_a_terminal(command, FlowTraining, "training_step", 2)
    assert code == 130
    assert "interrupted; nothing was written" in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())
