"""Small JSON files of what was found on a card, beside Triton's compiled kernels."""

import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mflow_kernels.ops.compiler import triton
from mflow_kernels.version import __version__


@cache  # every call of a network asks
def card_of_results(device: torch.device) -> str:
    """The card and the versions of all software whose change may change a result on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    software = f"torch {torch.__version__}, triton {triton.__version__}, driver {driver}"
    return f"{name}, {software}, mflow_kernels {__version__}"


def path_of(name: str) -> Path:
    return Path(triton.knobs.cache.dir, name)


def read(path: Path) -> dict[str, str]:
    """What earlier runs found; empty if the file is missing or malformed."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in known if isinstance(value, str)}


def write(path: Path, found: dict[str, str]) -> None:
    """Replace the file. If the folder is not writable, the next run only has to find it again."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()


TILE = 64


def tile_error(a: Tensor, b: Tensor) -> float:
    """The largest error of a in any tile of `TILE` consecutive elements, over the size of b.

    Errors and sizes are root mean squares. A norm of all elements would hide one wrong tile of a
    thousand. The result is infinite instead of NaN.
    """
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    squares = (a - b).square().flatten()
    if not squares.numel():
        return 0.0
    padded = torch.nn.functional.pad(squares, (0, -len(squares) % TILE)).view(-1, TILE)
    counts = torch.full((len(padded),), TILE, dtype=torch.float64, device=a.device)
    counts[-1] -= -len(squares) % TILE
    error = float((padded.sum(1) / counts).max().sqrt())
    size = float(b.square().mean().sqrt())
    return 0.0 if error == 0 else error / size if error < float("inf") and size else float("inf")
