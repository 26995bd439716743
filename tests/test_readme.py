"""The README's code runs, and its test command is the one that CI runs."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run(number: int) -> dict[str, Any]:
    """Run the README's block of Python with this number, and return its variables."""
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number], names)
    return names


def test_two_moons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(0)
    assert names["samples"].shape == (500, 2)
    # Uniform on the two arcs of length pi with noise of 0.05 in one direction has an entropy of
    # log(2 pi) + 1/2 log(2 pi e 0.05^2) = 0.26. A normal distribution reaches 1.88.
    assert names["log_p"].mean() > -0.8


def test_the_library() -> None:
    samples = run(1)["samples"]
    assert samples.shape == (4, 3, 32, 32)
    assert samples.isfinite().all()


def test_ci_runs_the_test_command() -> None:
    (command,) = re.findall(r"^    (python3 .*tests/run)$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
