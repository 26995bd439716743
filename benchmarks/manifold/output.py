"""The store of finished runs, Markdown tables, and pictures."""

import datetime
import hashlib
import io
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness.output import commit, markdown_table, save_text
from mflow_kernels.data.files import write_atomically
from mflow_kernels.runs.folder import Run

Row = dict[str, Any]
DPI, COLOURS = 100, 256


class Store:
    """Rows of finished runs, one JSON file each, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def row(self, key: str, make: Callable[[], Row]) -> Row:
        """Return the row of this key, and make and save it first if there is none."""
        if not self.has(key):
            made = {"commit": commit(), "date": datetime.date.today().isoformat()}
            made["torch"] = torch.__version__
            made["cpu"] = f"{os.cpu_count()} CPU cores ({platform.machine()})"
            row = make() | {"made": made}
            save_text(self._path(key), json.dumps(row) + "\n")
            score = {k: v for k, v in row.items() if isinstance(v, int | float)}
            print(key, {k: round(v, 4) for k, v in score.items()}, flush=True)
        return self.read(key)

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def has_any(self, prefix: str) -> bool:
        return any(self.folder.glob(f"{prefix}*.json"))

    def read(self, key: str) -> Row:
        return json.loads(self._path(key).read_text())

    def rows(self, prefix: str) -> list[Row]:
        """Return the rows whose keys begin with `prefix`, by seed, in the order they were made."""
        paths = sorted(self.folder.glob(f"{prefix}*.json"), key=lambda path: path.stat().st_mtime)
        rows = [json.loads(path.read_text()) for path in paths]
        return sorted(rows, key=lambda row: row["seed"])

    def _path(self, key: str) -> Path:
        return self.folder / (re.sub(r"[^\w.-]+", "_", key) + ".json")


def run_key(run: Run) -> str:
    """Return 12 digits of the SHA-256 of a run's options and weights, for the keys of its rows.

    The folder's name would not do: another run may get the name, and the same run may be trained
    further.
    """
    digest = hashlib.sha256(run.config.to_yaml().encode())
    for name, tensor in run.model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG of few colours, which is several times smaller."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    # The default method would merge the colours of small markers.
    image = Image.open(buffer).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    write_atomically(path, lambda temporary: image.save(temporary, format="png", optimize=True))


def fill_in(document: Path, folder: Path) -> None:
    """Replace the marked parts of a Markdown file by the tables of a folder, and copy pictures.

    A part NAME lies between the lines <!-- begin NAME --> and <!-- end NAME --> and takes the text
    of NAME.md. Pictures that the document shows are copied from the folder.
    """

    def table(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.md"
        return match[1] + path.read_text() + match[3] if path.exists() else match[0]

    marked = r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)"
    text = re.sub(marked, table, document.read_text(), flags=re.DOTALL)
    save_text(document, text)
    for picture in re.findall(r"\(pictures/([\w-]+\.png)\)", text):
        if (folder / picture).exists():
            target = document.parent / "pictures" / picture
            target.parent.mkdir(exist_ok=True)
            write_atomically(target, lambda t, p=picture: t.write_bytes((folder / p).read_bytes()))


def mean_and_deviation(rows: Sequence[Row], name: str, form: str) -> str:
    """Format mean ± standard deviation of a metric over rows (seeds).

    The result is a dash if there are no rows, or if a value is None.
    """
    values = [row.get(name) for row in rows]
    if not values or any(value is None for value in values):
        return "-"
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = format(statistics.fmean(values), form)
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form)}"


def markdown(
    rows: Sequence[Row], keys: Mapping[str, str], metrics: Mapping[str, tuple[str, str]]
) -> str:
    """Format a Markdown table with one line per combination of keys, in order of appearance.

    Rows with the column "failed" are left out of the means, and the line says how many they are.

    Args:
        rows: one row per run, of all seeds.
        keys: names of the columns that identify a line, with their headings.
        metrics: names of the averaged columns, with their headings and number formats.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    heads = [*keys.values(), *(heading for heading, _ in metrics.values())]
    lines = []
    for values, group in groups.items():
        made = [row for row in group if "failed" not in row]
        cells = [mean_and_deviation(made, name, form) for name, (_, form) in metrics.items()]
        failed = len(group) - len(made)
        note = f" ({failed} of {len(group)} failed)" if failed else ""
        lines.append([f"{values[0]}{note}", *values[1:], *cells])
    return markdown_table(heads, lines, texts=len(keys))
