"""Progress of long work, on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 15.0

ProgressCallback = Callable[[int], None]


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[ProgressCallback]:
    """Show a progress bar. If stderr is not a terminal, print a line every 15 seconds instead.

    Args:
        what: the work, for example "preparing".
        total: number of images.
        done: number of images that an earlier process has finished.

    Yields:
        A function to call with the number of images finished so far.
    """
    console = Console(stderr=True)
    started = last = time.monotonic()
    first = done

    def rate(count: int) -> str:
        return f"{(count - first) / max(1e-9, time.monotonic() - started):,.0f} images/s"

    if not console.is_terminal:

        def print_line(count: int) -> None:
            nonlocal last
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                line = f"{what}: {count:,} of {total:,} images, {rate(count)}"
                console.print(line, highlight=False, soft_wrap=True)

        yield print_line
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="")
        yield lambda count: bar.update(task, completed=count, rate=rate(count))
