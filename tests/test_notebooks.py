"""The notebooks run from top to bottom, and print what their stored outputs show."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def shown(cell: Any) -> list[str]:
    """What a cell shows: text without its numbers, or the kind of output."""
    texts = [
        output.get("text")
        or (output["data"].get("image/png") and "picture")
        or output["data"]["text/plain"]
        for output in cell.get("outputs", [])
    ]
    return [re.sub(r"-?\d[\d.]*", "#", text) for text in texts]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_its_outputs(path: Path, tmp_path: Path) -> None:
    """The notebooks themselves assert their numbers; rounding may change the printed ones."""
    stored = nbformat.read(path, as_version=4)
    executed = nbformat.from_dict(stored)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(executed, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [shown(cell) for cell in stored.cells]
    assert any(outputs)
    assert [shown(cell) for cell in executed.cells] == outputs
