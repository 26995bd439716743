"""The pictures of the README: bars from saved figures, and rows of images from a run."""

import pytest
from PIL import Image

from benchmarks import readme_pictures
from benchmarks.harness.saved_runs import merged, runs
from benchmarks.readme_pictures import RESULTS, bars, draw_comparison, draw_run, draw_uses
from mflow_kernels.runs.folder import load_run


def test_bars_are_those_of_the_saved_figures():
    saved = runs(merged([RESULTS]))
    by_label = {label: (peak, time) for label, peak, time in bars(saved)}
    assert len(by_label) == len(readme_pictures.LABELS)
    rows = {row.variant: row for row in saved.rows}
    peak, (middle, low, high) = by_label["mflow_kernels, reversible"]
    assert peak == rows["mflow_kernels, reversible"].extra["peak_bytes"] / 2**20
    ratios = sorted(
        a / b
        for a, b in zip(rows["mflow_kernels, reversible"].rounds, rows["plain"].rounds, strict=True)
    )
    assert (middle, low, high) == (ratios[2], ratios[1], ratios[3])
    assert by_label["plain PyTorch"][1] == (1, 1, 1)
    saved.rows = [row for row in saved.rows if row.variant != "nflows"]
    with pytest.raises(ValueError, match="nflows"):
        bars(saved)


def test_pictures_are_written(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(readme_pictures, "SAMPLES", 2)
    monkeypatch.setattr(readme_pictures, "MISSING", ("half",))
    draw_comparison(runs(merged([RESULTS])), tmp_path / "comparison.png")
    run = load_run(str(trained), "cpu")
    draw_run(run, tmp_path / "digits.png")
    draw_uses(run, tmp_path / "uses.png")
    pictures = list(tmp_path.iterdir())
    assert len(pictures) == 3
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 600
            assert len(picture.getcolors(100_000)) > 10
