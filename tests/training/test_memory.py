"""The predicted peak memory of training and evaluation, compared with the measured one.

The measurement uses torch's profiler, which records every allocation of torch's CPU allocator from
building the model to the last step, including temporary tensors and Lightning's. It does not see
what oneDNN allocates for itself.
"""

import dataclasses
import gc
import warnings
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

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
    "splines, stored": {"width": 32, "coupling": "spline", "bins": 4, "reversible": False},
    "splines of vectors": {
        "steps": 1,
        "width": 8,
        "stages": [StageOptions(16, width=64, coupling="spline")],
    },
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


def test_parts_of_a_batch_take_the_products_of_the_whole():
    config = TrainConfig(batch_size=32, domain="latent", stages=[], width=64)
    steps = [
        step_of(dataclasses.replace(config.resolve((3, 32, 32)), accumulate=n), 0) for n in (1, 8)
    ]
    whole, eighths = (sum(k.flops for k in step.kernels) for step in steps)
    assert eighths == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("16 GiB", 2**34), ("1.5gb", 15 * 10**8)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size
