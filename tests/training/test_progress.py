"""The progress of training on stderr."""

import io

import pytest
from rich.console import Console

from mflow_kernels.data import progress
from mflow_kernels.training.cli import main


def test_without_a_terminal_lines_are_printed(command, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert lines[0].startswith("training: 2 of 6 steps, stage 1/2  loss ")
    assert lines[-1].startswith("training: 6 of 6 steps, stage 2/2  loss ")
    assert "bits/dim" in lines[-1]
    assert "images/s" in lines[-1]
    assert "held out" in lines[-1]


@pytest.mark.parametrize("width", [60, 120])
def test_a_narrow_terminal_shows_the_whole_note(width, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    note = "stage 1/2  loss 0.123  3.456 bits/dim  789 images/s  held out 3.210"
    with progress.progress_bar("training", 1000, unit="steps") as show:
        show(500, note)
    shown = screen.getvalue()
    assert "training" in shown
    assert "500/1000" in shown
    assert all(word in shown for word in note.split())
