"""gpu_run.sh rehearsed on a CPU, and with parts that fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"


def run(
    out: Path, *arguments: str, path: Path | None = None, **env: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the script into a folder, with `path` first on PATH. Return the process and its log."""
    first = path or Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{first}{os.pathsep}{os.environ['PATH']}", **env}
    # pytest-benchmark would disable itself if it saw pytest-xdist's variables.
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_XDIST")}
    command = [str(SCRIPT), str(out), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done, (out / "log.txt").read_text() if out.is_dir() else ""


@pytest.mark.long
def test_a_rehearsal_measures_every_kind_of_row(tmp_path: Path) -> None:
    """This takes about 30 s of CPU time, because six processes import torch."""
    done, log = run(tmp_path / "out", "--rehearse", MFLOW_COMMIT="abc123", MFLOW_SECONDS="3600")
    assert done.returncode == 0, log[-3000:]
    assert "all parts passed" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not [row for row in results["not_measured"] if row["outcome"] == "failed"]
    rows = results["benchmarks"]
    kinds = {row["fullname"].split("::")[0].split("_")[-1] for row in rows}
    # The claims, splines and autoregressive layers are measured on CPUs.
    assert kinds == {f"{kind}.py" for kind in report.KINDS} - {
        f"{kind}.py" for kind in ("claims", "splines", "autoregressive")
    }
    assert all(row["extra_info"]["commit"] == "abc123" for row in rows)
    for row in rows:
        assert min(row["stats"]["data"]) > 0
        assert {"device", "torch", "triton", "mflow_kernels"} <= row["extra_info"].keys()
    trained = [r["extra_info"] for r in rows if r["extra_info"].get("task") == "train"]
    assert {"mflow_kernels, stored", "mflow_kernels, reversible", "plain", "checkpointing"} <= {
        extra["variant"] for extra in trained
    }
    assert all(e["peak_bytes"] > 4 * e["parameters"] for e in trained if "peak_bytes" in e)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "coupling_conv1x1 backward" in page
    assert (tmp_path / "out" / "ratios.png").stat().st_size > 1000
    assert "measured ms" in (tmp_path / "out" / "forecast.txt").read_text()


def test_a_rehearsal_has_no_limits_for_its_parts(tmp_path: Path) -> None:
    """Limits would make it fail on a busy machine."""
    bin = fake_command(tmp_path / "bin", "")
    for arguments, limits in ((["--rehearse"], range(90_000, 100_001)), ([], range(20, 151))):
        done, log = run(tmp_path / "out", *arguments, path=bin, MFLOW_SECONDS="100000")
        shown = [int(t) for t in re.findall(r"\(at most (\d+) s\)", done.stdout)]
        assert len(shown) == (9 if arguments else 10), log  # kernels are checked on a GPU alone
        assert all(limit in limits for limit in shown)


def fake_command(folder: Path, python: str, name: str = "python3") -> Path:
    """Create a folder for PATH with a shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{python}\n")
    (folder / name).chmod(0o755)
    return folder


def test_failed_parts_are_named_at_the_end_and_do_not_stop_others(tmp_path: Path) -> None:
    python = 'case "$*" in *tests/ops*|*"--shard 1/"*) exit 3 ;; *models.py*) exit 4 ;; esac'
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "parts" / "old.json").write_text("of an earlier run")
    done, _ = run(tmp_path / "out", path=fake_command(tmp_path / "bin", python))
    assert done.returncode == 1
    failed = done.stdout[done.stdout.index("failed, after") :].splitlines()[1:]
    assert failed == ["  tests (exit code 1)", "  check (exit code 1)", "  models (exit code 4)"]
    assert "== report: exit code 0" in done.stdout
    assert "old.json" not in done.stdout


def test_every_test_that_needs_a_gpu_runs_in_one_share_per_core(tmp_path: Path) -> None:
    python = 'echo "args: $*"; case "$*" in *"--shard 2/3"*) exit 5 ;; esac'
    bin = fake_command(tmp_path / "bin", python)
    fake_command(bin, '[ -z "$OMP_NUM_THREADS" ] && echo 3', "nproc")
    done, log = run(tmp_path / "out", path=bin)
    assert done.returncode == 0  # an empty share (exit code 5) is not a failure
    for i in (1, 2, 3):
        assert len(re.findall(rf"^args: -m pytest -m gpu .*--shard {i}/3$", log, re.M)) == 1
    command = re.search(r"^args: -m pytest -m gpu (.*) -p ", log, re.M)
    assert command
    assert "--ignore" not in command[1]
    given = [ROOT / path for path in command[1].split()]
    # A mark, or a fixture of conftest.py with a GPU among its devices. Device is of tests/ptx.
    mark, fixture = r"^@pytest\.mark\.gpu$", r"^def test_\w+\([^)]*\b(kernel_)?device\b(?!: Device)"
    on_gpu = re.compile(f"{mark}|{fixture}", re.M)
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if on_gpu.search(p.read_text())]
    assert len(files) > 15
    for path in files:
        assert any(path.is_relative_to(folder) for folder in given), path


def test_tests_that_need_missing_packages_are_left_out(tmp_path: Path) -> None:
    python = 'case "$*" in *lightning*) exit 1 ;; esac; echo "args: $*"'
    done, log = run(tmp_path / "out", path=fake_command(tmp_path / "bin", python))
    assert done.returncode == 0
    assert "no packages of mflow_kernels[train]" in done.stdout
    assert re.search(r"^args: .* --ignore tests/models/test_plain_glow.py -p ", log, re.M)
    assert "test_graph_runs.py" not in log


def test_a_part_gets_no_more_time_than_is_left(tmp_path: Path) -> None:
    done, _ = run(tmp_path / "out", path=fake_command(tmp_path / "bin", ""), MFLOW_SECONDS="31")
    assert done.returncode == 1
    assert "  tests (no time left)" in done.stdout


def test_the_folder_is_required_and_must_be_one(tmp_path: Path) -> None:
    done = subprocess.run([str(SCRIPT), "--rehearse"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "benchmarks/gpu_run.sh OUT_FOLDER [--rehearse]" in done.stderr
    (tmp_path / "out").write_text("a file")
    assert run(tmp_path / "out")[0].returncode == 2
