"""Rows of a benchmark run, as pytest-benchmark saves them."""

import json
from pathlib import Path
from typing import Any


def row(variant: str, seconds: list[float], group: str = "a group", **extra: Any) -> dict[str, Any]:
    extra_info = {
        "variant": variant, "device": "CPU, some", "threads": 1, "clock": "wall time",
        "torch": "2", "triton": "3", "mflow_kernels": "0", "commit": "abc",
        "copy_bytes_per_second": 1e10, **extra,
    }  # fmt: skip
    name = f"benchmarks/bench_models.py::test_model[{group}-{variant}]"
    return {"fullname": name, "group": group, "stats": {"data": seconds}, "extra_info": extra_info}


def saved(path: Path, *rows: dict[str, Any], missing: tuple[dict[str, str], ...] = ()) -> Path:
    commands = [{"command": "pytest benchmarks/", "datetime": "2026-12-07T01:02:03"}]
    content = {"benchmarks": rows, "not_measured": missing, "commands": commands}
    path.write_text(json.dumps(content))
    return path
