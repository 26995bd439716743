"""Reads the checkpoints of a run, and runs no code from them.

A run folder holds the last two checkpoints, `last.ckpt` and `previous.ckpt`.
"""

import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.models.pretrained import check_selection
from mflow_kernels.runs.progress import Progress

LAST = "last.ckpt"
METRICS = "metrics.csv"
PREVIOUS = "previous.ckpt"
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class Checkpoint(NamedTuple):
    """The content of a checkpoint, on the CPU.

    Everything else that training needs is a function of these and of the options, and is not read.
    """

    path: Path
    step: int  # number of optimizer steps taken
    tensors: dict[str, Tensor]  # weights, averaged weights, and the guard's statistics
    moments: dict[int, dict[str, Tensor]]  # the optimizer's state of each trained parameter
    grad_scaler: dict[str, float]  # empty unless the networks are in float16
    progress: Progress | None  # None if it is not needed to resume


class Expected(NamedTuple):
    """The content that a checkpoint of a run must have."""

    tensors: Mapping[str, Tensor]  # the names, shapes and dtypes
    # Needed to resume. If `parameters` is None, the optimizer and the progress are not checked.
    # In the optimizer's order, with the number of moments that it keeps of each.
    parameters: Sequence[tuple[Tensor, int]] | None = None
    stages: int = 0  # number of stages
    images: int = 0  # number of training images


def read_checkpoint(path: Path, expected: Expected) -> Checkpoint:
    """Read a checkpoint and check that training can resume from it.

    Raises:
        ValueError: the file does not exist, is damaged or of another kind, belongs to another
            architecture, or holds values that training does not write.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: expected {path}, found none")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not check the checksums
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for crafted files, zipfile and pickle raise errors of any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint: expected a complete checkpoint of mflow train, got {path} "
            f"({reason[:120]})"
        ) from None
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise ValueError(
            f"checkpoint: expected a checkpoint of mflow train, got another kind of file: {path}"
        )
    tensors = state["state_dict"]
    came = {name: _form(value) for name, value in _items(tensors)}
    wanted = {name: _form(tensor) for name, tensor in expected.tensors.items()}
    if wanted != came:
        names = sorted({*wanted, *came}, key=str)
        different = next(name for name in names if wanted.get(name) != came.get(name))
        raise ValueError(
            f"checkpoint: expected the architecture of config.yaml, got another one in {path} "
            f"({different}: expected {wanted.get(different, 'no such tensor')}, "
            f"got {came.get(different, 'no such tensor')})"
        )
    try:
        _check_finite(tensors)
        check_selection(tensors)
        step = state["global_step"]
        _check(type(step) is int and 0 <= step < 2**63, "global_step", step)
        moments, progress = {}, None
        if expected.parameters is not None:
            moments = _moments(state.get("optimizer_states"), expected.parameters, step)
            recorded = state.get("progress")
            progress = Progress.from_dict(recorded, step, expected.stages, expected.images)
        scaler: Any = state.get("grad_scaler")
        fits = isinstance(scaler, dict) and scaler.keys() in (set(), _SCALER)
        _check(fits and all(map(_is_count, scaler.values())), "grad_scaler", scaler)
    except ValueError as error:
        raise ValueError(
            f"checkpoint: expected a checkpoint that mflow train wrote, got {path} ({error})"
        ) from None
    return Checkpoint(path, step, tensors, moments, scaler, progress)


def newest_checkpoint(folder: Path, expected: Expected) -> Checkpoint | None:
    """Return the newest checkpoint of a run folder that can be read; None if there is none.

    If `last.ckpt` is refused, `previous.ckpt` is taken and a line on stderr says so.

    Raises:
        ValueError: every checkpoint is refused. The message is about the newest.
    """
    refusals = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            found = read_checkpoint(path, expected)
        except ValueError as error:
            refusals.append(error)
            continue
        for refusal in refusals:
            print(f"{refusal}; using {path.name} of step {found.step}", file=sys.stderr)
        return found
    if refusals:
        raise refusals[0]
    return None


def _moments(
    states: object, parameters: Sequence[tuple[Tensor, int]], step: int
) -> dict[int, dict[str, Tensor]]:
    """Return the optimizer's state.

    Raises:
        ValueError: a moment does not have the dtype and shape of its parameter.
    """
    one = isinstance(states, list) and len(states) == 1 and isinstance(states[0], dict)
    _check(one, "optimizer_states", type(states).__name__)
    moments = states[0].get("state")  # type: ignore[index]
    _check(isinstance(moments, dict) and bool(moments) == (step > 0), "the optimizer's state", "")
    for number, state in moments.items():
        name = f"the optimizer's state of parameter {number}"
        _check(type(number) is int and 0 <= number < len(parameters), name, "")
        wanted = {"step": _form(torch.zeros(()))}
        parameter, count = parameters[number]
        wanted |= dict.fromkeys(("exp_avg", "exp_avg_sq")[:count], _form(parameter))
        came = {key: _form(value) for key, value in _items(state)}
        _check(wanted == came, name, came)
        _check_finite(state)
    return moments


def _items(values: object) -> list[tuple[Any, Any]]:
    return list(values.items()) if isinstance(values, dict) else []


def _form(value: object) -> str:
    """Return the dtype and shape of a dense tensor on the CPU, or the type of any other value."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        _check(bool(tensor.isfinite().all()), name, "values that are not finite")


def _is_count(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _check(holds: bool, name: str, came: object) -> None:
    if not holds:
        raise ValueError(f"{name}: {str(came)[:60]}" if came != "" else name)
