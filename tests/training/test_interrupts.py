"""Ctrl-C in a terminal, at each moment of `mflow train`."""

import os
import pty
import signal
import sys

import pytest
import torch
from tiny_runs import checkpoint, metrics, weights

from mflow_kernels.evaluation import likelihood
from mflow_kernels.training import checks, train
from mflow_kernels.training.cli import main
from mflow_kernels.training.module import FlowTraining


def in_a_terminal(command, owner, name, number):
    """Run `mflow` in a child process with a terminal; return its exit code and what it shows.

    The child gets SIGINT, as from Ctrl-C, when the `number`-th call of `owner.name` begins.
    """
    child, terminal = pty.fork()
    if child == 0:
        code = 1
        try:
            # Processes that a script starts in the background ignore SIGINT, also those of tests.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
            original, calls = getattr(owner, name), []

            def interrupted(*args, **kwargs):
                calls.append(1)
                if len(calls) == number:
                    os.killpg(0, signal.SIGINT)  # all processes of this terminal
                return original(*args, **kwargs)

            setattr(owner, name, interrupted)
            code = main(command)
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os._exit(code)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # raised when the child has closed the terminal
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


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
    torch.testing.assert_close(weights(folder), weights(trained), rtol=0, atol=0)
    assert len(metrics(folder)) == len(metrics(trained))


def test_the_range_test_writes_nothing(command, tmp_path):
    command = [*command, "--find-learning-rate"]
    code, shown = in_a_terminal(command, FlowTraining, "training_step", 2)
    assert code == 130
    assert "interrupted; nothing was written" in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())
