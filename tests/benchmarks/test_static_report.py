"""The static report on its quick set, and on kernels that are wasteful on purpose.

The report runs in a process of its own: it takes Triton's interpreter off, which a test process
under TRITON_INTERPRET=1 needs on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._ptx import access_bytes

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def test_quick_set_compiles_and_its_exit_code_says_what_its_rows_say(tmp_path: Path) -> None:
    saved = tmp_path / "static.json"
    done = run(
        "-m", "benchmarks.static_report", "--quick", "--target", "sm_90", "--json", str(saved)
    )
    rows = json.loads(saved.read_text())
    assert done.returncode == int(any(row["faults"] for row in rows)), done.stdout + done.stderr
    ours = [row for row in rows if row["variant"] != "csrc"]
    assert {"mix_kernel", "coupling_fwd_kernel", "actnorm_bwd_kernel"} <= {
        row["kernel"] for row in ours
    }
    for row in ours:
        if not row["faults"]:
            assert 0 < row["registers"] <= 255
            assert row["blocks"] >= 1
    # C = 12 in contiguous layout: P is a multiple of 4, all of actnorm's accesses are of 16 bytes.
    assert all(row["share16"] == 1 for row in ours if row["kernel"] == "actnorm_fwd_kernel")
    assert list(tmp_path.iterdir()) == [saved]


PLANTED = """
import sys
import torch
import triton
import triton.language as tl
from benchmarks import static_report
from benchmarks._cases import Case, Operation

@triton.jit
def _narrow_kernel(x, y):
    i = tl.arange(0, 1024)
    tl.store(y + i, tl.load(x + (i ^ 1)))

@triton.jit
def _spilling_kernel(x, y):
    i = tl.arange(0, 65536)
    t = tl.load(x + i)
    tl.store(y + i, t / tl.sum(t))

@triton.jit
def _unlaunchable_kernel(x, params):
    i = tl.arange(0, 1024)
    tl.store(params + i, tl.load(x + i))

def operations(case):
    x, y = (case.tensor(16, torch.float32).detach() for _ in range(2))
    kernel = globals()[sys.argv[1]]
    yield Operation("actnorm", "forward", lambda: lambda: kernel[(1,)](x, y))

static_report.operations = operations
static_report.NATIVE = []
sys.exit(static_report.main(["--quick", "--target", "sm_80"]))
"""


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("_narrow_kernel", "x by 4 B"),
        ("_spilling_kernel", "spills"),
        # Triton's launcher has a local variable of this name: such a kernel never launches.
        ("_unlaunchable_kernel", "TypeError"),
    ],
)
def test_planted_kernels_fail_the_report(tmp_path: Path, kernel: str, fault: str) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = run(str(script), kernel)
    assert done.returncode == 1, done.stdout + done.stderr
    assert fault in done.stdout


PTX = """
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 .ptr .global .align 1 k_param_1,
    .param .u32 k_param_2
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b32 %r1, [k_param_2];
    mul.wide.s32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
    cp.async.ca.shared.global [ %r6 + 0 ], [ %rd4 + 16 ], 0x4, %r7;
    st.global.b16 [ %rd5 + 0 ], { %rs1 };
    st.shared.v4.b32 [ %r6 + 0 ], { %r2, %r3, %r4, %r5 };
"""


def test_accesses_are_attributed_through_address_arithmetic() -> None:
    assert access_bytes(PTX, ["x", "y"]) == {"x": [16, 4], "y": [2]}


def test_an_access_whose_address_was_chosen_counts_for_each_argument() -> None:
    chosen = PTX.replace("@%p1 ld", "selp.b64 %rd4, %rd4, %rd5, %p2;\n    @%p1 ld")
    assert access_bytes(chosen, ["x", "y"]) == {"x": [16, 4], "y": [16, 4, 2]}
    places = "mov.b32 %r8, k_param_0;\n mov.b32 %r9, k_param_1;\n selp.b32 %r7, %r8, %r9, %p2;\n"
    loaded = PTX.replace("ld.param.b64 %rd1, [k_param_0]", places + "ld.param.b64 %rd1, [%r7]")
    assert access_bytes(loaded, ["x", "y"]) == {"x": [16, 4], "y": [16, 4, 2]}


def test_an_access_of_no_argument_is_an_error() -> None:
    lost = PTX.replace("add.s64 %rd4, %rd1, %rd3", "mov.b64 %rd4, %rd3")
    with pytest.raises(ValueError, match="no argument owns"):
        access_bytes(lost, ["x", "y"])
