"""The predicted peak memory of training compared with the measured one, and `mflow plan`.

The measurement uses torch's profiler, which records every allocation of torch's CPU allocator from
building the model to the last step, including temporary tensors and Lightning's. It does not see
what oneDNN allocates for itself.
"""

import dataclasses
import gc
import warnings
import zipfile
from itertools import accumulate

import numpy as np
import pytest
import torch
from tiny_runs import TINY, refused
from torch.profiler import ProfilerActivity, profile

from mflow_kernels import Glow, HierarchicalFlow, Jet, ManifoldFlow, ManifoldObjective, VectorFlow
from mflow_kernels.data.manifest import Manifest
from mflow_kernels.data.splits import ImageSet, Splits
from mflow_kernels.evaluation.likelihood import evaluate_model
from mflow_kernels.layers.networks import CouplingNetwork
from mflow_kernels.ops import coupling_network_launches
from mflow_kernels.ops.launch import Walk, walking
from mflow_kernels.reversible.instructions import Call
from mflow_kernels.reversible.rerun import RerunCall
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.folder import build_model
from mflow_kernels.runs.options import StageOptions
from mflow_kernels.training import checks, train
from mflow_kernels.training import memory as memory_module
from mflow_kernels.training.account import Account, counting
from mflow_kernels.training.cli import main
from mflow_kernels.training.memory import (
    AVERAGE,
    OPTIMIZER,
    PARAMETERS,
    evaluation_memory,
    highest,
    largest_batch,
    resolve_config,
    step_of,
    walk,
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
    "deep": {"steps": 8, "width": 16, "levels": 3},
    "keeps some": {"steps": 4, "width": 32, "checkpoint_every": 4},
    "stored": {"steps": 4, "width": 16, "reversible": False},
    "low precision": {"steps": 4, "width": 64, "precision": "bfloat16"},
    "low precision, stored": {"width": 64, "precision": "bfloat16", "reversible": False},
    "another stage": {"steps": 1, "width": 8, "stages": [StageOptions(16, width=256)]},
    "accumulated": {"steps": 4, "width": 64, "accumulate": 4, "reversible": False},
    "jet": {"flow": "jet", "couplings": 6, "width": 32},
    "muon": {"steps": 2, "width": 128, "optimizer": "muon"},
    "jet, stored": {"flow": "jet", "couplings": 6, "width": 32, "reversible": False},
    "splines": {"steps": 4, "width": 64, "coupling": "spline"},
    "released": {
        "steps": 2,
        "width": 32,
        "stages": [StageOptions(16, steps=4, width=128), StageOptions(8, steps=4, width=128)],
        "release": True,
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


# A penalty in the data domain takes two passes through the networks, and one in the latent domain
# takes one.
@pytest.mark.parametrize(
    ("case", "domain"),
    [*((case, "data") for case in CASES), ("reversible", "latent"), ("stored", "latent")],
)
def test_the_predicted_peak_is_the_measured_one(case, domain, tmp_path):
    config = TrainConfig(**{**BASE, "stages": [], **CASES[case], "domain": domain})
    predicted = highest(walk(config.resolve((3, 16, 16))))
    assert predicted.total == pytest.approx(measured(config, tmp_path / "run"), rel=0.1)
    assert predicted.stage == len(config.stages)


FUSED_CASES = [
    {"width": 128},
    {"width": 256, "steps": 3},  # the gradient of W2 is a separate product
    {"width": 32, "levels": 1},
    {"width": 128, "reversible": False},
    {"width": 160, "reversible": False},
]


def test_the_predicted_peak_of_the_fused_kernels_is_the_measured_one(monkeypatch):
    """Launches compute nothing here, and the CPU allocator allocates all that a GPU would."""

    def product(a, b):  # one allocation on a GPU
        return torch.empty(len(a), b.shape[1], device=a.device)

    monkeypatch.setattr(coupling_network_launches, "product_in_float32", product)
    base = {"levels": 2, "steps": 2, "batch_size": 16, "manifold_dim": 64, "stages": []}
    base |= {"precision": "bfloat16", "domain": "latent", "device": "cuda"}
    for case in FUSED_CASES:
        config = TrainConfig(**{**base, **case}).resolve((3, 32, 32))
        model = build_model(config)
        x = torch.rand(config.batch_size, *config.image_shape)
        for module in model.modules():
            if isinstance(module, CouplingNetwork):
                RerunCall(Call(module, module)).remember(draws=False)
        with walking(Walk(True, lambda *_: None)):
            run(model, x, torch.bfloat16)
            model.zero_grad()
            gc.collect()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                run(model, x, torch.bfloat16)
        predicted = highest(walk(config))
        # Memory that the measured step does not allocate.
        outside = sum(predicted.peak[name] for name in (PARAMETERS, AVERAGE, OPTIMIZER))
        assert predicted.total - outside == pytest.approx(peak(profiler), rel=0.1), config


def run(model, x, dtype=torch.float32):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model.terms(x, stage=0).loss.mean()
    loss.backward()


def stored_spline(shape):
    return Glow(shape, 2, 2, 32, coupling="spline", bins=4, reversible=False)


def spline_of_vectors(shape):
    return VectorFlow(*shape, 4, 64, coupling="spline", bins=8)


def jet(shape):
    return Jet(shape, 2, 6, width=64)


def stored_jet(shape):
    return Jet(shape, 2, 6, width=64, reversible=False)


@pytest.mark.parametrize(
    ("build", "shape", "domain"),
    [
        (stored_spline, (3, 16, 16), "latent"),
        (spline_of_vectors, (64,), "data"),
        (jet, (3, 16, 16), "data"),
        (stored_jet, (3, 16, 16), "latent"),
    ],
)
def test_the_predicted_peak_of_other_flows_is_the_measured_one(build, shape, domain):
    """The account has no lines about these flows, and `mflow train` has no option for most."""

    def model():
        objective = ManifoldObjective(domain, "l2", 10.0)
        return HierarchicalFlow([ManifoldFlow(build(shape), 32, objective=objective)])

    real, x = model(), torch.rand(16, *shape) - 0.5
    real.initialize(x, stage=0)
    run(real, x)
    real.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(real, x)
    account, empty = Account(gpu=False), model().to("meta")
    with counting(account):
        run(empty, torch.empty_like(x, device="meta"))
    assert account.at_peak.total() == pytest.approx(peak(profiler), rel=0.1)


@pytest.mark.parametrize("classes", [None, "Smiling,Male"])
def test_parameters_and_buffers_are_those_of_the_model(classes):
    stages = [StageOptions(7), StageOptions(5, coupling="spline", bins=3)]
    options = TrainConfig(image_size=24, steps=3, levels=3, stages=stages, classes=classes)
    config = resolve_config(dataclasses.replace(options, data=""), 3, gpu=False)
    assert len(config.class_names) == (0 if classes is None else 4)
    model = build_model(config)
    steps = walk(config)
    for step, flow in zip(steps, model.stages, strict=True):
        assert step.parameters == sum(p.numel() for p in flow.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert steps[0].peak[PARAMETERS] == sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("memory", [10**8, 2**33])
def test_the_largest_batch_nearly_fills_the_memory(memory):
    config = dataclasses.replace(TrainConfig(batch_size=3).resolve((3, 64, 64)), device="cuda")
    batch = largest_batch(config, memory, walk(config))
    peak = highest(walk(dataclasses.replace(config, batch_size=batch))).total
    # Memory is not quite linear between the two batches that are walked.
    assert peak == pytest.approx(memory, rel=0.02)
    assert largest_batch(config, 10**6, walk(config)) == 0


def test_reversible_memory_grows_with_depth_by_its_parameters_alone():
    def growth(reversible: bool) -> float:
        options = {"domain": "latent", "stages": [], "checkpoint_every": None}
        configs = [
            TrainConfig(steps=steps, reversible=reversible, **options).resolve((3, 64, 64))
            for steps in (4, 32)
        ]
        shallow, deep = (step_of(config, 0) for config in configs)
        weights = deep.peak[PARAMETERS] - shallow.peak[PARAMETERS]
        return (deep.total - shallow.total) / weights

    # The weights, their average, moments and gradients, W' of each step and its inverses.
    assert growth(reversible=True) < 7
    assert growth(reversible=False) > 30


def test_parts_of_a_batch_take_the_memory_of_one_part():
    config = TrainConfig(batch_size=32, domain="latent", stages=[], width=64)
    config = config.resolve((3, 32, 32))
    whole, halves = (step_of(dataclasses.replace(config, accumulate=n), 0) for n in (1, 2))
    smaller = step_of(dataclasses.replace(config, batch_size=16), 0)
    assert halves.total < 0.8 * whole.total
    # The gradients of the first part stay, and so do the images of the others.
    kept = smaller.parameters * 4 + 16 * 3 * 32 * 32 * 5
    assert smaller.total <= halves.total <= 1.01 * (smaller.total + kept)
    eighths = step_of(dataclasses.replace(config, accumulate=8), 0)
    products, same = (sum(k.flops for k in step.kernels) for step in (eighths, whole))
    assert products == pytest.approx(same, rel=0.01)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("16 GiB", 2**34), ("1.5gb", 15 * 10**8)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


class TestCommand:
    def test_nothing_is_allocated_or_read(self, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(memory_module, "build", meta_only(memory_module.build))
        monkeypatch.setattr(memory_module, "build_model", meta_only(build_model))
        options = "--image-size 256 --levels 6 --steps 4 --width 512 --batch-size 16"
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
        assert "States stored" in stored
        assert "States rebuilt, one in 2 kept" in kept
        assert "States rebuilt; networks" in out

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
