"""Parsers of commands, text tables, and files that are never half written."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mflow_kernels.data.files import write_atomically


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


def save_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_json(path: Path, content: object) -> None:
    save_text(path, json.dumps(content, indent=1) + "\n")
