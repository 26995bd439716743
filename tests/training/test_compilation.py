"""Kernels compiled before the first step, with Triton's compiler and no GPU."""

import pytest
from own_process import run_python

pytest.importorskip("triton")

SCRIPT = """
import os
import sys

os.environ |= {"TRITON_CACHE_DIR": sys.argv[1], "MFLOW_NETWORK": "fused"}
import torch
from unittest import mock
from triton.runtime.jit import JITFunction
from benchmarks.reports import aot
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.ops import coupling_network_kernels
from mflow_kernels.reversible import backward
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.folder import build_model
from mflow_kernels.training.compilation import compile_kernels
from mflow_kernels.training.memory import resolve_config

target = "sm_80"
aot.choose_tiles_of(target)
options = {"image_size": 8, "levels": 2, "steps": 2, "width": 16, "manifold_dim": 8}
options |= {"batch_size": 2, "precision": "bfloat16", "domain": "latent", "stages": []}
config = resolve_config(TrainConfig(**options), 3, gpu=True)
threads = 2
compiled = compile_kernels(config, torch.device("cpu"), threads)

model = build_model(config)
for module in model.modules():
    if hasattr(module, "initialized"):
        module.initialized.fill_(True)
x = dequantize(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), config.n_bits)

def step():
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = model.terms_and_log_prob(x, stage=0)
    terms.loss.mean().backward()

launches = []

def note(kernel, *args, grid, warmup, **options):
    launches.append(aot.Launch(kernel, args, options, grid))

repeats = mock.patch.object(backward, "check_repeats", return_value=None)  # nothing is computed
with repeats, mock.patch.object(JITFunction, "run", note):
    step()

def known(kernel):
    cache, *_ = kernel.device_caches[target]
    return len(cache)

assert any(launch.kernel is coupling_network_kernels._dh1_kernel for launch in launches)
before = {launch.kernel: known(launch.kernel) for launch in launches}
for launch in launches:
    assert not aot.compile_for(launch, target).error
missed = [k.__name__ for k, count in before.items() if known(k) > count]
assert not missed, f"compiled at their first launch: {missed}"
assert compiled >= sum(before.values()), (compiled, before)
"""


def test_no_kernel_of_a_training_step_is_left_to_its_first_launch(tmp_path):
    """A step on real tensors finds all of its kernels in the memory of the process. It takes over
    10 s, because Triton compiles each kernel of a step into an empty cache."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_python(str(script), str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_cannot_be_compiled_does_not_end_training(tmp_path):
    """It takes about 10 s, because every stage of the compiler before the failing one runs."""
    script = tmp_path / "script.py"
    text = (
        SCRIPT.partition("threads = 2")[0]
        + """
from triton.backends.nvidia import compiler
with mock.patch.object(compiler.CUDABackend, "make_cubin", side_effect=OSError("no assembler")):
    compile_kernels(config, torch.device("cpu"), 1)
"""
    )
    script.write_text(text)
    done = run_python(str(script), str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a kernel was not compiled before training: no assembler" in done.stderr
