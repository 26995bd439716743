"""Read saved benchmark runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any


@dataclass
class Row:
    """One variant of one group, from pytest-benchmark's JSON."""

    name: str  # pytest's node id
    group: str
    rounds: list[float]  # seconds
    extra: dict[str, Any]

    @property
    def kind(self) -> str:
        """The bench file it comes from, one of the KINDS of `benchmarks.report`."""
        return Path(self.name.split("::")[0]).stem.removeprefix("bench_")

    @property
    def variant(self) -> str:
        return str(self.extra["variant"])

    @property
    def median(self) -> float:
        return median(self.rounds)


@dataclass
class Runs:
    rows: list[Row]
    not_measured: list[dict[str, str]]  # name, outcome (skipped or failed), reason
    commands: list[dict[str, str]]  # command and datetime of each run

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The distinct machines and versions in the rows."""
        keys = ("device", "threads", "clock", "torch", "triton", "mflow_kernels", "commit")
        found = [{key: row.extra.get(key) for key in keys} for row in self.rows]
        return [e for i, e in enumerate(found) if e not in found[:i]]


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """Merge several files into one content of pytest-benchmark's format.

    Raises:
        ValueError: a file is missing or has another format.
    """
    whole: dict[str, Any] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
            benchmarks, not_measured = content["benchmarks"], content.get("not_measured", [])
            commands = content.get("commands", [])
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected the JSON of pytest --benchmark-json ({error!r})"
            ) from None
        if not whole:
            whole = {**content, "benchmarks": [], "not_measured": [], "commands": []}
        shared = content.get("shared", {})
        for row in benchmarks:
            row["extra_info"] = {**shared, **row["extra_info"]}
        whole["benchmarks"] += benchmarks
        whole["not_measured"] += not_measured
        whole["commands"] += commands
    return whole


def kept(content: dict[str, Any]) -> str:
    """Return the file that the repository keeps of a run, as JSON with one line for each row.

    It has rounds to four digits, and what all rows share once. It lacks the name of the machine.
    """
    rows = content["benchmarks"]
    shared = {
        key: value
        for key, value in rows[0]["extra_info"].items()
        if all(row["extra_info"].get(key) == value for row in rows)
    }
    short = [
        {
            "fullname": row["fullname"],
            "group": row["group"],
            "stats": {"data": [float(f"{t:.4g}") for t in row["stats"]["data"]]},
            "extra_info": {k: v for k, v in row["extra_info"].items() if k not in shared},
        }
        for row in rows
    ]
    others = {key: content[key] for key in ("commands", "not_measured")}
    parts = [f'"shared": {json.dumps(shared)}']
    for key, each in {**others, "benchmarks": short}.items():
        lines = ",\n".join(json.dumps(one) for one in each)
        parts.append(f'"{key}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def runs(content: dict[str, Any]) -> Runs:
    rows = [
        Row(b["fullname"], b["group"], b["stats"]["data"], b["extra_info"])
        for b in content["benchmarks"]
        if "variant" in b["extra_info"]
    ]
    return Runs(rows, content["not_measured"], content["commands"])


def format_time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartiles."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def ratio(row: Row, base: Row) -> tuple[float, float, float]:
    """Return median and quartiles of row / base, round by round; their rounds were interleaved."""
    each = [a / b for a, b in zip(row.rounds, base.rounds, strict=False)]
    return median(each), *spread(each)
