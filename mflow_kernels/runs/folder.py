"""Run folders: create one, read one, and load the model that it describes."""

import csv
import hashlib
import io
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from filelock import FileLock
from torch import Tensor

from mflow_kernels import HierarchicalFlow, ManifoldFlow
from mflow_kernels.data.files import (
    LOCK,
    check_can_be_written,
    make_folder,
    read_regular,
    shortened,
    write_atomically,
)
from mflow_kernels.data.manifest import MANIFEST, TRAIN, Manifest
from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.models.architecture import build
from mflow_kernels.models.pretrained import ARCHITECTURE, contents, write
from mflow_kernels.runs.card import CARD, SAMPLES, model_card
from mflow_kernels.runs.checkpoints import LAST, Expected, newest_checkpoint
from mflow_kernels.runs.config import RunConfig, Stage
from mflow_kernels.runs.parser import as_option

CONFIG = "config.yaml"
CHANGES = "changes.csv"
# Options that may change when a run resumes. Those up to `max_condition` set how it trains from the
# next step on. The others are about the machine, memory, safety limits and checkpoints.
CHANGEABLE_OPTIONS = (
    "learning_rate",
    "stage_learning_rate",
    "schedule",
    "epochs",
    "stage_epochs",
    "max_steps",
    "stage_max_steps",
    "batch_size",
    "max_condition",
    "device",
    "reversible",
    "checkpoint_every",
    "max_drift",
    "save_minutes",
    "save_steps",
    "max_skipped",
    "compile",
    "cuda_graphs",
    "accumulate",
)
EVALUATION = "evaluation.json"
_AVERAGE = "average.model."  # prefix of the averaged weights in a checkpoint


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, its folder, and its configuration, which an export lacks."""

    folder: Path
    config: RunConfig | None
    model: HierarchicalFlow
    device: torch.device

    @property
    def n_bits(self) -> int:
        """Bits of a colour value. ValueError if the model was saved without them."""
        if self.model.n_bits is None:
            raise ValueError(f"run: expected a model that knows its n_bits, got {self.folder}")
        return self.model.n_bits


@dataclass(frozen=True)
class Run(Trained):
    """A trained run, with its configuration."""

    config: RunConfig


def build_model(config: RunConfig) -> HierarchicalFlow:
    """Build the untrained model of a configuration. Its weights are a function of the seed.

    Raises:
        ValueError: the levels do not divide the image, the manifold has more dimensions than the
            image, or the model does not fit in memory.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model: HierarchicalFlow = build(architecture(config))
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"width, steps, stages: expected a model that fits in memory ({reason[:120]})"
        ) from None
    model.describe_images(config.n_bits, config.crop, tuple(config.class_names))
    return model


def architecture(config: RunConfig) -> dict[str, Any]:
    """Return the description of a configuration's model, as `models.architecture` takes it."""
    how: dict[str, Any] = {"scale": "tanh", "context_channels": len(config.class_names)}
    how |= {name: getattr(config, name) for name in ("reversible", "checkpoint_every")}
    stages: list[dict[str, Any]] = []
    for stage in config.flows:
        if stages:
            flow = {"class": "VectorFlow", "dim": stages[-1]["manifold_dim"], **_options(stage)}
        else:
            flow = {**_image_flow(config, stage), "image_shape": list(config.image_shape)}
        objective = {name: getattr(stage, name) for name in ("domain", "rho", "delta", "sigma")}
        objective |= {"class": "ManifoldObjective", "weight": _weight(stage)}
        stages.append({"class": "ManifoldFlow", "flow": how | flow, "objective": objective})
        stages[-1]["manifold_dim"] = stage.dim
        mixture = {"class": "GaussianMixture", "dim": stage.dim, "components": stage.components}
        stages[-1]["prior"] = mixture if stage.components > 1 else None
    return {"class": "HierarchicalFlow", "stages": stages}


def _image_flow(config: RunConfig, stage: Stage) -> dict[str, Any]:
    if config.flow == "glow":
        return {"class": "Glow", "levels": config.levels, **_options(stage)}
    names = ("patch", "couplings", "depth", "heads", "width")
    jet = {name: getattr(config, name) for name in names}
    return {"class": "Jet", **jet, "scale": "double-sigmoid"}


def _options(stage: Stage) -> dict[str, Any]:
    return {name: getattr(stage, name) for name in ("steps", "width", "coupling", "bins")}


