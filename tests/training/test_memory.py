"""The predicted peak memory of training compared with the measured one, and `mflow plan`.

The measurement uses torch's profiler, which records every allocation of torch's CPU allocator from
building the model to the last step, including temporary tensors and Lightning's. It does not see
what oneDNN allocates for itself.
"""

import dataclasses
import gc
import json
import subprocess
import sys
import warnings
import zipfile
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TINY, refused
from torch.profiler import ProfilerActivity, profile

from mflow_kernels.data.manifest import Manifest
from mflow_kernels.data.splits import ImageSet, Splits
from mflow_kernels.evaluation.likelihood import evaluate_model
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.folder import build_model
from mflow_kernels.runs.options import StageOptions
from mflow_kernels.training import checks, train
from mflow_kernels.training import memory as memory_module
from mflow_kernels.training.cli import main
from mflow_kernels.training.coupling_shapes import coupling_shapes
from mflow_kernels.training.memory import (
    evaluation_memory,
    largest_batch,
    peak_memory,
    resolve_config,
)
from mflow_kernels.training.plan import parse_memory

# Two steps, because Adam's state exists from the second step on.
BASE = {
    "data": "none",
    "device": "cpu",
    "image_size": 16,
    "batch_size": 16,
    "max_steps": 2,
    "manifold_dim": 32,
    "learning_rate": 0.002,  # at a high rate, states of this noise drift
}
CASES = {
    "reversible": {"steps": 4, "width": 64},
    "deep": {"steps": 16, "width": 16, "levels": 3},
    "keeps all": {"steps": 8, "width": 16, "checkpoint_every": 1},
    "keeps some": {"steps": 4, "width": 32, "checkpoint_every": 4},
    "stored": {"steps": 4, "width": 16, "reversible": False},
    "stored, deep": {"steps": 8, "width": 64, "reversible": False},
    "low precision": {"steps": 4, "width": 64, "precision": "bfloat16"},
    "low precision, stored": {"width": 64, "precision": "bfloat16", "reversible": False},
    "wide levels": {"steps": 4, "width": 8, "levels": 4},
    "another stage": {"steps": 1, "width": 8, "stages": [StageOptions(16, width=256)]},
    "whole stage": {"steps": 1, "width": 8, "stages": [StageOptions(32, width=256)]},
    "accumulated": {"steps": 4, "width": 64, "accumulate": 4, "reversible": False},
    "splines": {"steps": 4, "width": 64, "coupling": "spline"},
    "splines in another stage": {
        "steps": 1,
        "width": 8,
        "stages": [StageOptions(16, width=256, coupling="spline")],
    },
    "released": {
        "steps": 4,
        "width": 32,
        "stages": [StageOptions(16, width=128), StageOptions(8, width=128)],
        "release": True,
    },
    "released, stored": {
        "steps": 2,
        "width": 16,
        "stages": [StageOptions(16, width=64)],
        "release": True,
        "reversible": False,
    },
}


EVALUATED = {
    "wide": {"width": 128},
    "deep": {"width": 16, "steps": 8},
    "another stage": {"width": 16, "stages": [StageOptions(16, width=256)]},
    "wide levels": {"width": 8, "levels": 4, "steps": 8, "manifold_dim": 768},
}


@pytest.mark.parametrize("case", EVALUATED)
def test_the_predicted_memory_of_evaluation_is_the_measured_one(case):
    options = {"levels": 2, "steps": 2, "stages": [], **BASE, **EVALUATED[case]}
    config = TrainConfig(**options).resolve((3, 16, 16))
    images = ImageSet(torch.randint(256, (24, 3, 16, 16)).byte())
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(config).requires_grad_(False).eval()
        evaluate_model(model, images, 8, data="none")  # one batch
    assert evaluation_memory(config, len(images)) == pytest.approx(peak(profiler), rel=0.1)


def peak(profiler: profile) -> int:
    """Bytes at the peak of what was allocated while the profiler ran."""
    events = profiler.profiler.kineto_results.events()
    allocations = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return max(accumulate(size for _, size in allocations))


