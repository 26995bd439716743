"""The notebooks run from top to bottom, and print what their stored outputs show.

    python tests/test_notebooks.py

runs them and stores the new outputs.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra test-all")
nbclient = pytest.importorskip("nbclient", reason="needs the extra test-all")
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def executed(path: Path, folder: str) -> Any:
    """Run a notebook in `folder`, and return it with the new outputs."""
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict(stored)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # a print may arrive in several messages
        resources={"metadata": {"path": folder}},
    )
    client.execute()
    notebook.metadata = stored.metadata  # without the version of this Python
    return notebook


def shown(cell: Any) -> list[str]:
    """Return the outputs of a cell: text without its numbers, or the kind of output."""
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
    cells = nbformat.read(path, as_version=4).cells
    outputs = [shown(cell) for cell in cells]
    assert any(outputs)
    assert "stderr" not in {o.get("name") for cell in cells for o in cell.get("outputs", [])}
    assert [shown(cell) for cell in executed(path, str(tmp_path)).cells] == outputs


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for path in NOTEBOOKS:
            nbformat.write(executed(path, temporary), path)
