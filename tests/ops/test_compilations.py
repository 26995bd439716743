"""Launches through Triton's own path, without a GPU: what they compile, and on which device."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mflow_kernels.ops.launch import KERNELS_ON_CPU, launch

COUNT = '''
"""Train, evaluate and sample a small Glow; print how many new kernels each stage compiles."""
import sys

import torch

from benchmarks.reports.aot import capture
from mflow_kernels import Glow

torch.set_default_device("meta")

compiled = set()


def stage(name, function):
    new = {launch.key for launch in capture(function)} - compiled
    compiled.update(new)
    print(name, len(new), flush=True)


kind = sys.argv[1]


def model(side):
    width = 16 if kind == "stored, networks by kernels" else 4  # 16 is the least that they take
    return Glow((3, side, side), levels=2, steps=2, width=width, reversible=kind == "reversible")


def encode(glow, n, side):
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "stored, networks by kernels"):
        return glow(torch.rand(n, 3, side, side).to(memory_format=torch.channels_last))


def train(glow, side, *batches):
    for n in batches:
        z, logdet = encode(glow, n, side)
        (sum(latent.square().sum() for latent in z) - logdet.sum()).backward()


@torch.no_grad()
def evaluate(glow, side, *batches):
    for n in batches:
        encode(glow, n, side)


@torch.no_grad()
def sample(glow, side, *batches):
    for n in batches:
        z = tuple(torch.randn(n, *shape) for shape in glow.latent_shapes)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "stored, networks by kernels"):
            glow.inverse(z)


glow = model(32)
stage("first step", lambda: train(glow, 32, 4))
stage("first sample", lambda: sample(glow, 32, 4))
stage("two epochs with a ragged batch", lambda: train(glow, 32, 4, 4, 3, 4, 4, 3))
stage("evaluation", lambda: evaluate(glow, 32, 4, 1))
stage("samples", lambda: sample(glow, 32, 3, 1))
larger = model(64)
stage("training on larger images", lambda: train(larger, 64, 2, 1))
stage("larger samples", lambda: sample(larger, 64, 2))
assert any("_network_kernel" in key for key in compiled) == (kind == "stored, networks by kernels")
'''


@pytest.mark.skipif(KERNELS_ON_CPU, reason="another process counts, without the interpreter")
@pytest.mark.parametrize("kind", ["reversible", "stored, networks by kernels"])
def test_nothing_is_compiled_after_the_first_step_and_sample(kind):
    ran = subprocess.run(
        [sys.executable, "-c", COUNT, kind],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    counts = {name: int(n) for name, n in (s.rsplit(" ", 1) for s in ran.stdout.splitlines())}
    assert counts.pop("first step") > 0
    assert counts.pop("first sample") > 0
    assert len(counts) == 5
    assert not any(counts.values()), ran.stdout


@pytest.mark.parametrize(("device", "entered"), [("cuda:0", []), ("cuda:1", [1]), ("cpu", [])])
def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch, device, entered):
    """The current device is 0; another one is current only during the launch."""
    current, guards, launches = [0], [], []

    @contextmanager
    def guard(to):
        guards.append(to.index)
        current.append(to.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", guard)
    tensor = SimpleNamespace(device=torch.device(device))
    kernel = {(3, 1): lambda *args, **options: launches.append((current[-1], args, options))}
    launch(kernel, (3, 1), tensor, 7, C=12)
    options = {"C": 12, "enable_fp_fusion": True}
    assert launches == [(tensor.device.index or 0, (tensor, 7), options)]
    assert guards == entered
    assert current == [0]


def test_kernels_are_launched_in_one_place():
    """No other line of the operators subscripts a kernel by its grid."""
    folder = Path(__file__).parents[2] / "mflow_kernels"
    found = [
        path.name
        for path in folder.rglob("*.py")
        for line in path.read_text().splitlines()
        if "_kernel[" in line or "kernel[grid]" in line or ".run(grid" in line
    ]
    assert set(found) == {"launch.py"}
