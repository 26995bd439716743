"""The figures of autoregressive flows, at two sizes."""

import pytest

from benchmarks import autoregressive_growth


def test_prints_tables_and_draws(tmp_path, capsys):
    pytest.importorskip("nflows")
    pytest.importorskip("matplotlib")
    autoregressive_growth.main([str(tmp_path / "growth.png"), "--tiny"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 8
    assert all(row.count(" ms") == 2 for row in (*rows[2:5], rows[-1]))
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
