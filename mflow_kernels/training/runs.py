"""Run folders: making one, reading one back, and the model that it describes."""

import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mflow_kernels import HierarchicalFlow
from mflow_kernels.models.pretrained import build, save_pretrained
from mflow_kernels.training.checkpoints import LAST, Shapes, newest_checkpoint
from mflow_kernels.training.config import RunConfig
from mflow_kernels.training.files import write_atomically

CONFIG = "config.yaml"
METRICS = "metrics.csv"
# What a run that resumes may change: how it computes, not what.
FREE_OPTIONS = (
    "device",
    "reversible",
    "checkpoint_every",
    "max_drift",
    "max_condition",
    "save_minutes",
    "save_steps",
    "max_skipped",
    "compile",
    "cuda_graphs",
)
EVALUATION = "evaluation.json"
_AVERAGE = "average.model."  # where a checkpoint holds the averaged weights


@dataclass(frozen=True)
class Run:
    """A trained run: where it is, what it was made from, and its model in evaluation mode."""

    folder: Path
    config: RunConfig
    model: HierarchicalFlow
    device: torch.device


def build_model(config: RunConfig) -> HierarchicalFlow:
    """The untrained model of a configuration, its weights a function of the seed.

    Raises:
        ValueError: levels that do not divide the image, more manifold dimensions than it has.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(
            architecture(config),
            reversible=config.reversible,
            checkpoint_every=config.checkpoint_every,
        )


def architecture(config: RunConfig) -> dict[str, Any]:
    """What `pretrained.build` makes the model of a configuration from."""
    stages = [
        {
            "manifold_dim": stage.dim,
            "steps": stage.steps,
            "width": stage.width,
            "domain": stage.domain,
            "rho": stage.rho,
            "weight": stage.weight,
        }
        for stage in config.stages
    ]
    flow = {name: getattr(config, name) for name in ("levels", "steps", "width")}
    return {"image_shape": list(config.image_shape), **flow, "stages": stages}


def pick_device(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda"; ValueError for "cuda" with no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU for 'cuda', found none")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def create_run(folder: Path, config: RunConfig, overwrite: bool = False) -> None:
    """Make a run folder with its config.yaml, under a temporary name first.

    Raises:
        ValueError: the folder exists and may not be, or is no run's, to be overwritten.
    """
    check_new_run(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = temporary.with_suffix(".old")
    temporary.mkdir()
    (temporary / CONFIG).write_text(config.to_yaml())
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def record_config(folder: Path, config: RunConfig) -> None:
    """Write what a run that resumes was told in place of what it was told before."""
    write_atomically(folder / CONFIG, lambda path: path.write_text(config.to_yaml()))


def check_new_run(folder: Path, overwrite: bool) -> None:
    """ValueError where `create_run` would not make this folder."""
    if not folder.exists():
        return
    if not overwrite:
        raise ValueError(
            f"run_dir: expected a new folder, but {folder} exists (--resume continues it, "
            "--overwrite starts anew)"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"run_dir: --overwrite expected a folder of mflow train with {CONFIG}, got {folder}"
        )


def read_config(folder: Path, argument: str = "run") -> RunConfig:
    """The configuration of a run folder; ValueError, naming `argument`, if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{argument}: expected a folder of mflow train with {CONFIG}, got {folder}"
        )
    return RunConfig.from_yaml(path.read_text())


def checkpoint_shapes(model: HierarchicalFlow) -> Shapes:
    """Names and shapes of what a checkpoint of this model's training holds: the weights as they
    are, their average, and the guard's figures."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trained = {f"model.{name}": shape for name, shape in shapes.items()}
    averaged = {f"{_AVERAGE}{name}": shape for name, shape in shapes.items()}
    return {**trained, **averaged, "guard.state": (5,)}


def load_run(folder: str, device: str = "auto") -> Run:
    """Read a run folder of `mflow train`, its averaged weights.

    Raises:
        ValueError: a folder that is none, a checkpoint that is torn or of another architecture.
    """
    path = Path(folder)
    config = read_config(path)
    target = pick_device(device)
    model = build_model(config)
    checkpoint = newest_checkpoint(path, checkpoint_shapes(model))
    if checkpoint is None:
        raise ValueError(f"checkpoint: expected {path / LAST}, found none")
    state = checkpoint.state["state_dict"]
    averaged = {
        name.removeprefix(_AVERAGE): value
        for name, value in state.items()
        if name.startswith(_AVERAGE)
    }
    model.load_state_dict(averaged)
    return Run(path, config, model.to(target).eval(), target)


def export_run(run: Run, folder: Path) -> None:
    """Write the model of a run, in plain PyTorch's reach, into a new folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        # A pixel of 2^n_bits levels is x = (level + noise) / 2^n_bits - 0.5, noise within [0, 1).
        save_pretrained(run.model, architecture(run.config), temporary, n_bits=run.config.n_bits)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def changed_options(asked: RunConfig, recorded: RunConfig) -> str | None:
    """The first option that differs and matters to a resumed run, explained; None if none does."""
    for option in fields(RunConfig):
        want, have = getattr(asked, option.name), getattr(recorded, option.name)
        if option.name not in FREE_OPTIONS and want != have:
            return f"{option.name}: expected {have} as in the run that resumes, got {want}"
    return None
