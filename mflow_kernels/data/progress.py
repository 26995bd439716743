"""A progress bar on stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_SECONDS_BETWEEN_LINES = 15.0


class ProgressCallback(Protocol):
    """Is called with the number of items done so far, and a note to show in place of the speed."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def progress_bar(
    what: str, total: int, done: int = 0, unit: str = "images"
) -> Iterator[ProgressCallback]:
    """Show a progress bar. If stderr is not a terminal, print a line every 15 seconds instead.

    Args:
        what: the work, for example "preparing".
        total: number of items.
        done: number of items that an earlier process has finished.
        unit: what the items are.

    Yields:
        A function to call with the number of items finished so far.
    """
    console = Console(stderr=True)
    started = last_line = time.monotonic()
    first = done

    def speed(count: int) -> str:
        return f"{(count - first) / max(1e-9, time.monotonic() - started):,.0f} {unit}/s"

    if not console.is_terminal:

        def print_line(done: int, note: str = "") -> None:
            nonlocal last_line
            if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                line = f"{what}: {done:,} of {total:,} {unit}, {note or speed(done)}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield print_line
        return
    # In a narrow terminal the note wraps to a second line and the other columns keep their width.
    with Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
    ) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def update(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note or speed(done))

        yield update
