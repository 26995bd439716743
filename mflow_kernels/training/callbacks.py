"""The progress bar of training, and the file of its metrics."""

import csv
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger

from mflow_kernels import ManifoldFlow
from mflow_kernels.data.files import read_regular, write_atomically
from mflow_kernels.data.progress import ProgressCallback, progress_bar
from mflow_kernels.training.module import FlowTraining
from mflow_kernels.version import __version__


class TrainingProgress(Callback):
    """Shows the progress of training with the stage and the last logged metrics."""

    def __init__(self) -> None:
        self._bar = ExitStack()
        self._show: ProgressCallback | None = None
        self._speed = 0.0
        self._metrics: dict[str, str] = {}
        self._held_out: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = _training(pl_module).schedule.total_steps
        bar = progress_bar("training", total, trainer.global_step, unit="steps")
        self._show = self._bar.enter_context(bar)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training = _training(pl_module)
        step = trainer.global_step
        # A step logs its metrics after this hook.
        if step % training.log_interval == 1 % training.log_interval:
            self._read(training.logged, training)
        self._update(trainer, training, "")

    def _update(self, trainer: Trainer, training: FlowTraining, doing: str) -> None:
        if self._show is None:
            return
        stage = f"{training.trained_stage + 1} of {len(training.model.stages)}{doing}"
        self._show(trainer.global_step, {"stage": stage, **self._metrics, **self._held_out})

    def _read(self, metrics: Mapping[str, float], training: FlowTraining) -> None:
        if "images_per_second" not in metrics:  # logged after the first step
            return
        values = {name: metrics[name] for name in _SHOWN if name in metrics}
        speed = values["images_per_second"]
        self._speed = 0.9 * self._speed + 0.1 * speed if self._speed else speed
        values["images_per_second"] = self._speed
        objective = cast(ManifoldFlow, training.model.stages[training.trained_stage]).objective
        if isinstance(objective.weight, float):  # not logged
            values["penalty_weight"] = objective.weight
        if not values["skipped"]:
            del values["skipped"]
        shown = {name: form for name, form in _SHOWN.items() if name in values}
        self._metrics = {label: format(values[n], form) for n, (label, form) in shown.items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(trainer, _training(pl_module), ", validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bits = float(trainer.callback_metrics["heldout_bits_per_dim"])
        self._held_out = {"held-out bits/dim": f"{bits:.3f}"}
        self._update(trainer, _training(pl_module), "")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._bar.close()


# Label and format of the metrics that the progress shows.
_SHOWN = {
    "bits_per_dim": ("bits/dim", ".3f"),
    "penalty_bits_per_dim": ("penalty (bits/dim)", ".3f"),
    "penalty_weight": ("weight", ".4g"),
    "skipped": ("skipped steps", ".0f"),
    "images_per_second": ("images/s", ",.0f"),
}


class MetricsCsv(Logger):
    """A CSV file with fixed columns, to which each logged step appends a row immediately.

    `stage` counts from 0. FlowTraining describes the units of the bits per dimension.

    Lightning's CSVLogger cannot be used, because it empties its folder when a run resumes.

    Args:
        path: the file. Rows that the run will write again are removed from it.
        first_step: the step at which this run starts or resumes.
        validates: whether the run starts with the validation that follows the previous step.
    """

    columns = (
        "step",
        "stage",
        "loss_bits_per_dim",
        "bits_per_dim",
        "heldout_bits_per_dim",
        "on_manifold_bits_per_dim",
        "off_manifold_bits_per_dim",
        "logdet_bits_per_dim",
        "penalty_bits_per_dim",
        "drift",
        "gradient_norm",
        "skipped",
        "condition",
        "folded_condition",
        "learning_rate",
        "images_per_second",
        "penalty_weight",
    )

    def __init__(self, path: Path, first_step: int = 0, validates: bool = False) -> None:
        super().__init__()
        self._path = path
        before = [row for row in _read_rows(path) if int(row["step"]) < first_step]
        repeated = str(first_step - 1) if validates else ""
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
    first, *lines = text.split("\n")
    header = ",".join(MetricsCsv.columns)
    if not lines and header.startswith(first.strip("\r\0")):
        return []
    if not lines or first.rstrip("\r") != header:
        raise ValueError(
            f"{path}: expected the metrics of a run of mflow_kernels {__version__}, with the "
            f"columns {header[:30]}..., got {first[:30]!r}"
        )
    rows = []
    for number, line in enumerate(lines[:-1], start=2):  # the last one is empty, or was cut off
        cells = line.rstrip("\r").split(",")
        if len(cells) != len(MetricsCsv.columns) or not _are_numbers(cells):
            raise ValueError(
                f"{path}, line {number}: expected a step and its metrics, got {line[:60]!r}"
            )
        rows.append(dict(zip(MetricsCsv.columns, cells, strict=True)))
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
