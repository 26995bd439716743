"""The workflow files and CITATION.cff are valid, and agree with the rest of the repository."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import mflow_kernels

ROOT = Path(__file__).parent.parent


def test_workflow_runs_the_test_command_on_the_supported_versions() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in [step.get("run") for step in jobs["tests"]["steps"]]
    script = (ROOT / "tests" / "versions").read_text()
    (pairs,) = re.findall(r"set -- ([\d.: ]+)$", script, re.MULTILINE)
    matrix = jobs["versions"]["strategy"]["matrix"]
    listed = [f"{row['python']}:{row['torch']}" for row in matrix["include"]]
    assert set(listed) <= set(pairs.split())
    assert {pair.split(":")[0] for pair in pairs.split()} == set(
        jobs["tests"]["strategy"]["matrix"]["python"]
    )


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("sm_90 8 spills", True),
        ("sm_90 not compiled: the program stores nothing", False),
        ("sm_90 does not fit", False),
    ],
)
def test_a_version_fails_if_a_launch_has_no_program(
    line: str, passes: bool, tmp_path: Path
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho '{line}'\necho 'worst: 1 of 2 configurations fail; more'\n")
    python.chmod(0o755)
    script = (ROOT / "tests" / "versions").read_text()
    (function,) = re.findall(r"^launches\(\) .*?^}$", script, re.MULTILINE | re.DOTALL)
    command = f"here={tmp_path} log={tmp_path}/log\n{function}\nlaunches"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "1 of 2 configurations fail\n"
    assert (done.returncode == 0) == passes


def test_citation_names_version_and_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert citation["version"] == mflow_kernels.__version__
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2206.03293"
