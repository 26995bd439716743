"""Save and load trained models as two files, `model.safetensors` and `model.json`.

The JSON file describes the architecture, the other one holds every tensor. Any program can read
both, and neither can carry code.
"""

import itertools
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mflow_kernels.layers import Bijection
from mflow_kernels.models.glow import Glow, VectorFlow
from mflow_kernels.models.hierarchy import HierarchicalFlow
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.objectives import ManifoldObjective
from mflow_kernels.models.penalty_weight import ErrorBound, Weight, WeightSchedule

WEIGHTS = "model.safetensors"
ARCHITECTURE = "model.json"
_FORMAT = "mflow_kernels 1"
_IMAGE_FLOW_COUNTS = ("levels", "steps", "width")
_STAGE_COUNTS = ("manifold_dim", "steps", "width")
_STAGE = (*_STAGE_COUNTS, "domain", "rho", "weight")


def build(
    architecture: Mapping[str, Any], *, reversible: bool = True, checkpoint_every: int | None = 8
) -> HierarchicalFlow:
    """Build the untrained model of an architecture.

    Args:
        architecture: `image_shape` (C, H, W); `levels`, `steps` and `width` of the image flow; and
            `stages`, a list with one mapping per stage. Each mapping holds `manifold_dim`,
            `domain`, `rho`, `weight`, and `steps` and `width` of the stage's flow. The first stage
            repeats those of the image flow. Optional entries are `final_weight` with
            `weight_steps`, `error_bound`, `delta` and `sigma`.
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        ValueError, TypeError: a model or an objective does not accept a value.
    """
    flows = _flows(architecture, reversible=reversible, checkpoint_every=checkpoint_every)
    stages = architecture["stages"]
    return HierarchicalFlow(
        [
            ManifoldFlow(
                flow,
                manifold_dim=stage["manifold_dim"],
                objective=_objective(stage),
            )
            for flow, stage in zip(flows, stages, strict=True)
        ]
    )


def _objective(stage: Mapping[str, Any]) -> ManifoldObjective:
    """Build the objective of a stage. Exports of earlier versions have fewer entries."""
    weight: Weight = stage["weight"]
    if stage.get("error_bound") is not None:
        weight = ErrorBound(stage["error_bound"], stage["weight"])
    elif stage.get("final_weight") is not None:
        weight = WeightSchedule(stage["weight"], stage["final_weight"], stage["weight_steps"])
    delta, sigma = stage.get("delta", 1.0), stage.get("sigma", 0.1)
    return ManifoldObjective(stage["domain"], stage["rho"], weight, delta, sigma)


def _flows(architecture: Mapping[str, Any], **how: Any) -> list[Bijection]:
    """Build the flow of each stage."""
    levels, steps, width = (architecture[name] for name in _IMAGE_FLOW_COUNTS)
    flows: list[Bijection] = [Glow(tuple(architecture["image_shape"]), levels, steps, width, **how)]
    for outer, own in pairwise(architecture["stages"]):
        flows.append(VectorFlow(outer["manifold_dim"], own["steps"], own["width"], **how))
    return flows


def save_pretrained(
    model: HierarchicalFlow, architecture: Mapping[str, Any], folder: Path, **notes: Any
) -> None:
    """Write a model and its architecture into an existing folder.

    `notes` are further entries of the JSON file.
    """
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": _FORMAT})
    text = json.dumps({"format": _FORMAT, "architecture": dict(architecture), **notes}, indent=2)
    (folder / ARCHITECTURE).write_text(text + "\n")
    # safetensors ignores the umask and makes its files private.
    (folder / WEIGHTS).chmod((folder / ARCHITECTURE).stat().st_mode)


def load_pretrained(folder: str | Path) -> HierarchicalFlow:
    """Load the model from a folder that `mflow export` wrote, on the CPU and in evaluation mode.

    Raises:
        ValueError: the folder or a file is missing, a file is torn or does not come from
            `mflow export`, or the two files do not belong together.
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
    architecture = _read(path / ARCHITECTURE, len(tensors))
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):  # compare shapes before allocating memory
            flows = _flows(architecture)
        _compare(_flow_shapes(flows), stored, path)
        model = build(architecture)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        _compare(shapes, stored, path)
        _compare(stored, shapes, path)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        # RuntimeError, OverflowError: a tensor has more elements than torch can count.
        reason = str(error).splitlines()[0]
        raise ValueError(f"folder: {ARCHITECTURE} in {folder}: {reason}") from None
    for name, own in model.state_dict().items():
        tensor = tensors[name]
        if tensor.dtype != own.dtype:
            raise ValueError(
                f"folder: expected {name} in {path / WEIGHTS} to be {own.dtype}, got {tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"folder: expected weights of a model in {path / WEIGHTS}: {name}")
    try:
        check_selection(tensors)
    except ValueError as error:
        raise ValueError(
            f"folder: expected weights of a model in {path / WEIGHTS}: {error}"
        ) from None
    model.load_state_dict(tensors)
    return model.eval()


def check_selection(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the index of a stage's u does not belong to its masks of v.

    A file holds the latent pixels that its model selected. They need not be those that this version
    would select.
    """
    for name, index in tensors.items():
        prefix, found, _ = name.partition("manifold_index")
        if found:
            names = (f"{prefix}off_mask_{i}" for i in itertools.count())
            masks = [tensors[mask] for mask in itertools.takewhile(tensors.__contains__, names)]
            off = torch.cat([mask.flatten() for mask in masks])
            if not torch.equal((~off).nonzero()[:, 0], index):
                raise ValueError(f"{name} differs from the masks")


def _flow_shapes(flows: list[Bijection]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a HierarchicalFlow's large tensors: those of its flows and masks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, flow in enumerate(flows):
        for name, tensor in flow.state_dict().items():
            shapes[f"stages.{i}.flow.{name}"] = tuple(tensor.shape)
        latents = cast(tuple[tuple[int, ...], ...], flow.latent_shapes)
        shapes |= {f"stages.{i}.off_mask_{j}": shape for j, shape in enumerate(latents)}
    return shapes


def _compare(
    shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Raise ValueError if a name in `shapes` is missing in `others` or has another shape there."""
    for name, shape in shapes.items():
        if others.get(name) != shape:
            raise ValueError(
                f"{name} is only in one of the two files, or its shape differs in {path / WEIGHTS}"
            )


def _read(path: Path, tensors: int) -> dict[str, Any]:
    """Read the architecture from a JSON file and check its names and types.

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
        came = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{expected} with format {_FORMAT!r}, got {came!r}")
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
    return architecture
