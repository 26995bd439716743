"""The progress bar of training, and the file of its metrics."""

import csv
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger

from mflow_kernels.data.files import read_regular, write_atomically
from mflow_kernels.data.printable import printable
from mflow_kernels.data.progress import ProgressCallback, progress_bar
from mflow_kernels.training.module import FlowTraining


class TrainingProgress(Callback):
    """Shows a progress bar with the stage and the last logged metrics."""

    def __init__(self) -> None:
        self._bar = ExitStack()
        self._show: ProgressCallback | None = None
        self._speed = 0.0
        self._metrics = ""
        self._held_out = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = _training(pl_module).total_steps
        bar = progress_bar("training", total, trainer.global_step, unit="steps")
        self._show = self._bar.enter_context(bar)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training = _training(pl_module)
        step = trainer.global_step
        # Reading metrics waits for the device. The logged step before this one has waited already.
        if step % training.log_interval == 1 % training.log_interval:
            self._read(trainer.callback_metrics)
        if self._metrics and self._show is not None:
            stage = f"stage {training.trained_stage + 1}/{len(training.model.stages)}"
            self._show(step, f"{stage}  {self._metrics}{self._held_out}")

    def _read(self, metrics: Mapping[str, Any]) -> None:
        if "images_per_second" not in metrics:  # logged after the first step
            return
        loss, bits, speed, skipped = (
            float(metrics[name])
            for name in ("loss", "bits_per_dim", "images_per_second", "skipped")
        )
        self._speed = 0.9 * self._speed + 0.1 * speed if self._speed else speed
        self._metrics = f"loss {loss:.3f}  {bits:.3f} bits/dim  {self._speed:.0f} images/s"
        if skipped:
            self._metrics += f"  {skipped:.0f} skipped"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bits = float(trainer.callback_metrics["heldout_bits_per_dim"])
        self._held_out = f"  held out {bits:.3f}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._bar.close()
        if isinstance(exception, KeyboardInterrupt | SystemExit | OSError):
            folder = printable(trainer.default_root_dir)
            print(
                f"interrupted; mflow train --resume --run-dir {folder} continues the run",
                file=sys.stderr,
            )


class MetricsCsv(Logger):
    """A CSV file with fixed columns, to which each logged step appends a row immediately.

    Lightning's CSVLogger cannot be used, because it empties its folder when a run resumes.

    Args:
        path: the file. Rows that the run will write again are removed from it: those from
            `first_step` on, and the validation after the step before.
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
        "penalty_weight",
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
        """Do nothing: config.yaml holds them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: metrics[name] for name in self.columns if name in metrics}
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({**row, "step": step})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a MetricsCsv file without their empty cells; no rows if there is no file.

    Raises:
        ValueError: the file is of another kind, or holds rows that MetricsCsv does not write.
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
    torn = lines.pop()  # empty, unless the last line was cut off
    header = ",".join(MetricsCsv.columns)
    if not lines and header.startswith(torn.strip("\r\0")):
        return []
    # Earlier versions wrote fewer columns.
    columns = lines[0].rstrip("\r").split(",") if lines else []
    if columns[:1] != ["step"] or not set(columns) <= set(MetricsCsv.columns):
        raise ValueError(
            f"{path}: expected the metrics of a run, with the columns {header[:30]}..., got "
            f"{(lines or [torn])[0][:30]!r}"
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip("\r").split(",")
        if len(cells) != len(columns) or not _are_numbers(cells):
            raise ValueError(
                f"{path}, line {number}: expected a step and its metrics, got {line[:60]!r}"
            )
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def _are_numbers(cells: list[str]) -> bool:
    try:
        for cell in filter(None, cells[1:]):
            float(cell)
    except ValueError:
        return False
    return cells[0].isascii() and cells[0].isdigit() and len(cells[0]) < 19


def _training(module: LightningModule) -> FlowTraining:
    assert isinstance(module, FlowTraining)
    return module