def _weight(stage: Stage) -> Any:
    """Return the description of a stage's penalty weight."""
    if stage.error_bound is not None:
        return {"class": "ErrorBound", "error": stage.error_bound, "start": stage.weight}
    if stage.final_weight is not None:
        ends = {"start": stage.weight, "end": stage.final_weight}
        return {"class": "WeightSchedule", **ends, "steps": stage.weight_steps}
    return stage.weight


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        ValueError: the name is "cuda" and there is no GPU.
    """
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


class Change(NamedTuple):
    """An option that changes when a run resumes."""

    option: str
    before: object
    after: object

    def __str__(self) -> str:
        values = (yaml.safe_dump(v, default_flow_style=True) for v in (self.before, self.after))
        before, after = (text.removesuffix("...\n").strip() for text in values)
        return f"{as_option(self.option)} {before} -> {after}"


def record_changes(folder: Path, config: RunConfig, changes: Sequence[Change], step: int) -> None:
    """Replace the recorded options with those given on resume, and add the changes to CHANGES.

    A row of CHANGES has the first step with the new value, the option, and its values before and
    after.
    """
    if not changes:
        return
    path = folder / CHANGES
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if path.exists():
        text.write(read_regular(path).decode(errors="replace"))
    else:
        writer.writerow(["step", "option", "before", "after"])
    writer.writerows([step, *change] for change in changes)
    write_atomically(path, lambda path: path.write_text(text.getvalue(), newline=""))
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
    """Return tensors with the names, shapes and dtypes of those in this model's checkpoints.

    They are the weights, the averaged weights and the guard's statistics.
    """
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


def load_model(folder: str, device: str = "auto") -> Trained:
    """Load the model of a run folder (see `load_run`) or of a folder of `mflow export`.

    Raises:
        ValueError: the folder is of neither kind, or a file in it is damaged.
    """
    path = Path(folder)
    if os.path.exists(path / CONFIG) or not os.path.isfile(path / ARCHITECTURE):
        return load_run(folder, device)
    target = pick_device(device)
    try:
        model = HierarchicalFlow.from_pretrained(path)
    except ValueError as error:
        raise ValueError(f"run: {str(error).removeprefix('folder: ')}") from None
    return Trained(path, None, model.to(target), target)


def name_results(folder: Path, data: str, name: str) -> str:
    """Return `name`, which stands for images in the names of their results in a run folder.

    If other images of the same name have results there, eight digits of a hash of the path of
    `data` are added. The file `.NAME.source` holds the path of the images that came first. A name
    of more than 100 bytes is cut.
    """
    path = os.fsencode(data if data in NAMED_DATASETS else os.path.realpath(data))
    name = shortened(name)
    source = folder / f".{name}.source"
    try:
        with source.open("xb") as file:
            file.write(path)
    except FileExistsError:
        if source.read_bytes() != path:
            return f"{name}-{hashlib.sha256(path).hexdigest()[:8]}"
    return name


def export_run(run: Run, folder: Path) -> None:
    """Write the model of a run into a new folder, from which `from_pretrained` loads it.

    The folder also has a model card, README.md, and the run's picture of samples. Other pictures
    stay in the run, because they show held-out images.
    """
    content = contents(run.model)
    manifest = read_manifest(run.folder)
    images = None if manifest is None else int((manifest.parts == TRAIN).sum())
    parameters = sum(p.numel() for p in run.model.parameters())
    samples = run.folder / SAMPLES
    drawn = samples.is_file()
    card = model_card(run.config, parameters, images, run.folder / EVALUATION, drawn)

    def fill(temporary: Path) -> None:
        write(run.model, content, temporary)
        (temporary / CARD).write_text(card, encoding="utf-8")
        if drawn:
            shutil.copyfile(samples, temporary / SAMPLES)

    lock = make_folder(folder, fill, "out")
    (folder / LOCK).unlink(missing_ok=True)
    lock.release()


def changed_options(asked: RunConfig, recorded: RunConfig) -> list[Change]:
    """Return the options whose values differ from the recorded ones.

    Raises:
        ValueError: one of them may not change on resume. The message lists those that may.
    """
    changes = []
    wanted, had = asked.values(), recorded.values()
    for name, want in wanted.items():
        if want == (have := had.get(name)):
            continue
        if re.sub(r"^stages\[\d+\].", "stage_", name) not in CHANGEABLE_OPTIONS:
            raise ValueError(
                f"{name}: cannot change on resume (the run has {have}, got {want}); "
                f"{', '.join(map(as_option, CHANGEABLE_OPTIONS))} can; --init-from starts a new "
                "run from the weights of this one"
            )
        changes.append(Change(name, have, want))
    return changes


def initialize_from(model: HierarchicalFlow, folder: str) -> str | None:
    """Copy the averaged weights of another run, or those of an export, into a model.

    For each stage that both models have, the flow is copied. The selection of latents is copied
    too, if the manifold has the same dimension. Penalties are not copied, and further stages keep
    their weights.

    Returns:
        A warning if the classes have other names, because classes are matched by their numbers.

    Raises:
        ValueError: the folder is neither, or a weight has another shape there.
    """
    try:
        other = load_model(folder, "cpu").model
    except ValueError as error:
        raise ValueError(f"init_from: {str(error).removeprefix('run: ')}") from None
    stages, sources = (cast(list[ManifoldFlow], list(m.stages)) for m in (model, other))
    pairs = list(zip(stages, sources, strict=False))
    for number, (stage, source) in enumerate(pairs, start=1):
        wanted, found = stage.flow.state_dict(), source.flow.state_dict()
        for name in {**wanted, **found}:
            shapes = [tuple(t[name].shape) if name in t else None for t in (wanted, found)]
            if shapes[0] != shapes[1]:
                expected, came = ("no such weight" if s is None else f"shape {s}" for s in shapes)
                raise ValueError(
                    f"init_from: expected the image size, levels, steps, widths and dimensions of "
                    f"{folder}, but stage {number} differs ({name}: {expected} here, {came} there)"
                )
    for stage, source in pairs:
        stage.flow.load_state_dict(source.flow.state_dict())
        if stage.manifold_dim == source.manifold_dim:
            buffers = dict(stage.named_buffers(recurse=False))
            for name, buffer in source.named_buffers(recurse=False):
                buffers[name].copy_(buffer)
    if model.class_names == other.class_names:
        return None
    pairs_of_names = zip(other.class_names, model.class_names, strict=True)
    renamed = ", ".join(f"{b} -> {a}" for b, a in pairs_of_names if a != b)
    return f"--init-from: classes have other names in {folder}; their weights are copied: {renamed}"
