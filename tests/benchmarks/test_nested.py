"""The table of `benchmarks.manifold.nested`."""

import json
import shutil

import pytest
import torch

from benchmarks.manifold import nested
from benchmarks.manifold.nested import measure, table
from mflow_kernels.runs.folder import load_run


def test_a_run_has_errors_of_its_stages_and_of_selections_of_the_same_size(trained):
    run = load_run(trained)
    row = measure(run)
    assert [int(d) for d in row["errors"]] == [6, 4] == [flow.dim for flow in run.config.flows]
    assert row["seed"] == 0
    # The first stage takes the coarsest latents, and 4 of these are among its 6.
    first, second = row["errors"].values()
    assert first["stages"] == pytest.approx(first["coarsest"], rel=1e-6)
    assert first["stages"] < min(second["stages"], second["coarsest"])
    assert first["components"] < second["components"]
    made = {"commit": "c", "date": "2026-11-27", "torch": "2"}
    lines = table([row | {"made": made}]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| 6", "| 4"]
    assert f"{second['stages']:.5f}" in lines[3]


def test_a_second_run_of_the_same_name_is_measured(trained, tmp_path, monkeypatch, capsys):
    """Rows are stored by a run's weights, so a name that returns takes no row of another run."""
    measured = []

    def measure(run):
        measured.append(run.model)
        return {"seed": len(measured), "errors": {"6": dict.fromkeys(nested.COLUMNS, 0.5)}}

    def other_weights(folder):
        run = load_run(folder)
        if "other" in folder:
            with torch.no_grad():
                next(run.model.parameters()).add_(1)
        return run

    monkeypatch.setattr(nested, "measure", measure)
    monkeypatch.setattr(nested, "load_run", other_weights)
    folders = [tmp_path / parent / "name" for parent in ("one", "other", "copy")]
    for folder in folders:
        shutil.copytree(trained, folder)
        nested.main([str(folder), "--out", str(tmp_path / "tables")])
    assert len(measured) == 2
    stored = [json.loads(path.read_text()) for path in (tmp_path / "tables").glob("*.json")]
    assert sorted(row["seed"] for row in stored) == [1, 2]
    assert "Runs: seeds 1;" in capsys.readouterr().out.split("| d |")[-1]  # the copy's own row
