"""Trained models as two files that any program can read: `model.safetensors` and `model.json`.

Neither can carry code. The JSON says what to build, the other file holds every tensor of it.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from mflow_kernels.layers import Bijection
from mflow_kernels.models.glow import Glow, VectorFlow
from mflow_kernels.models.hierarchy import HierarchicalFlow
from mflow_kernels.models.manifold import ManifoldFlow
from mflow_kernels.models.objectives import ManifoldObjective

WEIGHTS = "model.safetensors"
ARCHITECTURE = "model.json"
_FORMAT = "mflow_kernels 1"
_COUNTS = ("levels", "steps", "width")  # of the image flow
_STAGE = ("manifold_dim", "steps", "width", "domain", "rho", "weight")


def build(
    architecture: Mapping[str, Any], *, reversible: bool = True, checkpoint_every: int | None = 8
) -> HierarchicalFlow:
    """The untrained model of an architecture.

    Args:
        architecture: image_shape (C, H, W); levels, steps and width of the image flow; and stages,
            one mapping each of manifold_dim, domain, rho, weight, and the steps and width of its
            flow (of the first, the image flow's again).
        reversible, checkpoint_every: as for `ReversibleChain`.

    Raises:
        ValueError, TypeError: what the models and objectives refuse.
    """
    flows = _flows(architecture, reversible=reversible, checkpoint_every=checkpoint_every)
    stages = architecture["stages"]
    return HierarchicalFlow(
        [
            ManifoldFlow(
                flow,
                manifold_dim=stage["manifold_dim"],
                objective=ManifoldObjective(stage["domain"], stage["rho"], stage["weight"]),
            )
            for flow, stage in zip(flows, stages, strict=True)
        ]
    )


def _flows(architecture: Mapping[str, Any], **how: Any) -> list[Bijection]:
    """The flow of each stage."""
    levels, steps, width = (architecture[name] for name in _COUNTS)
    flows: list[Bijection] = [Glow(tuple(architecture["image_shape"]), levels, steps, width, **how)]
    for outer, own in pairwise(architecture["stages"]):
        flows.append(VectorFlow(outer["manifold_dim"], own["steps"], own["width"], **how))
    return flows


def save_pretrained(
    model: HierarchicalFlow, architecture: Mapping[str, Any], folder: Path, **notes: Any
) -> None:
    """Write a model and the architecture that it was built from into an existing folder; `notes`
    go into the JSON too."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": _FORMAT})
    text = json.dumps({"format": _FORMAT, "architecture": dict(architecture), **notes}, indent=2)
    (folder / ARCHITECTURE).write_text(text + "\n")
    # safetensors makes files that nobody else may read, whatever the umask.
    (folder / WEIGHTS).chmod((folder / ARCHITECTURE).stat().st_mode)


def load_pretrained(folder: str | Path) -> HierarchicalFlow:
    """The model of a folder that `mflow export` wrote, on the CPU and in evaluation mode.

    Raises:
        ValueError: no such folder, a torn or foreign file, or two that do not belong together.
        ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    for name in (WEIGHTS, ARCHITECTURE):
        if not (path / name).is_file():
            raise ValueError(f"folder: expected one of mflow export with {name}, got {folder}")
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, MemoryError, RuntimeError) as error:
        raise ValueError(f"folder: expected a whole {WEIGHTS} in {folder} ({error})") from None
    architecture = _read(path / ARCHITECTURE, len(tensors))
    came = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):  # compared with the file before any memory is taken
            flows = _flows(architecture)
        _compare(_flow_shapes(flows), came, path)
        model = build(architecture)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        _compare(shapes, came, path)
        _compare(came, shapes, path)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        # RuntimeError, OverflowError: tensors of more elements than torch can count
        reason = str(error).splitlines()[0]
        raise ValueError(f"folder: {ARCHITECTURE} in {folder}: {reason}") from None
    for name, own in model.state_dict().items():
        tensor = tensors[name]
        if tensor.dtype != own.dtype:
            raise ValueError(
                f"folder: expected {own.dtype} in {path / WEIGHTS}, not {name}'s dtype"
            )
        if not tensor.isfinite().all() or (is_fixed(name) and not tensor.equal(own)):
            raise ValueError(f"folder: expected weights of a model in {path / WEIGHTS}: {name}")
    model.load_state_dict(tensors)
    return model.eval()


def is_fixed(name: str) -> bool:
    """Whether the architecture alone decides the values of a tensor of a model."""
    return name.rpartition(".")[2].startswith(("manifold_index", "off_mask_"))


def _flow_shapes(flows: list[Bijection]) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a HierarchicalFlow, those that grow with its architecture."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, flow in enumerate(flows):
        for name, tensor in flow.state_dict().items():
            shapes[f"stages.{i}.flow.{name}"] = tuple(tensor.shape)
        latents = cast(tuple[tuple[int, ...], ...], flow.latent_shapes)
        shapes |= {f"stages.{i}.off_mask_{j}": shape for j, shape in enumerate(latents)}
    return shapes


def _compare(
    shapes: Mapping[str, tuple[int, ...]], came: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    for name, shape in shapes.items():
        if came.get(name) != shape:
            raise ValueError(f"{name} has another shape in {path / WEIGHTS}, or is in one alone")


def _read(path: Path, tensors: int) -> dict[str, Any]:
    """The architecture in a JSON file, its names and types checked; so many tensors go with it."""
    told = f"folder: expected an architecture of mflow export in {path}"
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{told} ({error})") from None
    except RecursionError:
        raise ValueError(f"{told}, got JSON that is nested too deeply") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        came = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{told} with format {_FORMAT!r}, got {came!r}")
    architecture: Any = content.get("architecture")
    try:
        shape, stages = architecture["image_shape"], architecture["stages"]
        whole = [*shape, *(architecture[name] for name in _COUNTS)]
        whole += [stage[name] for stage in stages for name in _STAGE[:3]]
        given = all(name in stage for stage in stages for name in _STAGE)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{told} ({error!r})") from None
    counts = all(type(number) is int and number > 0 for number in whole)
    if not (counts and given and len(shape) == 3 and stages):
        raise ValueError(f"{told}, of positive whole numbers and at least one stage")
    # Each step of flow has tensors: what would build for hours does not belong to the file.
    depth = architecture["levels"] * architecture["steps"]
    if depth + sum(stage["steps"] for stage in stages[1:]) > tensors:
        raise ValueError(f"{told} with as many steps as {WEIGHTS} has tensors for")
    return architecture
