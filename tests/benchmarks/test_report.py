"""Pages show the figures of the kept results, and runs can be reported and compared."""

import re
from pathlib import Path

import pytest
from PIL import Image
from runs_of_claims import row, saved

from benchmarks import compare, report
from benchmarks.harness import pages
from benchmarks.harness.claims import HOLDS, MISSES, NOISE, Claim, figures, text, verdict
from benchmarks.harness.saved_runs import kept, merged, runs
from benchmarks.harness.session import Group

GROUP = Group("a group", (), ("ours", "peer", "other"), lambda bench: None)
TIME = Claim("k", "It is fast", (GROUP,), "ours", ("peer", "other"))
MEMORY = Claim("m", "It is small", (GROUP,), "ours", ("peer",), 0.5, memory=True)


@pytest.fixture(scope="module")
def results():
    return runs(merged([report.RESULTS]))


def test_every_page_shows_the_kept_results(results) -> None:
    for path, page in report.written_pages(results).items():
        assert path.read_text() == page, f"{path}: python -m benchmarks.report"


def test_every_picture_was_drawn_from_the_kept_results() -> None:
    for name in ("comparison", "splines", "claims"):
        with Image.open(report.PICTURES / f"{name}.png") as picture:
            assert picture.text["Results"] == report.digest(report.RESULTS), name


def test_the_readme_has_no_figure_of_speed_beside_the_marked_ones() -> None:
    readme = (report.ROOT / "README.md").read_text()
    performance = readme[
        readme.index("docs/pictures/comparison.png") : readme.index("## Two moons")
    ]
    performance += readme[readme.index("## Performance") : readme.index("## More")]
    assert len(pages.FIGURE.findall(performance)) > 8
    assert not re.findall(r"\d+\.\d+", pages.FIGURE.sub("", performance))


def test_a_figure_changed_by_hand_is_replaced(tmp_path: Path) -> None:
    rows = row("ours", [1.0, 1.0]), row("peer", [2.0, 2.0]), row("other", [4.0, 4.0])
    known = pages.values([TIME], runs(merged([saved(tmp_path / "a.json", *rows)])))
    assert known["k.ratio"] == "0.50"
    assert (known["k.peer"], known["k.other"], known["date"]) == ("0.50", "0.25", "2026-12-07")
    page = "takes <!--=k.ratio-->0.40<!--/--> of it\n<!-- table: t -->\nold\n<!-- /table -->\n"
    expected = "takes <!--=k.ratio-->0.50<!--/--> of it\n<!-- table: t -->\nnew\n<!-- /table -->\n"
    assert pages.written(page, known, {"t": lambda: "new"}) == expected
    with pytest.raises(ValueError, match=r"no figure 'k\.gain'"):
        pages.written("<!--=k.gain-->2<!--/-->", known, {})
    with pytest.raises(ValueError, match="table: expected one of"):
        pages.written("<!-- table: u -->\n<!-- /table -->", known, {})


@pytest.mark.parametrize(
    ("ours", "said"),
    [([1.0, 1.1, 1.2], HOLDS), ([3.0, 3.1, 3.2], MISSES), ([1.9, 2.0, 2.2], NOISE)],
)
def test_quartiles_decide_a_claim(tmp_path: Path, ours, said) -> None:
    rows = row("ours", ours), row("peer", [2.0, 2.0, 2.0]), row("other", [9.0, 9.0, 9.0])
    found = runs(merged([saved(tmp_path / "a.json", *rows)])).rows
    each = figures(TIME, found)
    assert verdict(TIME, max(each, key=lambda figure: figure.ratio)) == said
    shown = text([TIME, MEMORY], found, set())
    assert re.search(rf"peer, 2 s +{ours[1] / 2:.2f} \[", shown)  # the faster of the two peers
    assert "1 not measured" in shown  # no row has a peak
    assert "2 WRONG" in text([TIME, MEMORY], found, {"a group"})


def test_peaks_are_compared_with_the_smallest(tmp_path: Path) -> None:
    rows = [row(v, [1.0], peak_bytes=b) for v, b in (("ours", 2**20), ("peer", 4 * 2**20))]
    found = runs(merged([saved(tmp_path / "a.json", *rows)])).rows
    (figure,) = figures(MEMORY, found)
    assert (figure.ratio, verdict(MEMORY, figure)) == (0.25, HOLDS)
    assert "1.0 MiB" in text([MEMORY], found, set())


def test_a_report_has_ratios_of_paired_rounds_and_what_was_left_out(tmp_path, capsys) -> None:
    skipped = {"name": "x::y", "outcome": "skipped", "reason": "nflows is not installed"}
    rows = [row("ours", [1.0, 4.0, 4.0], peak_bytes=2**21), row("plain", [2.0, 5.0, 16.0])]
    file = saved(tmp_path / "a.json", *rows, missing=(skipped,))
    assert report.main([str(file)]) == 0
    page = capsys.readouterr().out
    assert "| a group | 4 s | 0.50 [0.38, 0.65] |" in page
    assert "| a group | 2.00 | - |" in page
    assert "skipped: nflows is not installed (1 rows" in page
    assert report.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.md", "ratios.png"}


def test_what_is_kept_of_a_run_reads_the_same(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.json", row("ours", [1.00004]), row("peer", [2.0], peak_bytes=8))
    whole = merged([file])
    (tmp_path / "b.json").write_text(kept(whole))
    again = runs(merged([tmp_path / "b.json"]))
    assert [r.extra for r in again.rows] == [r.extra for r in runs(whole).rows]
    assert [r.rounds for r in again.rows] == [[1.0], [2.0]]


def test_two_runs_are_compared(tmp_path: Path, capsys) -> None:
    before = saved(tmp_path / "a.json", row("slower", [1.0, 1.01], peak_bytes=100),
                   row("same", [1.0, 1.2]), row("gone", [1.0]))  # fmt: skip
    after = saved(tmp_path / "b.json", row("slower", [2.0, 2.02], peak_bytes=50),
                  row("same", [1.1, 1.15]), row("new", [1.0]))  # fmt: skip
    assert compare.main([str(before), str(after)]) == 0
    shown = capsys.readouterr().out
    assert "3 figures in both runs, 2 moved" in shown
    assert re.search(r"a group: slower +time .* 2\.00 \[1\.9\d, 2\.0\d\]", shown)
    assert re.search(r"a group: slower +memory .* 0\.50", shown)
    assert "a group: same" not in shown
    assert "only in the first run, 1:\n  a group: gone" in shown
    assert "only in the second run, 1:\n  a group: new" in shown


def test_files_that_are_not_results(tmp_path, capsys) -> None:
    (tmp_path / "a.json").write_text("{}")
    for command in (report.main, lambda files: compare.main(2 * files)):
        with pytest.raises(SystemExit) as stopped:
            command([str(tmp_path / "a.json")])
        assert stopped.value.code == 2
        assert "a.json: expected the JSON of pytest --benchmark-json" in capsys.readouterr().err
