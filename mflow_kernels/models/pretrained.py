"""Save and load trained models as two files, `model.safetensors` and `model.json`.

The JSON file describes the architecture, and the other file holds every tensor. Any program can
read both, and neither can carry code. This module handles the parts of a model; `ManifoldFlow` and
`HierarchicalFlow` make a model of them.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from mflow_kernels.layers import Bijection
from mflow_kernels.models.chart import check_manifold_dim
from mflow_kernels.models.glow import Glow, VectorFlow
from mflow_kernels.models.objectives import ManifoldObjective
from mflow_kernels.models.penalty_weight import ErrorBound, Weight, WeightSchedule
from mflow_kernels.ops.scale import ScaleFunction

WEIGHTS = "model.safetensors"
ARCHITECTURE = "model.json"
STAGE = "stages.{}."  # prefix of a stage's tensors
_FORMAT = "mflow_kernels 1"
_IMAGE_FLOW_COUNTS = ("levels", "steps", "width")
_STAGE_COUNTS = ("manifold_dim", "steps", "width")
_STAGE = (*_STAGE_COUNTS, "domain", "rho", "weight")


class StageParts(NamedTuple):
    """The parts of one ManifoldFlow."""

    flow: Bijection
    manifold_dim: int
    objective: ManifoldObjective


class SavedStage(Protocol):
    """The part of `ManifoldFlow` that is saved."""

    flow: Bijection
    manifold_dim: int
    objective: ManifoldObjective

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...


class ImageFormat(NamedTuple):
    """The format of the images that a model was trained on: attributes of `Chart`."""

    n_bits: int | None
    crop: int | None
    class_names: tuple[str, ...]


def build_stages(
    architecture: Mapping[str, Any], *, reversible: bool = True, checkpoint_every: int | None = 8
) -> list[StageParts]:
    """Build the parts of the untrained stages of an architecture.

    Args:
        architecture: `image_shape` (C, H, W); `levels`, `steps` and `width` of the image flow; and
            `stages`, a list with one mapping per stage. Each mapping holds `manifold_dim`,
            `domain`, `rho`, `weight`, and `steps` and `width` of the stage's flow. The first stage
            repeats those of the image flow. Optional entries are `final_weight` with
            `weight_steps`, `error_bound`, `delta` and `sigma`. A class-conditional model also has
            `classes`, the number of its classes.
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        ValueError, TypeError: a model or an objective does not accept a value.
    """
    levels, steps, width = (architecture[name] for name in _IMAGE_FLOW_COUNTS)
    how: dict[str, Any] = {"reversible": reversible, "checkpoint_every": checkpoint_every}
    how["context_channels"] = architecture.get("classes", 0)
    flow: Glow | VectorFlow = Glow(tuple(architecture["image_shape"]), levels, steps, width, **how)
    parts: list[StageParts] = []
    for stage in architecture["stages"]:
        if parts:
            flow = VectorFlow(parts[-1].manifold_dim, stage["steps"], stage["width"], **how)
        # This number sets the size of the next flow, so check it before building that flow.
        check_manifold_dim(stage["manifold_dim"], flow.latent_shapes)
        parts.append(StageParts(flow, stage["manifold_dim"], _objective(stage)))
    return parts


def _objective(stage: Mapping[str, Any]) -> ManifoldObjective:
    """Build the objective of a stage. Exports of earlier versions have fewer entries."""
    weight: Weight = stage["weight"]
    if stage.get("error_bound") is not None:
        weight = ErrorBound(stage["error_bound"], stage["weight"])
    elif stage.get("final_weight") is not None:
        weight = WeightSchedule(stage["weight"], stage["final_weight"], stage["weight_steps"])
    delta, sigma = stage.get("delta", 1.0), stage.get("sigma", 0.1)
    return ManifoldObjective(stage["domain"], stage["rho"], weight, delta, sigma)


def architecture_of(stages: Sequence[SavedStage]) -> dict[str, Any]:
    """Return the architecture of a model's stages, in the form that `build_stages` takes.

    Raises:
        TypeError: the model has parts that an architecture cannot describe: flows other than `Glow`
            and `VectorFlow`, custom networks or scale functions, maps of weights, or a dtype other
            than float32.
    """
    for i, stage in enumerate(stages):
        flow, expected = stage.flow, Glow if i == 0 else VectorFlow
        if type(flow) is not expected:
            wrong = f"flow: expected {expected.__name__}, got {type(flow).__name__}"
        elif flow.context_channels is None:
            wrong = "network: expected built-in networks"
        elif flow.scale != ScaleFunction():
            wrong = "scale: expected the default scale function"
        elif isinstance(stage.objective.weight, (Tensor, tuple)):
            wrong = "weight: expected a weight that is no map"
        else:
            continue
        raise TypeError(f"stages[{i}].{wrong}; save the state_dict of other models")
    parameters = (p for stage in stages for p in stage.parameters())
    dtype = next((p.dtype for p in parameters if p.dtype != torch.float32), None)
    if dtype is not None:
        raise TypeError(f"model: expected parameters of dtype float32 to save, got {dtype}")
    image = cast(Glow, stages[0].flow)
    return {
        "image_shape": list(image.input_shape),
        **{name: getattr(image, name) for name in _IMAGE_FLOW_COUNTS},
        **({"classes": image.context_channels} if image.context_channels else {}),
        "stages": [_stage_of(stage) for stage in stages],
    }


def _stage_of(stage: SavedStage) -> dict[str, Any]:
    """Return the entries from which `build_stages` builds a stage."""
    flow, objective = cast(Glow | VectorFlow, stage.flow), stage.objective
    entries = {
        "manifold_dim": stage.manifold_dim,
        "steps": flow.steps,
        "width": flow.width,
        "domain": objective.domain,
        "rho": objective.rho,
        "weight": objective.weight,
        "delta": objective.delta,
        "sigma": objective.sigma,
    }
    if isinstance(objective.weight, WeightSchedule):
        entries["weight"] = objective.weight.start
        entries["final_weight"] = objective.weight.end
        entries["weight_steps"] = objective.weight.steps
    elif isinstance(objective.weight, ErrorBound):
        entries["weight"] = objective.weight.start or 1 / objective.weight.error
        entries["error_bound"] = objective.weight.error
    return entries


def save_pretrained(stages: Sequence[SavedStage], images: ImageFormat, folder: str | Path) -> None:
    """Write a model into a new folder, from which `read_pretrained` reads it.

    The folder appears only once its files are complete.

    Raises:
        TypeError: as `architecture_of`.
        ValueError: the folder exists, or cannot be created.
    """
    path = Path(folder)
    if path.exists():
        raise ValueError(f"folder: expected a new folder, but {path} exists")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        try:
            write_pretrained(stages, images, temporary)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"folder: cannot write {path} ({error.strerror})") from None


def write_pretrained(stages: Sequence[SavedStage], images: ImageFormat, folder: Path) -> None:
    """Write the two files of a model into an existing folder."""
    from safetensors.torch import save_file

    content = {
        "format": _FORMAT,
        "architecture": architecture_of(stages),
        # A value of 2^n_bits levels is x = (level + noise) / 2^n_bits - 0.5, noise in [0, 1).
        **images._asdict(),
    }
    tensors = {
        f"{STAGE.format(i)}{name}": tensor.detach().cpu().contiguous()
        for i, stage in enumerate(stages)
        for name, tensor in stage.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": _FORMAT})
    (folder / ARCHITECTURE).write_text(json.dumps(content, indent=2) + "\n")
    # safetensors ignores the umask and makes its files private.
    (folder / WEIGHTS).chmod((folder / ARCHITECTURE).stat().st_mode)


class Pretrained(NamedTuple):
    """The checked content of a folder that `mflow export` or `save_pretrained` wrote.

    `tensors` is the state dictionary of a HierarchicalFlow.
    """

    architecture: dict[str, Any]
    tensors: dict[str, Tensor]
    images: ImageFormat


def read_pretrained(folder: str | Path) -> Pretrained:
    """Read a folder that `mflow export` or `save_pretrained` wrote.

    Raises:
        ValueError: the folder or a file is missing, a file is damaged or was written by something
            else, or the two files do not belong together.
        ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    for name in (WEIGHTS, ARCHITECTURE):
        if not (path / name).is_file():
            raise ValueError(f"folder: expected {name}, which mflow export writes, in {folder}")
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, MemoryError, RuntimeError) as error:
        raise ValueError(f"folder: expected a valid {WEIGHTS} in {folder} ({error})") from None
    architecture, images = _read(path / ARCHITECTURE, len(tensors))
    try:
        with torch.device("meta"):  # compare shapes before allocating memory
            expected = _tensors_of(build_stages(architecture))
        for name in expected | tensors:
            own, stored = expected.get(name), tensors.get(name)
            if own is None or stored is None or own.shape != stored.shape:
                raise ValueError(
                    f"{name} is only in one of the two files, or its shape differs in "
                    f"{path / WEIGHTS}"
                )
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        # RuntimeError, OverflowError: a tensor has more elements than torch can count.
        reason = str(error).splitlines()[0]
        raise ValueError(f"folder: {ARCHITECTURE} in {folder}: {reason}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"folder: expected {name} in {path / WEIGHTS} to be {expected[name].dtype}, "
                f"got {tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"folder: expected finite numbers in {path / WEIGHTS}, but {name} has others"
            )
    try:
        check_selection(tensors)
    except ValueError as error:
        raise ValueError(
            f"folder: expected weights of a model in {path / WEIGHTS}: {error}"
        ) from None
    return Pretrained(architecture, tensors, images)


