"""The table of `benchmarks.manifold.nested`."""

import pytest

from benchmarks.manifold.nested import measure, table
from mflow_kernels.runs.folder import load_run


def test_a_run_has_errors_of_its_stages_and_of_selections_of_the_same_size(trained):
    row = measure(trained)
    assert (
        [int(d) for d in row["errors"]]
        == [6, 4]
        == [s.dim for s in load_run(trained).config.stages]
    )
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
