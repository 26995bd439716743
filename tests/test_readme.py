"""The README's code runs, and its test command is the one that CI runs."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_in_ten_lines() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    samples = names["samples"]
    assert isinstance(samples, torch.Tensor)
    assert samples.shape == (4, 3, 32, 32)
    assert samples.isfinite().all()


def test_ci_runs_the_test_command() -> None:
    (command,) = re.findall(r"^    (python3 .*tests/run)$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
