"""Save and load models as two files, `model.safetensors` and `model.json`.

The JSON file describes the architecture (`models/architecture.py`), and the other file holds every
tensor. Any program can read both, and neither can carry code.
"""

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mflow_kernels.layers.model import Model
from mflow_kernels.models.architecture import build_empty, check_size, describe, dtype_of
from mflow_kernels.models.hierarchy import HierarchicalFlow
from mflow_kernels.models.manifold import ManifoldFlow

WEIGHTS = "model.safetensors"
ARCHITECTURE = "model.json"
_FORMAT = "mflow_kernels 2"
_EARLIER = "mflow_kernels 1"  # hierarchies over a Glow alone
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64)}
_DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16)}

_M = TypeVar("_M", bound=Model)


def save(model: Any, folder: str | Path, overwrite: bool = False) -> None:
    """Write a model into a folder; see `Model.save_pretrained`.

    The folder appears only once its files are complete.
    """
    path = Path(folder)
    content = contents(model)
    # Use the first 100 characters only: a file name, with these additions, may have 255 bytes.
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    old = temporary.with_suffix(".old")
    replaces = os.path.isdir(path) and {*os.listdir(path)} == {ARCHITECTURE, WEIGHTS}
    if os.path.lexists(path) and not (overwrite and replaces):
        hint = "; overwrite=True replaces the model in it" if replaces else ""
        raise ValueError(f"folder: expected a new folder, but {path} exists{hint}")
    try:
        temporary.mkdir()
        try:
            write(model, content, temporary)
            if replaces:
                path.rename(old)
            temporary.rename(path)
        finally:
            if os.path.lexists(old) and not os.path.lexists(path):
                old.rename(path)
            for unused in (temporary, old):
                shutil.rmtree(unused, ignore_errors=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"folder: cannot write {_short(path)} ({reason})") from None


def contents(model: Any) -> dict[str, Any]:
    """Return the content of `model.json` for a model.

    Raises:
        TypeError: as `describe`.
        ValueError: `load` would refuse the model: its numbers are not finite, or `n_bits`, `crop`
            or `class_names` are none of a model.
    """
    images = (model.n_bits, model.crop, list(model.class_names))
    if not _are_of_images(*images) or len(model.class_names) not in (0, _classes(model)):
        raise ValueError(
            "n_bits, crop, class_names: expected None or 1 to 8, None or a positive number, and no "
            f"name or one for each of {_classes(model)} classes, got {images}"
        )
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"model: expected finite numbers to save, but {name} has others")
    return {
        "format": _FORMAT,
        "model": describe(model),
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        # A value of 2^n_bits levels is x = (level + noise) / 2^n_bits - 0.5, noise in [0, 1).
        "n_bits": model.n_bits,
        "crop": model.crop,
        "class_names": list(model.class_names),
    }


def write(model: nn.Module, content: Mapping[str, Any], folder: Path) -> None:
    """Write the two files of a model into an existing folder."""
    from safetensors.torch import save_file

    # A copy if the tensor is a view, whose whole memory would be written.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": _FORMAT})
    (folder / ARCHITECTURE).write_text(json.dumps(content, indent=2) + "\n")
    # safetensors ignores the umask and makes its files private.
    (folder / WEIGHTS).chmod((folder / ARCHITECTURE).stat().st_mode)


def load(cls: type[_M], folder: str | Path) -> _M:
    """Load a model of a class from a folder; see `Model.from_pretrained`."""
    model = _as(cls, read(folder), folder)
    cast(nn.Module, model).eval()
    return model


def read(folder: str | Path) -> Any:
    """Read a folder that `mflow export` or `save_pretrained` wrote, and build its model.

    Raises:
        ValueError: the folder or a file is missing, a file is damaged or was written by something
            else, or the two files do not belong together.
        ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    for name in (WEIGHTS, ARCHITECTURE):
        try:
            (path / name).stat()
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"folder: expected {name}, which mflow export writes, in {_short(path)} ({reason})"
            ) from None
    try:
        with safe_open(path / WEIGHTS, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, MemoryError, RuntimeError) as error:
        raise ValueError(f"folder: expected a valid {WEIGHTS} in {folder} ({error})") from None
    architecture, dtype, images = _read_architecture(path / ARCHITECTURE)
    try:
        check_size(architecture, len(tensors), sum(t.numel() for t in tensors.values()))
        model = build_empty(architecture, dtype)
        expected = model.state_dict()
        for name in expected | tensors:
            own, found = expected.get(name), tensors.get(name)
            if own is None or found is None or own.shape != found.shape:
                raise ValueError(f"{name} is only in one of the two files, or its shape differs")
            if found.dtype != own.dtype or not found.isfinite().all():
                raise ValueError(
                    f"expected finite numbers of {own.dtype} in {name}, got others ({found.dtype})"
                )
        check_selection(tensors)
        classes = _classes(model)
        if len(images[2]) not in (0, classes):
            raise ValueError(f"expected no class_names or {classes}, got {len(images[2])}")
    except Exception as error:  # constructors may fail in any way on values that nobody wrote
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"folder: {ARCHITECTURE}, {WEIGHTS} in {folder}: {reason[:300]}") from None
    laid_out = {name: _laid_out(tensor, expected[name]) for name, tensor in tensors.items()}
    model.load_state_dict(laid_out, assign=True)
    cast(Any, model).describe_images(*images)
    return model


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


def _as(cls: type[_M], model: Any, folder: str | Path) -> _M:
    """Return the model as an instance of `cls`, or raise ValueError."""
    if cls is ManifoldFlow and type(model) is HierarchicalFlow:
        if len(model.stages) > 1:
            raise ValueError(
                f"folder: expected one stage in {folder}, got {len(model.stages)}; load all by "
                "HierarchicalFlow.from_pretrained, whose stages[0] is the first"
            )
        return cast(_M, model.stages[0])
    if cls is HierarchicalFlow and type(model) is ManifoldFlow:
        whole = HierarchicalFlow([model])
        whole.describe_images(model.n_bits, model.crop, model.class_names)
        return cast(_M, whole)
    if not isinstance(model, cls):
        name = type(model).__name__
        raise ValueError(
            f"folder: expected a model of class {cls.__name__} in {folder}, got one of class "
            f"{name}, which {name}.from_pretrained loads"
        )
    return model


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of `like`, on the CPU."""
    empty = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device="cpu")
    return empty.copy_(tensor)


