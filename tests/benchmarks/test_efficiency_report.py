"""The efficiency report: its rules, and that no launch is above its recorded figures."""

import json
from pathlib import Path

import pytest
from own_process import ROOT, run_python

# Importing the report turns off Triton's interpreter, so this runs in a process of its own.
RULES = """
from types import SimpleNamespace

from benchmarks.reports import aot
from benchmarks.reports.efficiency import _full
from benchmarks.reports.programs import loaded, products

PROGRAM = '''
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [2, 4], instrShape = [16, 8]}>
    %c0_i32 = arith.constant 0 : i32
    %c512_i32 = arith.constant 512 : i32
    %c128_i32 = arith.constant 128 : i32
    scf.for %tile = %0 to %TILES step %1  : i32 {
      %r = "tt.reduce"(%x) ({
      }) : (tensor<8xf32>) -> f32
      %a:2 = scf.for %i = %c0_i32 to %c512_i32 step %c128_i32 iter_args(%b = %c) -> (i32) : i32 {
        %d = ttng.warp_group_dot %e, %f : tensor<64x32xbf16, #ttg.dot_op<{parent = #mma}>> * !ttg.memdesc<32x64xbf16, #s, #smem> -> tensor<64x64xf32, #mma> loc(#l)
        %g = tt.load %h, %k, %l : tensor<64x32x!tt.ptr<bf16>> loc(#l)
      } loc(#l)
    }
    %m = tt.dot %n, %o : tensor<32x16xbf16, #x> * tensor<16x32xbf16, #y> -> tensor<32x32xf32, #mma1>
'''
launch = SimpleNamespace(grid=(4, 2), bound={"TILES": 40})
made = aot.Compiled(ttir=PROGRAM, ttgir=PROGRAM)
wide, narrow = products(launch, made)
# 8 programs have 10 tiles each and run the inner loop four times. Eight warps have 128 rows of 64.
assert wide == (64, 64, 32, True, 2.0, 8 * 10 * 4), wide
assert wide.multiplications == 2 * 64 * 64 * 32 * 320
# Two by four warps have 32 rows and 32 columns, so none repeats another.
assert narrow == (32, 32, 16, False, 1.0, 8), narrow
assert loaded(launch, made) == 64 * 32 * 2 * 320
assert _full(100, 108) == 100 / 108
assert _full(109, 108) == 109 / 216
"""  # noqa: E501


@pytest.mark.long
def test_rules(tmp_path: Path) -> None:
    script = tmp_path / "rules.py"
    script.write_text(RULES)
    done = run_python(str(script))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_no_launch_is_above_its_recorded_figures(tmp_path: Path) -> None:
    """After a change that improves a launch, write the file again: `--quick --record`."""
    file = ROOT / "benchmarks" / "reports" / "efficiency_quick.json"
    report = ("-m", "benchmarks.reports.efficiency", "--quick")
    done = run_python(*report, "--check", str(file))
    assert done.returncode == 0, done.stdout + done.stderr

    recorded = json.loads(file.read_text())
    first, second, *_ = recorded
    recorded[first]["bound"] *= 0.99
    del recorded[second]
    better = tmp_path / "better.json"
    better.write_text(json.dumps(recorded))
    done = run_python(*report, "--check", str(better))
    assert done.returncode == 1
    assert f"{first}: bound exceeds" in done.stdout
    assert f"{second}: not recorded" in done.stdout
