"""The pictures of the README: bars from saved figures, and rows of images from a run."""

import pytest
from PIL import Image

from benchmarks import readme_pictures
from benchmarks.harness.saved_runs import merged, ratio, runs
from benchmarks.readme_pictures import (
    DOCS,
    RESULTS,
    SPLINES,
    bars,
    draw_comparison,
    draw_run,
    draw_splines,
    draw_uses,
)
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


def test_the_readme_names_the_figures_of_its_picture():
    by_label = {label: (peak, time) for label, peak, (time, _, _) in bars(runs(merged([RESULTS])))}
    peak, time = by_label["mflow_kernels, reversible"]
    _, stored = by_label["mflow_kernels, stored"]
    assert round(by_label["plain PyTorch"][0] / peak) == 5
    sentence = (
        f"a reversible training step takes {time:.2f} of plain PyTorch's time and about a fifth of "
        f"its memory; with stored activations it takes {stored:.2f} of the time."
    )
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert sentence in readme
    splines = runs(merged([SPLINES])).rows
    shares = {name: [] for name in ("mflow_kernels", "accelerated nflows")}
    for name, found in shares.items():
        for row in splines:
            if row.variant == name:
                (base,) = (r for r in splines if (r.group, r.variant) == (row.group, "nflows"))
                found.append(ratio(row, base)[0])
    ends = [f"{end:.2f}" for found in shares.values() for end in (min(found), max(found))]
    assert ends == ["0.22", "0.56", "0.25", "0.56"]
    assert "takes 0.22 to 0.56 of nflows' time, and 0.25 to 0.56 if `accelerate`" in readme


def test_pictures_are_written(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(readme_pictures, "SAMPLES", 2)
    monkeypatch.setattr(readme_pictures, "MISSING", ("half",))
    draw_comparison(runs(merged([RESULTS])), tmp_path / "comparison.png")
    draw_splines(runs(merged([SPLINES])), tmp_path / "splines.png")
    run = load_run(str(trained), "cpu")
    draw_run(run, tmp_path / "digits.png")
    draw_uses(run, tmp_path / "uses.png")
    pictures = list(tmp_path.iterdir())
    assert len(pictures) == 4
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 600
            assert len(picture.getcolors(100_000)) > 10
