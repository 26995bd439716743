"""Run folders: create one, read one, and load the model that it describes."""

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
# Options that may change when a run resumes. They affect how it computes, not the result.
CHANGEABLE_OPTIONS = (
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
_AVERAGE = "average.model."  # prefix of the averaged weights in a checkpoint


@dataclass(frozen=True)
class Run:
    """A trained run: its folder, its configuration, and its model in evaluation mode."""

    folder: Path
    config: RunConfig
    model: HierarchicalFlow
    device: torch.device


def build_model(config: RunConfig) -> HierarchicalFlow:
    """Build the untrained model of a configuration. Its weights are a function of the seed.

    Raises:
        ValueError: the levels do not divide the image, the manifold has more dimensions than the
            image, or the model does not fit in memory.
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
    """The architecture of a configuration, as `pretrained.build` takes it."""
    objective = ("domain", "rho", "weight", "final_weight", "weight_steps", "error_bound")
    names = ("steps", "width", *objective, "delta", "sigma")
    stages = [
        {"manifold_dim": stage.dim, **{name: getattr(stage, name) for name in names}}
        for stage in config.stages
    ]
    flow = {name: getattr(config, name) for name in ("levels", "steps", "width")}
    return {"image_shape": list(config.image_shape), **flow, "stages": stages}


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; ValueError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU for 'cuda', found none")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def create_run(
    folder: Path, config: RunConfig, manifest: Manifest, replaced: FileLock | None
) -> FileLock:
    """Create a run folder with config.yaml and the list of images; see `make_folder`."""

    def fill(temporary: Path) -> None:
        write_atomically(temporary / CONFIG, lambda path: path.write_text(config.to_yaml()))
        manifest.write(temporary / MANIFEST)

    return make_folder(folder, fill, "run_dir", replaced)


def record_config(folder: Path, config: RunConfig) -> None:
    """Replace the recorded options with those given on resume."""
    write_atomically(folder / CONFIG, lambda path: path.write_text(config.to_yaml()))


def check_new_run(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if `create_run` would refuse this folder."""
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
    """Read the configuration of a run folder; if it has none, a ValueError names `argument`."""
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
    """Read the list of a run's images; None if the run folder has no list.

    Raises:
        ValueError: the list is damaged. The message names the file.
    """
    path = folder / MANIFEST
    return Manifest.read(path) if path.exists() else None


def checkpoint_tensors(model: HierarchicalFlow) -> dict[str, Tensor]:
    """Tensors with the names, shapes and dtypes of those in a checkpoint of this model's training:
    weights, averaged weights and the guard's statistics."""
    weights = model.state_dict()
    trained = {f"model.{name}": tensor for name, tensor in weights.items()}
    averaged = {f"{_AVERAGE}{name}": tensor for name, tensor in weights.items()}
    return {**trained, **averaged, "guard.state": torch.zeros(5, dtype=torch.float64)}


def load_run(folder: str, device: str = "auto") -> Run:
    """Read a run folder of `mflow train` and load the averaged weights.

    Raises:
        ValueError: the folder is not a run folder, or its checkpoint is damaged or belongs to
            another architecture.
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
    """Write the model of a run into a new folder, from which `from_pretrained` loads it."""

    def fill(temporary: Path) -> None:
        # A pixel of 2^n_bits levels is x = (level + noise) / 2^n_bits - 0.5, noise in [0, 1).
        save_pretrained(run.model, architecture(run.config), temporary, n_bits=run.config.n_bits)

    lock = make_folder(folder, fill, "out")
    (folder / LOCK).unlink(missing_ok=True)
    lock.release()


def changed_options(asked: RunConfig, recorded: RunConfig) -> str | None:
    """An error message about the first option that may not change on resume; None if all agree."""
    for option in fields(RunConfig):
        want, have = getattr(asked, option.name), getattr(recorded, option.name)
        if option.name not in CHANGEABLE_OPTIONS and want != have:
            return (
                f"{option.name}: expected {have} as in the run that resumes, got {want}; only "
                f"{', '.join(CHANGEABLE_OPTIONS)} may change"
            )
    return None