def measured(config: TrainConfig, folder) -> int:
    """Bytes at the peak of the training loop of `mflow train`."""
    images = torch.randint(256, (64, 3, 16, 16)).byte()
    parts = np.repeat(np.array([0, 2], np.uint8), [48, 16])
    # No validation between the two steps, because it would free the gradients of the first step.
    splits = Splits(ImageSet(images), Manifest([str(row) for row in range(64)], parts, [""] * 64))
    resolved = config.resolve(splits.train.image_shape)
    folder.mkdir()
    gc.collect()  # memory that is freed later would count as negative
    with (
        warnings.catch_warnings(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        warnings.simplefilter("ignore")
        model = build_model(resolved)
        train._fit(
            checks.CheckedRun(
                folder=folder,
                config=resolved,
                splits=splits,
                model=model,
                device=torch.device("cpu"),
                ranks=checks.Ranks(),
                resumes=False,
                lock=None,
                checkpoint=None,
            )
        )
    return peak(profiler)


# Memory for one pass through the networks; a penalty in the data domain takes a second one.
LATENT = ("reversible", "deep", "keeps all", "stored", "released")


@pytest.mark.parametrize(
    ("case", "domain"),
    [*((case, "data") for case in CASES), *((case, "latent") for case in LATENT)],
)
def test_the_predicted_peak_is_the_measured_one(case, domain, tmp_path):
    config = TrainConfig(**{**BASE, "stages": [], **CASES[case], "domain": domain})
    predicted = peak_memory(config.resolve((3, 16, 16)))
    assert predicted.total == pytest.approx(measured(config, tmp_path / "run"), rel=0.1)
    assert predicted.stage == len(config.stages)


# This runs in its own process, where launches compute nothing. Torch's CPU allocator allocates
# everything that a GPU would.
FUSED = """
import json
from unittest.mock import patch
from benchmarks.reports import aot
import torch
from torch.profiler import ProfilerActivity, profile
from mflow_kernels.layers.networks import CouplingNetwork
from mflow_kernels.ops import coupling_network_launches
from mflow_kernels.reversible.instructions import Call
from mflow_kernels.reversible.rerun import RerunCall
from mflow_kernels.runs.config import RunConfig
from mflow_kernels.runs.folder import build_model

def product(a, b):  # one allocation on a GPU
    return torch.empty(len(a), b.shape[1])

def step(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.terms(x, stage=0).loss.mean()
    loss.backward()

for options in json.loads({cases!r}):
    config = RunConfig(**options)
    model = build_model(config).to(memory_format=torch.channels_last)
    x = torch.rand(config.batch_size, *config.image_shape)
    for module in model.modules():
        if isinstance(module, CouplingNetwork):
            RerunCall(Call(module, module)).remember(draws=False)
    with aot.noting(lambda _: None), patch.object(
        coupling_network_launches, "product_in_float32", product
    ):
        step(model, x)
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(model, x)
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    print(json.dumps(peak))
"""
FUSED_CASES = [
    {"width": 128},
    {"width": 256, "steps": 3},  # the gradient of W2 is a separate product
    {"width": 32, "levels": 1},
    {"width": 128, "reversible": False},
    {"width": 160, "reversible": False},
]


def test_the_predicted_peak_of_the_fused_kernels_is_the_measured_one():
    base = {"levels": 2, "steps": 2, "batch_size": 16, "manifold_dim": 64, "stages": []}
    base |= {"precision": "bfloat16", "domain": "latent", "device": "cuda"}
    configs = [TrainConfig(**{**base, **case}).resolve((3, 32, 32)) for case in FUSED_CASES]
    cases = json.dumps([dataclasses.asdict(config) for config in configs])
    done = subprocess.run(
        [sys.executable, "-c", FUSED.format(cases=cases)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for config, found in zip(configs, done.stdout.split(), strict=True):
        predicted = peak_memory(config)
        # Memory that the measured step does not allocate.
        outside = predicted.parameters + predicted.average + predicted.optimizer
        assert predicted.total - outside == pytest.approx(int(found), rel=0.1), config


@pytest.mark.parametrize("classes", [None, "Smiling,Male"])
def test_parameters_and_buffers_are_those_of_the_model(classes):
    stages = [StageOptions(7), StageOptions(5, coupling="spline", bins=3)]
    options = TrainConfig(image_size=24, steps=3, levels=3, stages=stages, classes=classes)
    config = resolve_config(dataclasses.replace(options, data=""), 3, gpu=False)
    assert len(config.class_names) == (0 if classes is None else 4)
    model = build_model(config)
    for stage, flow in enumerate(model.stages):
        found = coupling_shapes(config, stage)
        expected = sum(n.parameters + n.conv1x1_parameters for n in found)
        assert expected == sum(p.numel() for p in flow.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    held = peak_memory(config).parameters
    assert held == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("memory", [10**8, 2**33])
def test_the_largest_batch_is_the_largest(memory):
    config = TrainConfig(batch_size=3).resolve((3, 64, 64))

    def peak(batch: int) -> int:
        return peak_memory(TrainConfig(batch_size=batch).resolve((3, 64, 64))).total

    batch = largest_batch(config, memory)
    assert peak(batch) <= memory < peak(batch + 1)
    assert largest_batch(config, 10**6) == 0


def test_reversible_memory_grows_with_depth_by_its_parameters_alone():
    def peak(steps: int):
        config = TrainConfig(steps=steps, domain="latent", stages=[]).resolve((3, 64, 64))
        return peak_memory(config)

    assert peak(32).one_step == peak(4).one_step
    assert peak(32).ends == peak(4).ends


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("16 GiB", 2**34), ("1.5gb", 15 * 10**8)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


class TestCommand:
    def test_nothing_is_allocated_or_read(self, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(memory_module, "Glow", meta_only(memory_module.Glow))
        options = "--image-size 256 --levels 6 --steps 32 --width 512 --batch-size 16"
        assert main(["plan", *options.split(), "--gpu-memory", "80GB"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert "16 images of 3x256x256" in out
        assert "\nFits in 80.0 GB. Largest batch in 80.0 GB: " in out
        assert "not verified on a GPU" in out
        assert not list(tmp_path.iterdir())

    def test_a_batch_that_does_not_fit_is_reported(self, capsys):
        assert main(["plan", "--batch-size", "999999", "--gpu-memory", "8GB"]) == 0
        assert "\nDoes not fit in 8.0 GB. Largest batch" in capsys.readouterr().out
        assert main(["plan", "--gpu-memory", "1MB"]) == 0
        assert "Largest batch in 1.0 MB: none fits" in capsys.readouterr().out

    def test_the_rows_add_up(self, capsys):
        assert main(["plan", "--data", "digits", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "1x28x28" in out
        assert "GPU" not in out
        units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
        rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
        sizes = [float(row[-2]) * units[row[-1]] for row in rows]
        assert sum(sizes[:-1]) == pytest.approx(sizes[-1], rel=0.01)

    def test_it_takes_the_options_of_train(self, capsys, tmp_path):
        unread = tmp_path / "not read.zip"
        with zipfile.ZipFile(unread, "w") as archive:
            archive.writestr("image.png", "no image")
        assert main(["plan", *TINY, "--data", str(unread), "--checkpoint-every", "null"]) == 0
        out = capsys.readouterr().out
        assert main(["plan", *TINY, "--no-reversible"]) == 0
        assert main(["plan", *TINY, "--checkpoint-every", "2"]) == 0
        stored, kept = capsys.readouterr().out.split("Batches")[1:]
        assert "stored (--no-reversible)" in stored
        assert "kept (--checkpoint-every)" in kept
        assert "stored (--no-reversible)" not in out
        assert "kept (--checkpoint-every)" not in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--gpu-memory 80", "--gpu-memory: expected a size such as 80GB or 16GiB, got 80"),
            ("--gpu-memory 0GB", "--gpu-memory: expected a size"),
            ("--channels 0", "--channels: expected at least 1, got 0"),
            ("--images 0", "--images: expected at least 1, got 0"),
            ("--classes a,b,c,d,e,f,g", "--classes: expected up to 6 different attributes, got"),
            ("--classes labels", "--classes: expected a named data set or a file of mflow prepare"),
            ("--levels 7", "divisible by 2 ** levels = 128, got 64x64"),
            ("--manifold-dim 12289", "--manifold-dim: expected 1 to 12288"),
            ("--stage-dim 65", "--stage-dim: expected dimensions from 1 to the 64"),
            ("--checkpoint-every 0", "--checkpoint-every: expected at least 1, got 0"),
            ("--device cpu --precision float16", "--precision: expected float32 or bfloat16"),
            ("--run-dir x", "unrecognized arguments: --run-dir x"),
        ],
    )
    def test_bad_input(self, arguments, message, tmp_path, capsys):
        assert message in refused(["plan", *arguments.split()], tmp_path, capsys)


def meta_only(original):
    def build(*args, **kwargs):
        model = original(*args, **kwargs)
        assert all(p.is_meta for p in model.parameters())
        return model

    return build
