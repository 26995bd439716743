"""Choose between two implementations of an operator by timing both, once for each card and shape.

The choices are kept in a small JSON file beside Triton's compiled kernels, so that only the first
run on a card measures.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

import torch

from mflow_kernels.ops.compiler import triton

Choice = Literal["auto", "torch", "fused"]
VARIABLE = "MFLOW_NETWORK"


def requested() -> Choice:
    """What $MFLOW_NETWORK asks for; "auto" where it is not set.

    Raises:
        ValueError: another value than auto, torch or fused.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in ("auto", "torch", "fused"):
        raise ValueError(f"{VARIABLE}: expected auto, torch or fused, got {value!r}")
    return cast(Choice, value)


def fused_is_faster(
    key: str, fused: Callable[[], object], by_torch: Callable[[], object], device: torch.device
) -> bool:
    """Whether `fused` took less time than `by_torch` on this card when they were first compared.

    Args:
        key: names what is computed: shapes, dtype and direction.
        fused, by_torch: compute it; called only where the file of choices has no entry.
        device: a CUDA device. While it records a CUDA graph nothing can be timed: an unknown
            choice is then torch's.
    """
    choices = _choices()
    key = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {key}"
    if key not in choices:
        if torch.cuda.is_current_stream_capturing():
            return False
        try:
            choices[key] = seconds(fused) < seconds(by_torch)
        except torch.OutOfMemoryError:  # for this process, which must not change its mind
            choices[key] = False
        else:
            _save(choices)
    return choices[key]


def seconds(function: Callable[[], object]) -> float:
    """The median time of a call on the GPU."""
    return cast(float, triton.testing.do_bench(function, return_mode="median")) / 1e3


def _file() -> Path:
    return Path(triton.knobs.cache.dir, "mflow_networks.json")


@lru_cache(maxsize=1)
def _choices() -> dict[str, bool]:
    """Those of earlier runs; none where the file is missing or is no such file."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in known if isinstance(value, bool)}


def _save(choices: dict[str, bool]) -> None:
    """A cache: a folder that cannot be written costs the next run a measurement, and no more."""
    part = _file().with_suffix(f".{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        part.replace(_file())
    except OSError:
        with suppress(OSError):
            part.unlink()
