"""Text tables and JSON files."""

import json
import os
from collections.abc import Sequence
from pathlib import Path


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


def save_json(path: Path, content: object) -> None:
    """Write JSON to a temporary file beside `path` and rename it, so no file is half written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
