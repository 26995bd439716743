"""The code of the documentation runs and prints what its comments say; its commands exist."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from mflow_kernels.training.cli import _parsers

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^ *print\(.*\) *# (.+)$", re.MULTILINE)


def names(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=names)
def test_code_runs_and_prints_its_comments(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables = {}
    for number, block in enumerate(BLOCK.findall(page.read_text()), start=1):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, f"{names(page)}, block {number}", "exec"), variables)
        expected = PRINTED.findall(block)
        if expected:
            assert output.getvalue().splitlines() == [line.strip() for line in expected]
