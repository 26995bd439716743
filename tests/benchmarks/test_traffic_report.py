"""The traffic report, on its quick set and on kernels with planted faults.

The report runs in a process of its own, because it replaces Triton's driver.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def test_quick_set_counts_bytes_and_its_exit_code_follows_its_rows(tmp_path: Path) -> None:
    saved = tmp_path / "traffic.json"
    done = run("-m", "benchmarks.reports.traffic", "--quick", "--json", str(saved))
    content = json.loads(saved.read_text())
    rows, launches = content["bytes"], content["launches"]
    faults = any(row["fault"] for row in [*rows, *launches])
    assert done.returncode == int(faults), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [saved]
    assert all(row["ratio"] >= 1 for row in rows)
    # C = 12, P = 256, float32: the fused step reads the state and its params, writes a state.
    (fused,) = [
        row
        for row in rows
        if (row["operation"], row["direction"], row["c"]) == ("coupling_conv1x1", "forward", 12)
    ]
    state = 12 * 256 * 4
    assert (fused["loaded"], fused["stored"], fused["fewest"]) == (2 * state, state, 3 * state)
    assert fused["sectors"] == 1  # contiguous rows of whole sectors
    # Above C = 128, the product reads the state once for each block of output channels.
    (wide,) = [
        row
        for row in rows
        if (row["operation"], row["direction"], row["c"]) == ("coupling_conv1x1", "forward", 136)
    ]
    assert wide["reads"] == 2
    assert {row["states"] for row in launches if row["direction"] == "forward"} == {5}


PLANTED = """
import sys
import torch
import triton
import triton.language as tl
from benchmarks.reports import traffic_counts as _traffic
from benchmarks.reports import traffic as traffic_report
from benchmarks.reports.cases import Case

@triton.jit
def _plain_kernel(x, y, SIZE: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + i, tl.load(x + i, mask=i < SIZE, other=0.0), mask=i < SIZE)

@triton.jit
def _twice_kernel(x, y, SIZE: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    t = tl.load(x + i, mask=i < SIZE, other=0.0)
    t += tl.load(x + SIZE - 1 - i, mask=i < SIZE, other=0.0)
    tl.store(y + i, t, mask=i < SIZE)

@triton.jit
def _outside_kernel(x, y, SIZE: tl.constexpr):
    tl.store(y + SIZE + tl.program_id(0), tl.load(x))

@triton.jit
def _strided_kernel(x, y, SIZE: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + i, tl.load(x + 2 * i, mask=2 * i < SIZE, other=0.0), mask=2 * i < SIZE)

case = Case(12, n=1, side=16)
x, y = (case.tensor(12, torch.float32).detach() for _ in range(2))
kernel = globals()[sys.argv[1]]
(launch,) = _traffic.count(lambda: lambda: kernel[(4,)](x, y, SIZE=x.numel()))
row = traffic_report.row("planted", "forward", case, True, launch)
print(row.loaded, row.stored, row.fewest, row.fault or row.sectors)
sys.exit(int(bool(row.fault)))
"""


@pytest.mark.parametrize(
    ("kernel", "code", "expected"),
    [
        ("_plain_kernel", 0, "12288 12288 24576 1.0"),  # the fourth program is wholly masked off
        ("_twice_kernel", 1, "24576 12288 24576 over 1.05"),
        # A thread moves four neighbouring words one by one. The words of one request are 32 bytes
        # apart in x and 16 in y, so one or two of them share a sector.
        ("_strided_kernel", 0, "6144 6144 12288 6.0"),
        ("_outside_kernel", 1, "past the 12288 bytes of y"),
    ],
)
def test_planted_kernels(tmp_path: Path, kernel: str, code: int, expected: str) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = run(str(script), kernel)
    assert done.returncode == code, done.stdout + done.stderr
    assert expected in done.stdout + done.stderr
