"""Run folders: making one, reading one back, and the model that it describes."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from mflow_kernels import HierarchicalFlow
from mflow_kernels.data.files import (
    LOCK,
    check_can_be_written,
    make_folder,
    read_regular,
    write_atomically,
)
from mflow_kernels.data.manifest import MANIFEST, Manifest
from mflow_kernels.models.pretrained import build, save_pretrained
from mflow_kernels.runs.checkpoints import LAST, Expected, newest_checkpoint
from mflow_kernels.runs.config import RunConfig

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
        ValueError: levels that do not divide the image, more manifold dimensions than it has, or a
            model that does not fit in memory.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return build(
                architecture(config),
                reversible=config.reversible,
                checkpoint_every=config.checkpoint_every,
            )
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            "width, stage_width, steps, stage_steps: expected a model that fits in memory "
            f"({reason[:120]})"
        ) from None


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


def create_run(
    folder: Path, config: RunConfig, manifest: Manifest, replaced: FileLock | None
) -> FileLock:
    """Make a run folder with its config.yaml and list of images; see `make_folder`."""

    def fill(temporary: Path) -> None:
        write_atomically(temporary / CONFIG, lambda path: path.write_text(config.to_yaml()))
        manifest.write(temporary / MANIFEST)

    return make_folder(folder, fill, "run_dir", replaced)


def record_config(folder: Path, config: RunConfig) -> None:
    """Replace the recorded options by those that were given on resume."""
    write_atomically(folder / CONFIG, lambda path: path.write_text(config.to_yaml()))


def check_new_run(folder: Path, overwrite: bool) -> None:
    """ValueError if `create_run` would not make this folder."""
    check_can_be_written(folder.parent if overwrite else folder, "run_dir")
    if not folder.exists():
        return
    if not overwrite:
        raise ValueError(
            f"run_dir: expected a new folder, but {folder} exists (--resume continues it, "
            "--overwrite replaces it)"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"run_dir: --overwrite expected a folder of mflow train with {CONFIG}, got {folder}"
        )


def read_config(folder: Path, argument: str = "run") -> RunConfig:
    """The configuration of a run folder; ValueError, naming `argument`, if there is none."""
    path = folder / CONFIG
    try:
        text = read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "" if absent else f" ({getattr(error, 'strerror', None) or error})"
        raise ValueError(
            f"{argument}: expected a folder of mflow train with {CONFIG}, got {folder}{reason}"
        ) from None
    return RunConfig.from_yaml(text, str(path))


def read_manifest(folder: Path) -> Manifest | None:
    """The images that a run was trained on and those it held out; None if it recorded none.

    Raises:
        ValueError: a torn or foreign list; it names the file.
    """
    path = folder / MANIFEST
    return Manifest.read(path) if path.exists() else None


def checkpoint_tensors(model: HierarchicalFlow) -> dict[str, Tensor]:
    """Tensors of the names, shapes and dtypes that a checkpoint of this model's training holds:
    the weights, their average and the guard's figures."""
    weights = model.state_dict()
    trained = {f"model.{name}": tensor for name, tensor in weights.items()}
    averaged = {f"{_AVERAGE}{name}": tensor for name, tensor in weights.items()}
    return {**trained, **averaged, "guard.state": torch.zeros(5, dtype=torch.float64)}


def load_run(folder: str, device: str = "auto") -> Run:
    """Read a run folder of `mflow train`, its averaged weights.

    Raises:
        ValueError: no folder of a run, a checkpoint that is torn or of another architecture.
    """
    path = Path(folder)
    config = read_config(path)
    target = pick_device(device)
    model = build_model(config)
    checkpoint = newest_checkpoint(path, Expected(checkpoint_tensors(model)))
    if checkpoint is None:
        raise ValueError(f"checkpoint: expected {path / LAST}, found none")
    averaged = {
        name.removeprefix(_AVERAGE): value
        for name, value in checkpoint.tensors.items()
        if name.startswith(_AVERAGE)
    }
    model.load_state_dict(averaged)
    return Run(path, config, model.to(target).eval(), target)


def export_run(run: Run, folder: Path) -> None:
    """Write the model of a run, in plain PyTorch's reach, into a new folder."""

    def fill(temporary: Path) -> None:
        # A pixel of 2^n_bits levels is x = (level + noise) / 2^n_bits - 0.5, noise within [0, 1).
        save_pretrained(run.model, architecture(run.config), temporary, n_bits=run.config.n_bits)

    lock = make_folder(folder, fill, "out")
    (folder / LOCK).unlink(missing_ok=True)
    lock.release()


def changed_options(asked: RunConfig, recorded: RunConfig) -> str | None:
    """The first option that differs and matters to a resumed run, explained; None if none does."""
    for option in fields(RunConfig):
        want, have = getattr(asked, option.name), getattr(recorded, option.name)
        if option.name not in FREE_OPTIONS and want != have:
            return f"{option.name}: expected {have} as in the run that resumes, got {want}"
    return None
