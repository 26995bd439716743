"""Checkpoints of a run: written whole or not at all, read without running any code in them.

A run folder holds two: `last.ckpt` and, from the second one on, the one before it. Each is written
to a temporary name, synced and renamed, the last one becoming the previous one.
"""

import os
import pickle
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mflow_kernels.training.files import write_atomically

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"

Shapes = Mapping[str, tuple[int, ...]]


class Checkpoint(NamedTuple):
    """One that was read: `state` is Lightning's dictionary, on the CPU."""

    path: Path
    state: dict[str, Any]


def read_checkpoint(path: Path, expected: Shapes) -> Checkpoint:
    """A checkpoint whose tensors have the expected names and shapes.

    Raises:
        ValueError: no such file, a torn or foreign one, or another architecture's.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: expected {path}, found none")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint: expected a whole one of mflow train, got {path} ({reason[:120]})"
        ) from None
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise ValueError(
            f"checkpoint: expected one of mflow train, got another kind of file: {path}"
        )
    came = {name: tuple(tensor.shape) for name, tensor in state["state_dict"].items()}
    if dict(expected) != came:
        names = sorted({*expected, *came})
        different = next(name for name in names if expected.get(name) != came.get(name))
        raise ValueError(
            f"checkpoint: expected the architecture of config.yaml, got another in {path} "
            f"({different}: expected {_shape(expected, different)}, "
            f"got {_shape(came, different)})"
        )
    return Checkpoint(path, state)


def newest_checkpoint(folder: Path, expected: Shapes) -> Checkpoint | None:
    """The last good checkpoint of a run folder; None where there is none at all.

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
            step = found.state["global_step"]
            print(f"{refusal}; taking {path.name}, of step {step}", file=sys.stderr)
        return found
    if refusals:
        raise refusals[0]
    return None


def keep_as_last(checkpoint: Checkpoint) -> Path:
    """Give a checkpoint that is to be gone on from the name `last.ckpt`, so that the next one to
    be written takes the place of what was refused, and not of the only good one."""
    path = checkpoint.path.with_name(LAST)
    os.replace(checkpoint.path, path)
    return path


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning writes and reads the checkpoints of a run."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
        path = Path(path)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # by its name torch hides that a disk is full
                torch.save(checkpoint, file)

        write_atomically(path, write, previous=path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


class Checkpoints(Callback):
    """Writes `last.ckpt` every so many minutes or steps, before each validation, at the end, and
    before the process leaves on SIGTERM or SIGINT; a second SIGINT leaves at once.

    Args:
        folder: the run's.
        minutes: between two checkpoints, at most.
        steps: between two checkpoints, at most; None: as many as between two validations.
    """

    def __init__(self, folder: Path, minutes: float, steps: int | None) -> None:
        self._path = folder / LAST
        self._minutes = minutes
        self._steps = steps or sys.maxsize
        self._written, self._written_step = time.monotonic(), 0
        self._signal: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written, self._written_step = time.monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            # After Lightning's own handlers, which put back what was there when training ends.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    # Between two steps, when all figures of the one before are in metrics.csv.
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        # What figures are logged under: Lightning saves it one step late, or not, by the hook.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
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
        if trainer.global_step != self._written_step:
            trainer.save_checkpoint(self._path)
            self._written, self._written_step = time.monotonic(), trainer.global_step

    def _leave(self) -> None:
        raise SystemExit(128 + (self._signal or signal.SIGTERM))


def _shape(shapes: Shapes, name: str) -> str:
    return str(shapes[name]) if name in shapes else "nothing of that name"
