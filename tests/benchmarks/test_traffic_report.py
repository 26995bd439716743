"""The traffic report, on its quick set and on kernels with planted faults.

The report runs in a process of its own, because it replaces Triton's driver.
"""

import json
from pathlib import Path

import pytest
from own_process import run_python

from mflow_kernels.ops.rebuild_conv1x1 import MOST_SLICED

FUSED = ("coupling_conv1x1", "forward")


@pytest.mark.long
def test_quick_set_counts_bytes_without_a_fault(tmp_path: Path) -> None:
    saved = tmp_path / "traffic.json"
    done = run_python("-m", "benchmarks.reports.traffic", "--quick", "--json", str(saved))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(saved.read_text())
    rows, launches = content["bytes"], content["launches"]
    assert not [row for row in [*rows, *launches] if row["fault"]]
    assert list(tmp_path.iterdir()) == [saved]
    assert all(row["ratio"] >= 1 for row in rows)
    # C = 12, P = 64, float32: the fused step reads the state and its params, writes a state.
    (fused,), (wide,) = (
        [r for r in rows if (r["operation"], r["direction"], r["c"]) == (*FUSED, c)]
        for c in (12, 136)
    )
    state = 12 * 64 * 4
    assert (fused["loaded"], fused["stored"], fused["fewest"]) == (2 * state, state, 3 * state)
    narrow = [row for row in rows if row["c"] <= 48]
    # Only a coupling's gradient, which reads half of x, requests some sectors more than once.
    assert {row["kernel"] for row in narrow if row["sectors"] > 1} == {
        "coupling_conv1x1_bwd_kernel"
    }
    assert max(row["sectors"] for row in narrow) < 1.14
    # Tiles are powers of two: 16 places for 12 channels. No warp repeats another's product.
    assert {round(row["products"], 2) for row in narrow} == {0, 1.33, 1.78}
    # Above C = 128, the product reads the state once for each block of output channels.
    assert wide["reads"] == 2
    # Up to this C, the launch that rebuilds a 1x1 convolution reads its states once.
    rebuilt = [row for row in rows if row["kernel"].startswith("rebuild_conv1x1")]
    assert {row["c"] for row in rebuilt if row["reads"] == 1} == {
        c for c in (12, 24, 48, 96) if c <= MOST_SLICED
    }
    assert {row["states"] for row in launches if row["direction"] == "forward"} == {5}


PLANTED = """
import torch
import triton
import triton.language as tl
from benchmarks.reports import traffic_counts as _traffic
from benchmarks.reports import traffic as traffic_report
from benchmarks.reports.cases import Case
from mflow_kernels import ops
from mflow_kernels.ops import channel_products
from ptx.launch import Violation

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
for kernel in (_plain_kernel, _twice_kernel, _strided_kernel, _outside_kernel):
    try:
        (launch,) = _traffic.count(lambda: lambda: kernel[(4,)](x, y, SIZE=x.numel()))
    except Violation as violation:
        print(*str(violation).split())
        continue
    row = traffic_report.row("planted", "forward", case, True, launch)
    print(row.loaded, row.stored, row.fewest, row.fault or row.sectors)

case = Case(48, n=1, side=8, channels_last=True)
x, weight = case.tensor(48, torch.float32).detach(), torch.eye(48)
tile = channel_products.conv1x1_tile
for warps in (4, 8):
    channel_products.conv1x1_tile = lambda c: tile(c)._replace(warps=warps)
    (launch,) = _traffic.count(lambda: lambda: ops.conv1x1(x, weight))
    print(traffic_report.row("planted", "forward", case, True, launch).fault or "none")
"""


@pytest.mark.long
def test_planted_kernels(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = run_python(str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    plain, twice, strided, outside, four_warps, eight_warps = done.stdout.splitlines()
    assert plain == "12288 12288 24576 1.0"  # the fourth program is wholly masked off
    assert twice.startswith("24576 12288 24576 over 1.05")
    assert strided.startswith("6144 6144 12288 over 1.15 of the sectors")
    assert "past the 12288 bytes of y" in outside
    assert four_warps == "none"
    assert eight_warps == "over 1.8 of the products"  # warps that repeat a product
