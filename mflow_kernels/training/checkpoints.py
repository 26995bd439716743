"""Writes the checkpoints of a run atomically.

A new checkpoint is written to a temporary name and synced. Then `last.ckpt` is renamed to
`previous.ckpt`, and the new file to `last.ckpt`.
"""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mflow_kernels.data.files import sync, write_atomically
from mflow_kernels.runs.checkpoints import LAST, METRICS, PREVIOUS, Checkpoint


class _Sink:
    """A file for torch.save that never raises; `error` holds the first error instead.

    An exception inside torch's C++ writer could end the process.
    """

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
        """Do nothing: closing the file flushes it."""


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin that writes a checkpoint atomically and keeps the one before it."""

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
    """Write `last.ckpt` at intervals, before each validation, at the end, and on SIGTERM or SIGINT.

    After SIGTERM or SIGINT the current step ends, a checkpoint is written and the process exits. A
    third SIGINT exits at once without a checkpoint, unless one is being written.

    Args:
        folder: the run folder.
        minutes: longest time between two checkpoints.
        steps: largest number of steps between two checkpoints; None sets no limit.
        resumed: the checkpoint that training resumes from.
    """

    def __init__(
        self, folder: Path, minutes: float, steps: int | None, resumed: Checkpoint | None = None
    ) -> None:
        self._path, self._metrics = folder / LAST, folder / METRICS
        self._minutes = minutes
        self._steps = steps or sys.maxsize
        self._resumed = resumed
        self._written, self._written_step = time.monotonic(), 0
        self._signal: int | None = None
        self._interrupts = 0
        self._writing = False
        self._handlers: dict[int, Any] = {}  # signal handlers to restore after training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All ranks have read the checkpoint that training resumes from: rename it to last.ckpt. The
        # next one then replaces a last.ckpt that was refused, and not the only good checkpoint.
        if self._resumed is not None and trainer.is_global_zero:
            os.replace(self._resumed.path, self._path)
        self._written, self._written_step = time.monotonic(), trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGTERM, signal.SIGINT)
            }

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 2 and not self._writing:
            self._leave()

    # This hook runs between two steps, when metrics.csv has all values of the previous step.
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        passed = time.monotonic() - self._written > 60 * self._minutes
        leaves = self._signal is not None
        if trainer.world_size > 1:  # all ranks save and exit at the same steps
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
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._signal:
            self._leave()

    def _write(self, trainer: Trainer) -> None:
        if trainer.global_step == self._written_step:
            return
        self._writing = True
        try:
            if self._metrics.exists():
                sync(self._metrics)  # a power cut may then only lose rows that are written again
            trainer.save_checkpoint(self._path)
        finally:
            self._writing = False
        self._written, self._written_step = time.monotonic(), trainer.global_step

    def _leave(self) -> None:
        raise SystemExit(128 + (self._signal or signal.SIGTERM))
