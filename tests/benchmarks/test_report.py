"""The report on saved runs, and its regressions."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def row(variant: str, seconds: list[float], **extra: Any) -> dict[str, Any]:
    extra_info = {
        "variant": variant, "device": "CPU, some", "threads": 1, "clock": "wall time",
        "torch": "2", "triton": "3", "mflow_kernels": "0", "commit": "abc",
        "copy_bytes_per_second": 1e10, "task": "train", "channels": 3, "side": 32, "levels": 3,
        "steps": 8, "width": 64, "batch": 8, "constant": False, "precision": "float32",
        "spec": "K=8", "parameters": 10, "note": "a note", **extra,
    }  # fmt: skip
    steps = extra_info["steps"]
    name = f"benchmarks/bench_models.py::test_model[K={steps}-{variant}]"
    return {"fullname": name, "group": f"train, K={steps}", "stats": {"data": seconds},
            "extra_info": extra_info}  # fmt: skip


def saved(path: Path, *rows: dict[str, Any], missing: tuple[dict[str, str], ...] = ()) -> str:
    path.write_text(json.dumps({"benchmarks": rows, "not_measured": missing}))
    return str(path)


def test_ratios_are_medians_of_interleaved_rounds(tmp_path, capsys) -> None:
    plain, own = [1.0, 2.0, 4.0], [0.5, 1.6, 1.0]  # ratios of 0.5, 0.8 and 0.25
    skipped = {"name": "x::y", "outcome": "skipped", "reason": "nflows is not installed"}
    rows = [row("plain", plain), row("mflow_kernels, stored", own, peak_bytes=2**21)]
    file = saved(tmp_path / "a.json", *rows, missing=(skipped,))
    assert report.main([file]) == 0
    page = capsys.readouterr().out
    assert "| mflow_kernels, stored | 0.50 [0.38, 0.65] |" in page
    assert "| mflow_kernels, stored | 2.0 |" in page
    faster, shares = page.split("## Models")
    assert "| plain | 2.00 [1.62, 3.00] |" in faster  # the peer's time divided by this package's
    assert "| plain |" in shares
    assert "skipped: nflows is not installed (1 rows" in page


def test_plots_and_page_are_written(tmp_path) -> None:
    rows = [row(v, [1.0 * k, 1.1 * k], steps=k, peak_bytes=2**20 * k)
            for k in (4, 8) for v in ("plain", "mflow_kernels, stored")]  # fmt: skip
    file = saved(tmp_path / "a.json", *rows)
    assert report.main([file, "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "depth.png", "speedup-models.png"}


@pytest.mark.parametrize(
    ("new", "extra", "code"),
    [([1.05], {}, 0), ([1.3], {}, 1), ([0.5], {"peak_bytes": 1200}, 1), ([0.5], {}, 0)],
)
def test_time_or_memory_above_the_threshold_fails(tmp_path, capsys, new, extra, code) -> None:
    old = saved(tmp_path / "old.json", row("plain", [1.0], peak_bytes=1000))
    now = saved(tmp_path / "new.json", row("plain", new, **{"peak_bytes": 1000, **extra}))
    assert report.main([now, "--against", old, "--threshold", "1.1"]) == code
    assert "1 rows compared" in capsys.readouterr().out


def test_a_row_that_fails_now_is_a_regression(tmp_path, capsys) -> None:
    gone, kept = row("mflow_kernels, stored", [1.0]), row("plain", [1.0])
    old = saved(tmp_path / "old.json", gone, kept)
    failed = {"name": gone["fullname"], "outcome": "failed", "reason": "AssertionError: off"}
    assert report.main([saved(tmp_path / "n.json", kept, missing=(failed,)), "--against", old]) == 1
    assert "AssertionError: off" in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path, capsys) -> None:
    old = saved(tmp_path / "old.json", row("plain", [1.0]))
    new = saved(tmp_path / "new.json", row("plain", [1.0], device="a GPU"))
    assert report.main([new, "--against", old]) == 2
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "a.json")])
    assert "a.json: expected the JSON of pytest --benchmark-json" in capsys.readouterr().err