def _classes(model: nn.Module) -> int:
    """The context channels of a model's networks: the number of classes it can have."""
    channels = (getattr(module, "context_channels", None) for module in model.modules())
    return next((number for number in channels if number is not None), 0)


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) < 300 else f"{text[:300]}..."


def _read_architecture(path: Path) -> tuple[Any, torch.dtype, tuple[Any, Any, tuple[str, ...]]]:
    """Read the architecture, the dtype, and (n_bits, crop, class_names) from `model.json`.

    All but the architecture is checked.
    """
    expected = f"folder: expected an architecture of mflow export in {path}"
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{expected} ({error})") from None
    if not isinstance(content, dict) or content.get("format") not in (_FORMAT, _EARLIER):
        actual = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{expected} with format {_FORMAT!r}, got {actual!r}")
    if content["format"] == _FORMAT:
        architecture, dtype = content.get("model"), content.get("dtype")
    else:
        try:
            architecture, dtype = _of_earlier(content["architecture"]), "float32"
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{expected} ({error!r})") from None
    n_bits, crop = content.get("n_bits"), content.get("crop")
    names = content.get("class_names", [])
    if not (
        isinstance(architecture, dict)
        and isinstance(dtype, str)
        and dtype in _DTYPES
        and _are_of_images(n_bits, crop, names)
    ):
        raise ValueError(
            f"{expected} with a model, dtype, n_bits, crop and class_names of an export"
        )
    return architecture, _DTYPES[dtype], (n_bits, crop, tuple(names))


def _are_of_images(n_bits: Any, crop: Any, names: Any) -> bool:
    """Whether these are values of `n_bits`, `crop` and `class_names`."""
    return (
        (n_bits is None or (type(n_bits) is int and 1 <= n_bits <= 8))
        and (crop is None or (type(crop) is int and crop > 0))
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    )


def _of_earlier(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a model that an earlier version saved."""
    scale = {"class": "ScaleFunction", "kind": "tanh", "offset": 2.0, "eps": 0.0, "clamp": 1.0}
    how = {"scale": {**scale, "order": "shift-scale"}, "reversible": True, "checkpoint_every": 8}
    how |= {"coupling": "affine", "bins": 8}
    how["context_channels"] = architecture.get("classes", 0)
    stages: list[Any] = []
    for stage in architecture["stages"]:
        flow = {"steps": stage["steps"], "width": stage["width"], **how}
        if not stages:
            image = {"class": "Glow", "image_shape": architecture["image_shape"]}
            flow = {**image, "levels": architecture["levels"], **flow}
            flow |= {name: architecture[name] for name in ("steps", "width")}
        else:
            flow = {"class": "VectorFlow", "dim": stages[-1]["manifold_dim"], **flow}
            flow["reversible"] = False  # the default of vectors
        weight: Any = stage["weight"]
        if stage.get("error_bound") is not None:
            weight = {"class": "ErrorBound", "error": stage["error_bound"], "start": weight}
        elif stage.get("final_weight") is not None:
            weight = {"class": "WeightSchedule", "start": weight, "end": stage["final_weight"]}
            weight["steps"] = stage["weight_steps"]
        objective = {"class": "ManifoldObjective", "domain": stage["domain"], "rho": stage["rho"]}
        objective |= {"weight": weight, "delta": stage.get("delta", 1.0)}
        objective["sigma"] = stage.get("sigma", 0.1)
        stages.append({"class": "ManifoldFlow", "flow": flow, "objective": objective})
        stages[-1]["manifold_dim"] = stage["manifold_dim"]
    return {"class": "HierarchicalFlow", "stages": stages}
