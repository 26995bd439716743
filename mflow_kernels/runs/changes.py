"""The options that change when a run resumes."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from mflow_kernels.data.files import read_regular, write_atomically
from mflow_kernels.runs.config import RunConfig
from mflow_kernels.runs.folder import CONFIG
from mflow_kernels.runs.parser import as_option

CHANGES = "changes.csv"
# Options that may change when a run resumes. Those up to `max_condition` set how it trains from the
# next step on. The others are about the machine, memory, safety limits and checkpoints.
CHANGEABLE_OPTIONS = (
    "learning_rate",
    "stage_learning_rate",
    "schedule",
    "epochs",
    "stage_epochs",
    "max_steps",
    "stage_max_steps",
    "batch_size",
    "max_condition",
    "device",
    "reversible",
    "checkpoint_every",
    "max_drift",
    "save_minutes",
    "save_steps",
    "max_skipped",
    "compile",
    "cuda_graphs",
    "accumulate",
)


class Change(NamedTuple):
    """An option that changes when a run resumes."""

    option: str
    before: object
    after: object

    def __str__(self) -> str:
        values = (yaml.safe_dump(v, default_flow_style=True) for v in (self.before, self.after))
        before, after = (text.removesuffix("...\n").strip() for text in values)
        return f"{as_option(self.option)} {before} -> {after}"


def changed_options(asked: RunConfig, recorded: RunConfig) -> list[Change]:
    """Return the options whose values differ from the recorded ones.

    Raises:
        ValueError: one of them may not change on resume. The message lists those that may.
    """
    changes = []
    wanted, had = asked.values(), recorded.values()
    for name, want in wanted.items():
        if want == (have := had.get(name)):
            continue
        if re.sub(r"^stages\[\d+\].", "stage_", name) not in CHANGEABLE_OPTIONS:
            raise ValueError(
                f"{name}: cannot change on resume (the run has {have}, got {want}); "
                f"{', '.join(map(as_option, CHANGEABLE_OPTIONS))} can; --init-from starts a new "
                "run from the weights of this one"
            )
        changes.append(Change(name, have, want))
    return changes


def record_changes(folder: Path, config: RunConfig, changes: Sequence[Change], step: int) -> None:
    """Replace the recorded options with those given on resume, and add the changes to CHANGES.

    A row of CHANGES has the first step with the new value, the option, and its values before and
    after.
    """
    if not changes:
        return
    path = folder / CHANGES
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if path.exists():
        text.write(read_regular(path).decode(errors="replace"))
    else:
        writer.writerow(["step", "option", "before", "after"])
    writer.writerows([step, *change] for change in changes)
    write_atomically(path, lambda path: path.write_text(text.getvalue(), newline=""))
    write_atomically(folder / CONFIG, lambda path: path.write_text(config.to_yaml()))