def check_selection(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the indices of a stage's u do not agree with its masks of v.

    Any selection of latent pixels is accepted, because this version may select other pixels than
    the version that wrote the file.
    """
    for name, index in tensors.items():
        prefix, found, _ = name.partition("manifold_index")
        if found:
            names = (f"{prefix}off_mask_{i}" for i in itertools.count())
            masks = [tensors[mask] for mask in itertools.takewhile(tensors.__contains__, names)]
            off = torch.cat([mask.flatten() for mask in masks])
            if not torch.equal((~off).nonzero()[:, 0], index):
                raise ValueError(f"{name} differs from the masks")


def _tensors_of(stages: Sequence[StageParts]) -> dict[str, Tensor]:
    """Return tensors with the names, shapes and dtypes of a HierarchicalFlow of these parts."""
    tensors: dict[str, Tensor] = {}
    for i, (flow, manifold_dim, objective) in enumerate(stages):
        own = {f"flow.{name}": tensor for name, tensor in flow.state_dict().items()}
        own |= {f"objective.{name}": tensor for name, tensor in objective.state_dict().items()}
        latents = cast(tuple[tuple[int, ...], ...], flow.latent_shapes)
        for j, shape in enumerate(latents):
            own[f"off_mask_{j}"] = torch.empty(shape, dtype=torch.bool)
        own["manifold_index"] = torch.empty(manifold_dim, dtype=torch.int64)
        tensors |= {f"{STAGE.format(i)}{name}": tensor for name, tensor in own.items()}
    return tensors


def _read(path: Path, tensors: int) -> tuple[dict[str, Any], ImageFormat]:
    """Read the architecture and the format of the images from a JSON file, and check them.

    `tensors` is the number of tensors in the weights file.
    """
    expected = f"folder: expected an architecture of mflow export in {path}"
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{expected} ({error})") from None
    except RecursionError:
        raise ValueError(f"{expected}, got JSON that is nested too deeply") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        actual = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{expected} with format {_FORMAT!r}, got {actual!r}")
    architecture: Any = content.get("architecture")
    try:
        shape, stages = architecture["image_shape"], architecture["stages"]
        counts = [*shape, *(architecture[name] for name in _IMAGE_FLOW_COUNTS)]
        counts += [stage[name] for stage in stages for name in _STAGE_COUNTS]
        complete = all(name in stage for stage in stages for name in _STAGE)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{expected} ({error!r})") from None
    positive = all(type(count) is int and count > 0 for count in counts)
    if not (positive and complete and len(shape) == 3 and stages):
        raise ValueError(f"{expected} with positive integers and at least one stage")
    # Each step of flow has tensors. This refuses files whose steps would take hours to build.
    depth = architecture["levels"] * architecture["steps"]
    if depth + sum(stage["steps"] for stage in stages[1:]) > tensors:
        raise ValueError(f"{expected} with no more steps than {WEIGHTS} has tensors")
    classes = architecture.get("classes", 0)
    n_bits, crop = content.get("n_bits"), content.get("crop")
    names = content.get("class_names", [])
    if not (
        (n_bits is None or (type(n_bits) is int and 1 <= n_bits <= 8))
        and (crop is None or (type(crop) is int and crop > 0))
        and type(classes) is int
        and classes >= 0
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len(names) in (0, classes)
    ):
        raise ValueError(f"{expected} with n_bits, crop, classes and class_names of an export")
    return architecture, ImageFormat(n_bits, crop, tuple(names))
