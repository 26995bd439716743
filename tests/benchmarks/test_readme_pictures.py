"""The pictures of the README: bars from kept figures, and rows of images from a run."""

import pytest
from PIL import Image

from benchmarks import readme_pictures, report
from benchmarks.harness.pictures import LABELS, bars
from benchmarks.harness.saved_runs import merged, runs
from benchmarks.readme_pictures import draw_run, draw_uses
from mflow_kernels.runs.folder import load_run


def test_bars_are_those_of_the_kept_figures():
    (name,) = {row.group for row in runs(merged([report.RESULTS])).rows if row.variant == "memcnn"}
    rows = [row for row in runs(merged([report.RESULTS])).rows if row.group == name]
    by_label = {label: (peak, time) for label, peak, time in bars(rows)}
    assert len(by_label) == len(LABELS)
    own, plain = (next(row for row in rows if row.variant == variant)
                  for variant in ("mflow_kernels, reversible", "plain"))  # fmt: skip
    peak, (middle, low, high) = by_label["mflow_kernels, reversible"]
    assert peak == own.extra["peak_bytes"] / 2**20
    ratios = sorted(a / b for a, b in zip(own.rounds, plain.rounds, strict=True))
    assert low <= middle <= high
    assert middle == pytest.approx((ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2)
    assert by_label["plain PyTorch"][1] == (1, 1, 1)
    with pytest.raises(ValueError, match="nflows"):
        bars([row for row in rows if row.variant != "nflows"])


def test_pictures_are_written(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(readme_pictures, "SAMPLES", 2)
    monkeypatch.setattr(readme_pictures, "MISSING", ("half",))
    report.draw(runs(merged([report.RESULTS])), tmp_path, "mark")
    run = load_run(str(trained), "cpu")
    draw_run(run, tmp_path / "digits.png")
    draw_uses(run, tmp_path / "uses.png")
    pictures = list(tmp_path.iterdir())
    assert len(pictures) == 5
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 600
            assert len(picture.getcolors(100_000)) > 10
