"""Checkpoints of a run: written whole or not at all, read without running any code in them.

A run folder holds two: `last.ckpt` and, from the second one on, the one before it. Each is written
to a temporary name, synced and renamed, the last one becoming the previous one.
"""

import io
import math
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from mflow_kernels.data.files import write_atomically
from mflow_kernels.models.pretrained import is_fixed

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class Checkpoint(NamedTuple):
    """What was read of one, on the CPU. Everything else that training needs is a function of the
    step, and is not read."""

    path: Path
    step: int  # optimizer steps taken
    tensors: dict[str, Tensor]  # weights, their average, the guard's figures
    moments: dict[int, dict[str, Tensor]]  # AdamW's state of each parameter that was trained
    grad_scaler: dict[str, float]  # empty where the networks are not in float16


class Expected(NamedTuple):
    """What a good checkpoint of a run holds."""

    tensors: Mapping[str, Tensor]  # of these names, shapes and dtypes
    parameters: Sequence[Tensor] | None = None  # in AdamW's order; None: do not look at its state
    steps: float = math.inf  # the most


def read_checkpoint(path: Path, expected: Expected) -> Checkpoint:
    """A checkpoint that training can resume from.

    Raises:
        ValueError: no such file, a torn or foreign one, one of another architecture, or one whose
            values training would not have written.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: expected {path}, found none")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a crafted file makes zipfile and pickle raise errors of any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint: expected a whole one of mflow train, got {path} ({reason[:120]})"
        ) from None
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise ValueError(
            f"checkpoint: expected one of mflow train, got another kind of file: {path}"
        )
    tensors = state["state_dict"]
    came = {name: _form(value) for name, value in _items(tensors)}
    wanted = {name: _form(tensor) for name, tensor in expected.tensors.items()}
    if wanted != came:
        names = sorted({*wanted, *came}, key=str)
        different = next(name for name in names if wanted.get(name) != came.get(name))
        raise ValueError(
            f"checkpoint: expected the architecture of config.yaml, got another in {path} "
            f"({different}: expected {wanted.get(different, 'nothing of that name')}, "
            f"got {came.get(different, 'nothing of that name')})"
        )
    try:
        _check_finite(tensors)
        for name, tensor in expected.tensors.items():
            if is_fixed(name):
                _check(torch.equal(tensors[name], tensor), name, "others than the architecture's")
        step = state["global_step"]
        _check(type(step) is int and 0 <= step <= expected.steps, "global_step", step)
        moments = {}
        if expected.parameters is not None:
            moments = _moments(state.get("optimizer_states"), expected.parameters, step)
        scaler: Any = state.get("grad_scaler")
        fits = isinstance(scaler, dict) and scaler.keys() in (set(), _SCALER)
        _check(fits and all(map(_is_count, scaler.values())), "grad_scaler", scaler)
    except ValueError as error:
        raise ValueError(
            f"checkpoint: expected one that mflow train wrote, got {path} ({error})"
        ) from None
    return Checkpoint(path, step, tensors, moments, scaler)


def newest_checkpoint(folder: Path, expected: Expected) -> Checkpoint | None:
    """The last good checkpoint of a run folder; None if there is none at all.

    Where `last.ckpt` is refused and the one before it is good, a line on stderr says so.

    Raises:
        ValueError: there are checkpoints, and none is good: what is wrong with the newest.
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
            print(f"{refusal}; taking {path.name}, of step {found.step}", file=sys.stderr)
        return found
    if refusals:
        raise refusals[0]
    return None


def _moments(
    states: object, parameters: Sequence[Tensor], step: int
) -> dict[int, dict[str, Tensor]]:
    """AdamW's state, each moment of its parameter's form; ValueError if it is not so."""
    one = isinstance(states, list) and len(states) == 1 and isinstance(states[0], dict)
    _check(one, "optimizer_states", type(states).__name__)
    moments = states[0].get("state")  # type: ignore[index]
    _check(isinstance(moments, dict) and bool(moments) == (step > 0), "the optimizer's state", "")
    for number, state in moments.items():
        name = f"the optimizer's state of parameter {number}"
        _check(type(number) is int and 0 <= number < len(parameters), name, "")
        wanted = {"step": _form(torch.zeros(()))}
        wanted |= dict.fromkeys(("exp_avg", "exp_avg_sq"), _form(parameters[number]))
        came = {key: _form(value) for key, value in _items(state)}
        _check(wanted == came, name, came)
        _check_finite(state)
    return moments


def _items(values: object) -> list[tuple[Any, Any]]:
    return list(values.items()) if isinstance(values, dict) else []


def _form(value: object) -> str:
    """A tensor's dtype and shape, or what it is instead of a plain tensor on the CPU."""
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


class _Sink:
    """A file for torch.save that never raises: an error inside of torch's writer in C++ could end
    the process. `error` holds the first one."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing: closing the file writes what is left."""


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning writes the checkpoints of a run."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
        path = Path(path)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                sink = _Sink(file)
                torch.save(checkpoint, sink)  # type: ignore[arg-type]
                if sink.error is not None:
                    raise sink.error

        write_atomically(path, write, previous=path.with_name(PREVIOUS))


class Checkpoints(Callback):
    """Writes `last.ckpt` every so many minutes or steps, before each validation, at the end, and
    before the process leaves on SIGTERM or SIGINT.

    The third SIGINT leaves without one, for a step that takes too long. It never ends a checkpoint
    that is being written.

    Args:
        folder: the run's.
        minutes: between two checkpoints, at most.
        steps: between two checkpoints, at most; None: as many as between two validations.
        resumed: the checkpoint that training goes on from.
    """

    def __init__(
        self, folder: Path, minutes: float, steps: int | None, resumed: Checkpoint | None = None
    ) -> None:
        self._path = folder / LAST
        self._minutes = minutes
        self._steps = steps or sys.maxsize
        self._resumed = resumed
        self._written, self._written_step = time.monotonic(), 0
        self._signal: int | None = None
        self._interrupts = 0
        self._writing = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All ranks have read the checkpoint by now. The next one to be written takes the place of
        # what was refused, and not of the only good one.
        if self._resumed is not None and trainer.is_global_zero:
            os.replace(self._resumed.path, self._path)
        self._written, self._written_step = time.monotonic(), trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            # After Lightning's own handlers, which put back what was there when training ends.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 2 and not self._writing:
            raise KeyboardInterrupt

    # Between two steps, when all figures of the one before are in metrics.csv.
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        passed = time.monotonic() - self._written > 60 * self._minutes
        leaves = self._signal is not None
        if trainer.world_size > 1:  # all ranks save and leave together, at steps they agree on
            agree = trainer.global_step % args[0].log_interval == 0
            passed, leaves = (
                agree and trainer.strategy.reduce_boolean_decision(wish, all=False)
                for wish in (passed, leaves)
            )
        if leaves or passed or trainer.global_step - self._written_step >= self._steps:
            self._write(trainer)
        if leaves:
            self._leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._signal and trainer.world_size == 1:
            self._leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)
        if self._signal:
            self._leave()

    def _write(self, trainer: Trainer) -> None:
        if trainer.global_step == self._written_step:
            return
        self._writing = True
        try:
            trainer.save_checkpoint(self._path)
        finally:
            self._writing = False
        self._written, self._written_step = time.monotonic(), trainer.global_step

    def _leave(self) -> None:
        raise SystemExit(128 + (self._signal or signal.SIGTERM))
