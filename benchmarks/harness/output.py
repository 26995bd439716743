"""Parsers of commands, tables, files that are never half written, and the commit that made them."""

import argparse
import json
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflow_kernels.data.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def command_parser(module: str, documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m module`, whose help shows the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def text_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a table with aligned columns; columns of numbers are right-aligned."""
    cells = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    numeric = [
        all(row[i][:1].isdigit() or row[i] in ("", "-") for row in cells) for i in range(len(head))
    ]

    def line(row: Sequence[str]) -> str:
        places = zip(row, widths, numeric, strict=True)
        return "  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in places).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, cells)])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1) -> str:
    """Format a Markdown table. The columns after the first `texts` ones are right-aligned."""
    first, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    rule = "|" + "---|" * texts + "---:|" * (len(head) - texts)
    return "\n".join([first, rule, *lines])


@cache
def commit() -> str:
    """Return the short hash of the checkout's commit, with "-dirty" if tracked files differ."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def save_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_figure(path: Path, figure: "Figure", **how: Any) -> None:
    """Write a PNG; `how` are options of `Figure.savefig`."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", **how))


def save_json(path: Path, content: object) -> None:
    save_text(path, json.dumps(content, indent=1) + "\n")
