"""The progress of training on stderr."""

import io

import pytest
from rich.console import Console

from mflow_kernels.data import progress
from mflow_kernels.training.cli import main


def test_without_a_terminal_lines_are_printed(command, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert main([*command, "--error-bound", "0.01", "--stage-weight", "7"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert lines[0] == "training: 1 of 6 steps, stage 1 of 2"
    assert lines[1].startswith("training: 2 of 6 steps, stage 1 of 2, bits/dim ")
    assert "training: 2 of 6 steps, stage 1 of 2, validating, bits/dim " in "\n".join(lines)
    first = next(line for line in lines if "weight" in line)
    assert ", weight 1005, " in first  # 1000 exp(0.005): that of the step before the shown one
    assert lines[-1].startswith("training: 6 of 6 steps, stage 2 of 2, bits/dim ")
    for figure in (", penalty (bits/dim) ", ", weight 7, ", ", images/s ", ", held-out bits/dim "):
        assert figure in lines[-1]


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_shows_every_figure_below_the_bar(width, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    figures = {"stage": "1 of 2", "bits/dim": "3.456", "penalty (bits/dim)": "0.123"}
    figures |= {"weight": "1000", "images/s": "1,789", "held-out bits/dim": "3.210"}
    with progress.progress_bar("training", 1000, unit="steps") as show:
        show(500, figures)
    *_, last = screen.getvalue().split("training")
    assert "500/1000 steps" in last
    assert "left" in last
    for name, value in figures.items():
        assert f"{name} {value}" in last
    rows = [row for row in last.splitlines() if "bits/dim" in row or "images/s" in row]
    assert len(rows) == (2 if width == 60 else 1)
