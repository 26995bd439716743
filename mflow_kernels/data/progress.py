"""The progress of a command on stderr."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 15.0
_NO_VALUES: Mapping[str, str] = MappingProxyType({})


class ProgressCallback(Protocol):
    """Takes the number of items done so far, and values to show instead of the speed."""

    def __call__(self, done: int, values: Mapping[str, str] = _NO_VALUES) -> None: ...


@contextmanager
def progress_bar(
    what: str, total: int, done: int = 0, unit: str = "images"
) -> Iterator[ProgressCallback]:
    """Show a progress bar, the time left and values below it, which change in place.

    If stderr is not a terminal, print a line every 15 seconds instead.

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

    def speed(count: int) -> dict[str, str]:
        rate = (count - first) / max(1e-9, time.monotonic() - started)
        return {f"{unit}/s": f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"}

    if not console.is_terminal:

        def print_line(done: int, values: Mapping[str, str] = _NO_VALUES) -> None:
            nonlocal last_line
            if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                shown = ", ".join(
                    f"{name} {value}" for name, value in (values or speed(done)).items()
                )
                line = f"{what}: {done:,} of {total:,} {unit}, {shown}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield print_line
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        expand=True,
    )
    task = bar.add_task(what, total=total, completed=done)
    with Live(bar, console=console, refresh_per_second=4) as live:

        def update(done: int, values: Mapping[str, str] = _NO_VALUES) -> None:
            bar.update(task, completed=done)
            # In a narrow terminal the values take more lines.
            items = (values or speed(done)).items()
            texts = [Text.assemble((name, "dim"), " ", value) for name, value in items]
            live.update(Group(bar, Columns(texts, padding=(0, 3))))

        yield update
