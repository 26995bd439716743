"""The default run measures the claims, and its end says what holds, fails and was left out."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_process import ROOT

from benchmarks import bench_claims
from benchmarks.harness.measurements import interleaved, uncertainty

PLUGIN = """
import os
import time
from benchmarks import bench_claims
from benchmarks.harness.claims import Claim
from benchmarks.harness.session import Group, Measured, Missing

def made(variant):
    if variant == "absent":
        raise Missing("absent is not installed (no module)")
    if variant == "mflow_kernels" and os.environ["FAKE"] == "wrong":
        raise AssertionError("mflow_kernels: z: largest error 1")
    return lambda: lambda: time.sleep(0.01 if variant == "mflow_kernels" else 0.001)

def measure(bench):
    measured = Measured()
    measured.compare(bench, group.variants, made, 3)
    return measured

group = Group("a group", ("word",), ("mflow_kernels", "peer", "absent"), measure)
bench_claims.claims = lambda gpu: [Claim("k", "It is fast", (group,), "mflow_kernels", ("peer",))]
"""


@pytest.mark.parametrize(("fake", "code"), [("slow", 0), ("wrong", 1)])
def test_only_wrong_values_fail_a_run(tmp_path: Path, fake: str, code: int) -> None:
    (tmp_path / "plugin_of_a_test.py").write_text(PLUGIN)
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    env |= {"FAKE": fake, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    out = tmp_path / "results.json"
    command = ["-m", "pytest", "benchmarks/", "--benchmark-only", "-p", "plugin_of_a_test",
               "--device", "cpu", "--benchmark-json", str(out)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    shown = done.stdout
    assert "[1/1, 0:0" in shown
    assert "left out, 1 rows: absent is not installed (no module) (a group)." in shown
    assert 'pip install -e ".[bench]"' in shown
    assert "pytest benchmarks/ --benchmark-only --full" in shown
    verdict = "1 WRONG" if code else "1 misses"
    assert f"{verdict}, " in shown.split("1 claims:")[1]
    rows = json.loads(out.read_text())
    assert {r["outcome"] for r in rows["not_measured"]} == {
        "skipped",
        *(["failed"] if code else []),
    }
    assert (tmp_path / "results.png").exists()


def test_claims_need_variants_that_their_groups_have() -> None:
    for gpu in (False, True):
        claims = bench_claims.claims(gpu)
        assert len({claim.key for claim in claims}) == len(claims)
        for claim in claims:
            assert claim.groups, claim.key
            for group in claim.groups:
                assert claim.ours in group.variants
                assert set(claim.peers) & set(group.variants), claim.key
    names = [group.name for group in bench_claims.groups("default", False)]
    assert len(set(names)) == len(names)


def test_rounds_go_on_while_ratios_are_noisy() -> None:
    assert uncertainty([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]) == 0
    few, many = ([[1.0] * (2 * n), [1.0, 1.5] * n] for n in (2, 200))
    assert uncertainty(few) > 5 * uncertainty(many) > 0
    waits = itertools.cycle([0.0, 0.01])

    def noisy() -> None:
        torch.empty(int(1e7 * next(waits))).zero_()

    steady = {"a": lambda: lambda: None}
    assert len(interleaved(steady, 3, torch.device("cpu"), "wall", most=9)["a"]) == 3
    both = {"a": lambda: lambda: torch.empty(10**6).zero_(), "b": lambda: noisy}
    taken = interleaved(both, 3, torch.device("cpu"), "wall", most=9)
    assert 3 <= len(taken["a"]) <= 9
