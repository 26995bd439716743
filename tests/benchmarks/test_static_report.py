"""The static report, on its quick set and on kernels with planted faults.

The report runs in a process of its own, because it turns off Triton's interpreter, which a test
process under TRITON_INTERPRET=1 needs.
"""

import json
from pathlib import Path

import pytest
from own_process import run_python

from benchmarks.reports.ptx import access_bytes


@pytest.mark.long
def test_quick_set_compiles_without_a_fault(tmp_path: Path) -> None:
    """This takes two minutes of CPU time: every kernel is compiled for eight architectures."""
    saved = tmp_path / "static.json"
    done = run_python("-m", "benchmarks.reports.static", "--quick", "--json", str(saved))
    rows = json.loads(saved.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [row for row in rows if row["faults"]]
    nvidia = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {row["target"] for row in rows} == nvidia | {"gfx90a", "gfx942"}
    models = [row for row in rows if row["variant"] != "csrc"]
    # Every kernel of the flow but actnorm's, and those of a coupling network.
    assert len({row["kernel"] for row in models}) == 8 + 5
    for row in models:
        assert row["layout"] in ("channels_last", "vectors")
        assert 0 < row["registers"] <= (512 if row["target"].startswith("gfx") else 255)
        assert row["blocks"] >= 1
    assert list(tmp_path.iterdir()) == [saved]


RECORDED = """
from dataclasses import replace
from unittest import mock

import torch
from benchmarks.reports import aot, recorded
from mflow_kernels.ops.written import written_arguments
from mflow_kernels.reversible import backward
from triton.runtime.jit import JITFunction

def of_walk(model):
    found = [launch for _, launch in recorded.record(model)]
    assert len(found) > 30
    return {launch.key for launch in found}

def of_real_tensors(model):
    found, flow = [], recorded._build(model)
    x = torch.zeros(recorded.BATCH, *model.image_shape)

    def note(kernel, *args, grid, warmup, **options):
        found.append(aot.Launch(kernel, args, options, grid))
        for argument, is_result in zip(args, written_arguments(kernel)):
            result = argument[0] if isinstance(argument, tuple) else argument
            if is_result and isinstance(result, torch.Tensor):
                result.detach().zero_()  # in place of what the kernel computes

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(backward, "check_repeats", return_value=None),  # nothing is computed
        torch.autocast("cpu", torch.bfloat16, enabled=model.dtypes[1] == torch.bfloat16),
    ):
        for run in recorded._runs(flow, x):
            run()
    return {launch.key for launch in found}

few = dict(image_shape=(3, 8, 24), manifold_dims=(64,), steps=(3,))
models = [replace(m, **few) for m in recorded.models() if m.name == "odd sizes"]
# Every kind of chain with 16-bit networks, and the reversible kind with float32 networks too.
models = [m for m in models if m.dtypes[1] != torch.float32 or m.chain == "reversible"]
walked = [of_walk(model) for model in models]
assert len({frozenset(found) for found in walked}) == len(models)
assert walked == [of_real_tensors(model) for model in models]
"""


@pytest.mark.long
def test_models_on_real_tensors_make_the_recorded_launches() -> None:
    """The states that a chain keeps and the dtype of its networks change them."""
    done = run_python("-c", RECORDED)
    assert done.returncode == 0, done.stdout + done.stderr


PLANTED = """
import contextlib
import io
import sys

import torch
import triton
import triton.language as tl
from benchmarks.reports import aot as _aot
from benchmarks.reports import static as static_report
from benchmarks.reports.recorded import Recorded

@triton.jit
def _sound_kernel(x, y):
    i = tl.arange(0, 1024)
    tl.store(y + i, tl.load(x + i))

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

x, y = (torch.zeros(2, 16, 64, 64) for _ in range(2))
kernels = _sound_kernel, _narrow_kernel, _spilling_kernel, _unlaunchable_kernel
planted = [Recorded("planted", _aot.Launch(kernel, (x, y), {}, (1,))) for kernel in kernels]
static_report.NATIVE = []
static_report.network_launches = lambda size, target: []

def report(recorded, *options):
    static_report.launches_of = lambda size: recorded
    with contextlib.redirect_stdout(io.StringIO()):
        return static_report.main(["--quick", "--target", "sm_80", *options])

report(planted, "--json", sys.argv[1])
print(*(report([one]) for one in planted))
"""


@pytest.mark.long
def test_planted_kernels_fail_the_report(tmp_path: Path) -> None:
    script, saved = tmp_path / "planted.py", tmp_path / "rows.json"
    script.write_text(PLANTED)
    done = run_python(str(script), str(saved))
    faults = {row["kernel"]: " ".join(row["faults"]) for row in json.loads(saved.read_text())}
    assert faults["sound_kernel"] == ""
    assert "x by 4 B" in faults["narrow_kernel"]
    assert "spills" in faults["spilling_kernel"]
    # Triton's launcher has a local variable `params`, so this kernel cannot launch.
    assert "not compiled: TypeError" in faults["unlaunchable_kernel"]
    # The exit codes of the report on each kernel.
    assert done.stdout.split() == ["0", "1", "1", "1"], done.stdout + done.stderr


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


def test_an_access_to_a_selected_address_counts_for_each_argument() -> None:
    chosen = PTX.replace("@%p1 ld", "selp.b64 %rd4, %rd4, %rd5, %p2;\n    @%p1 ld")
    assert access_bytes(chosen, ["x", "y"]) == {"x": [16, 4], "y": [16, 4, 2]}
    places = "mov.b32 %r8, k_param_0;\n mov.b32 %r9, k_param_1;\n selp.b32 %r7, %r8, %r9, %p2;\n"
    loaded = PTX.replace("ld.param.b64 %rd1, [k_param_0]", places + "ld.param.b64 %rd1, [%r7]")
    assert access_bytes(loaded, ["x", "y"]) == {"x": [16, 4], "y": [16, 4, 2]}


def test_an_access_to_no_argument_is_an_error() -> None:
    lost = PTX.replace("add.s64 %rd4, %rd1, %rd3", "mov.b64 %rd4, %rd3")
    with pytest.raises(ValueError, match="no argument owns"):
        access_bytes(lost, ["x", "y"])
