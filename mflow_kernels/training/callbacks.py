"""What a person sees of a run while it trains, and the metrics file."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from mflow_kernels.data.files import read_regular, write_atomically
from mflow_kernels.data.printable import printable
from mflow_kernels.training.module import FlowTraining

_SECONDS_BETWEEN_LINES = 15.0


class ProgressReport(Callback):
    """A progress bar on stderr; plain lines, one in a while, where stderr is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._speed = 0.0
        self._figures = ""
        self._held_out = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_line = time.monotonic()
        if not self._console.is_terminal:
            return
        # In a narrow terminal the figures go to a second line; nothing else gives way.
        self._progress = Progress(
            TextColumn("stage {task.fields[stage]}"),
            BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", table_column=Column()),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "", total=_training(pl_module).total_steps, stage="", figures=""
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training = _training(pl_module)
        step = trainer.global_step
        # To read them is to wait for the device: after a step that was logged, which has waited.
        if step % training.log_interval == 1 % training.log_interval:
            self._read(trainer.callback_metrics)
        if not self._figures:
            return
        stage = f"{training.trained_stage + 1}/{len(training.model.stages)}"
        figures = self._figures + self._held_out
        if self._progress is not None:
            self._progress.update(self._task, completed=step, stage=stage, figures=figures)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            total = training.total_steps
            self._console.print(
                f"stage {stage}  step {step}/{total}  {figures}", highlight=False, soft_wrap=True
            )

    def _read(self, metrics: Mapping[str, Any]) -> None:
        if "images_per_second" not in metrics:  # the module logs it after its first step
            return
        loss, bits, speed, skipped = (
            float(metrics[name])
            for name in ("loss", "bits_per_dim", "images_per_second", "skipped")
        )
        self._speed = 0.9 * self._speed + 0.1 * speed if self._speed else speed
        self._figures = f"loss {loss:.3f}  {bits:.3f} bits/dim  {self._speed:.0f} images/s"
        if skipped:
            self._figures += f"  {skipped:.0f} skipped"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bits = float(trainer.callback_metrics["heldout_bits_per_dim"])
        self._held_out = f"  held out {bits:.3f}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()
        if isinstance(exception, KeyboardInterrupt | SystemExit | OSError):
            folder = printable(trainer.default_root_dir)
            text = f"interrupted; mflow train --resume --run-dir {folder} goes on"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class MetricsCsv(Logger):
    """One CSV file with fixed columns, a row for each logged step, written at once.

    Lightning's own CSVLogger empties its folder when a run resumes.

    Args:
        path: the file. What figures the steps from `first_step` on have in it is dropped, and so
            are those of a validation after the step before: they are written again.
        first_step: the step at which this run starts or resumes.
    """

    columns = (
        "step",
        "stage",
        "loss",
        "bits_per_dim",
        "heldout_bits_per_dim",
        "on_manifold",
        "off_manifold",
        "logdet",
        "penalty",
        "drift",
        "gradient_norm",
        "skipped",
        "condition",
        "folded_condition",
        "learning_rate",
        "images_per_second",
    )

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self._path = path
        before = [row for row in _read_rows(path) if int(row["step"]) < first_step]
        repeated = str(first_step - 1)
        kept = [r for r in before if r["step"] != repeated or not r["heldout_bits_per_dim"]]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(kept)

        write_atomically(path, write)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: metrics[name] for name in self.columns if name in metrics}
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({**row, "step": step})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a MetricsCsv file, empty cells left out; none if there is no such file.

    Raises:
        ValueError: another kind of file, or rows that MetricsCsv does not write.
    """
    return [{name: float(cell) for name, cell in row.items() if cell} for row in _read_rows(path)]


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        text = read_regular(path).decode("ascii", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    lines = text.split("\n")
    torn = lines.pop()  # after the last line's end there is nothing, unless it was torn
    header = ",".join(MetricsCsv.columns)
    if not lines and header.startswith(torn.strip("\r\0")):
        return []
    if not lines or lines[0].rstrip("\r") != header:
        raise ValueError(
            f"{path}: expected the metrics of a run, with the columns {header[:30]}..., got "
            f"{(lines or [torn])[0][:30]!r}"
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip("\r").split(",")
        if len(cells) != len(MetricsCsv.columns) or not _are_figures(cells):
            raise ValueError(
                f"{path}, line {number}: expected a step and its figures, got {line[:60]!r}"
            )
        rows.append(dict(zip(MetricsCsv.columns, cells, strict=True)))
    return rows


def _are_figures(cells: list[str]) -> bool:
    try:
        for cell in filter(None, cells[1:]):
            float(cell)
    except ValueError:
        return False
    return cells[0].isascii() and cells[0].isdigit() and len(cells[0]) < 19


def _training(module: LightningModule) -> FlowTraining:
    assert isinstance(module, FlowTraining)
    return module
