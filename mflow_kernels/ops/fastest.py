"""Choose between implementations of an operator by timing them, once for each card and shape.

The first candidate uses torch's own operators, and the others must agree with it. The choices are
saved in a small JSON file beside Triton's compiled kernels, so that only the first run on a card
measures.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mflow_kernels.ops.compiler import triton
from mflow_kernels.version import __version__

Choice = Literal["auto", "torch", "fused"]
Candidate = Callable[[], Sequence[Tensor]]
VARIABLE = "MFLOW_NETWORK"


def requested() -> Choice:
    """The value of $MFLOW_NETWORK, by default "auto".

    Raises:
        ValueError: another value than auto, torch or fused.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in ("auto", "torch", "fused"):
        raise ValueError(f"{VARIABLE}: expected auto, torch or fused, got {value!r}")
    return cast(Choice, value)


def fastest(key: str, candidates: Mapping[str, Candidate], device: torch.device) -> str:
    """The name of the candidate that took the least time on this card when they were compared.

    Args:
        key: identifies the computation by its shapes and dtype.
        candidates: functions that return their results, by name. They are called only if the file
            of choices has no entry. The first one computes by torch's own operators. A candidate
            that raises, or whose results differ from the first one's, is left out with a warning.
        device: a CUDA device. While it records a CUDA graph nothing can be timed, so the first
            candidate is used if no choice is known.
    """
    choices, first = _choices(), next(iter(candidates))
    key = f"{_card(device)}, {key}"
    if key in _no_memory:
        return first
    if choices.get(key) not in candidates:
        if torch.cuda.is_current_stream_capturing():
            return first
        try:
            with _undisturbed(device):
                agreeing = [name for name in candidates if _agrees(key, name, candidates, device)]
                times = {name: seconds(candidates[name]) for name in agreeing}
            choices[key] = min(times, key=lambda name: times[name])
        except torch.OutOfMemoryError:
            _no_memory.add(key)
            return first
        _save(choices)
    return choices[key]


# Computations that found no memory to compare candidates in. This process keeps to the first one,
# so that both runs of a network agree. The choice is not saved: the next process may have memory.
_no_memory: set[str] = set()


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Let candidates run and be timed on `device`, whatever state the caller is in.

    The caller may be in inference mode, where no gradient can be computed. It may also have hooks
    on saved tensors, as a chain has when it compares its networks' two runs.
    """
    with (
        torch.cuda.device(device),  # events record the current device's stream
        torch.inference_mode(False),
        saved_tensors_hooks(Tensor.detach, lambda saved: saved),
    ):
        yield


@cache  # every call of a network asks
def _card(device: torch.device) -> str:
    """The card and the versions of all software whose change may change the choice."""
    card = torch.cuda.get_device_name(device)
    software = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{card}, {software}, mflow_kernels {__version__}"


def _agrees(key: str, name: str, candidates: Mapping[str, Candidate], device: torch.device) -> bool:
    """Whether a candidate computes what the first one does, in memory that holds NaN.

    In new memory, which is often zero, a candidate that reads a result before it writes it would
    agree by chance.
    """
    first = next(iter(candidates))
    if name == first:
        return True
    try:
        candidates[name]()  # allocates the blocks that its next call uses
        _poison(device)
        found = max(map(_difference, candidates[name](), candidates[first]()))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    else:
        if found <= DISAGREEMENT:
            return True
        fault = f"its results differ from torch's by {found:.2g} of their size"
    warnings.warn(f"{key}: {name!r} is not used on this card. {fault}", stacklevel=3)
    return False


def _poison(device: torch.device) -> None:
    """Fill all free memory of torch's allocator with NaN."""
    free = [
        torch.empty(block["size"], dtype=torch.uint8, device=device).fill_(0xFF)
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
    del free


# A wrong result differs by about its own norm. Rounding to bfloat16 changes the sign of at most
# 2^-8 of the hidden units. Their errors are independent, so together they change a gradient by the
# square root of that share of its norm, 2^-4.
DISAGREEMENT = 0.1


def _difference(a: Tensor, b: Tensor) -> float:
    """The norm of a - b divided by the norm of b; infinite instead of NaN."""
    if a.shape != b.shape:
        return float("inf")
    size, error = (float(t.norm()) for t in (b.double(), a.double() - b.double()))
    return 0.0 if error == 0 else error / size if error < float("inf") and size else float("inf")


def seconds(function: Callable[[], object]) -> float:
    """The median time of a call on the GPU."""
    return cast(float, triton.testing.do_bench(function, return_mode="median")) / 1e3


def _file() -> Path:
    return Path(triton.knobs.cache.dir, "mflow_networks.json")


@cache
def _choices() -> dict[str, str]:
    """The choices of earlier runs; empty if the file is missing or malformed."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in known if isinstance(value, str)}


def _save(choices: dict[str, str]) -> None:
    """Write the choices. If the folder is not writable, the next run only has to measure again."""
    part = _file().with_suffix(f".{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        part.replace(_file())
    except OSError:
        with suppress(OSError):
            part.unlink()
