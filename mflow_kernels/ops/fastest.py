"""Choose between implementations of an operator by timing them, once for each card and shape.

The first candidate uses torch's own operators, and the others must agree with it. The choices are
saved in a small JSON file beside Triton's compiled kernels, so that only the first run on a card
measures. `python -m mflow_kernels.env` prints them.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mflow_kernels.ops.card_files import card_of_results, path_of, read, tile_error, write
from mflow_kernels.ops.compiler import triton
from mflow_kernels.ops.fallback import raising

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

    All ranks of a run follow the one that comes first to a computation, so that they stay alike.

    Args:
        key: identifies the computation by its shapes and dtype.
        candidates: functions that return their results, by name. They are called only if the file
            of choices has no entry. The first one computes by torch's own operators. A candidate
            that raises, or whose results differ from the first one's, is left out with a warning.
        device: a CUDA device. While it records a CUDA graph nothing can be timed, so the first
            candidate is used, with a warning, if no choice is known.
    """
    first = next(iter(candidates))
    key = f"{card_of_results(device)}, {key}"
    shared = _world() > 1
    choice = _decided.get((key, shared))
    if choice is None:
        if torch.cuda.is_current_stream_capturing():
            _warn_once(key, "a CUDA graph is captured. Run the model once before the capture")
            return first
        own = partial(_choose, key, candidates, device)
        choice = _decided[key, shared] = _of_all_ranks(key, own) if shared else own()
        if choice == NO_MEMORY:
            _warn_once(key, "there is no memory to compare in. `retry` compares again")
    return choice if choice in candidates else first


NO_MEMORY = "no memory"

# The choices of this process, apart for the time when it is one of several ranks. A computation
# that found no memory to compare candidates in keeps to the first one, so that both runs of a
# network agree, until `retry`. That is not saved: the next process may have memory.
_decided: dict[tuple[str, bool], str] = {}
_retries = 0
_warned: set[tuple[str, str]] = set()


def retry() -> None:
    """Compare candidates again where there was no memory for it.

    Call this on all ranks where no backward pass is pending: both runs of a network must agree.
    """
    global _retries
    _retries += 1
    for made, choice in list(_decided.items()):
        if choice == NO_MEMORY:
            del _decided[made]


def _warn_once(key: str, reason: str) -> None:
    if (key, reason) not in _warned:
        _warned.add((key, reason))
        warnings.warn(f"{key}: torch's layers compute this network, because {reason}", stacklevel=3)


def _choose(key: str, candidates: Mapping[str, Candidate], device: torch.device) -> str:
    """The choice of an earlier run, or of a comparison now; NO_MEMORY if there is none for it."""
    known = read(_file()).get(key)
    if known is not None and known in candidates:
        return known
    try:
        with _undisturbed(device):
            agreeing = [name for name in candidates if _agrees(key, name, candidates, device)]
            times = {name: seconds(candidates[name]) for name in agreeing}
    except torch.OutOfMemoryError:
        return NO_MEMORY
    choice = min(times, key=lambda name: times[name])
    write(_file(), read(_file()) | {key: choice})
    return choice


def _world() -> int:
    """The number of ranks that train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _of_all_ranks(key: str, choose: Callable[[], str]) -> str:
    """The choice of the rank that comes first; the others wait for it.

    The ranks meet in torch's store and not in a collective, because a rank may come to a
    computation that the others never do.
    """
    store = torch.distributed.PrefixStore(
        f"mflow_networks/{_retries}", torch.distributed.distributed_c10d._get_default_store()
    )
    if store.add(f"{key}, ranks", 1) > 1:
        return store.get(key).decode()
    choice = NO_MEMORY
    try:
        choice = choose()
    finally:  # or the others would wait for a rank that failed
        store.set(key, choice)
    return choice


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Let candidates run and be timed on `device`, whatever state the caller is in.

    The caller may be in inference mode, where no gradient can be computed. It may also have hooks
    on saved tensors, as a chain has when it compares its networks' two runs.
    """
    with (
        torch.cuda.device(device),  # events record the current device's stream
        torch.inference_mode(False),
        raising(),
        saved_tensors_hooks(Tensor.detach, lambda saved: saved),
    ):
        yield


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
        found = max(map(tile_error, candidates[name](), candidates[first]()))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    else:
        if found <= DISAGREEMENT:
            return True
        fault = f"its results differ from torch's by {found:.2g} of their size in a tile"
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


# A wrong tile differs by about its own size. Rounding to bfloat16 changes the sign of at most 2^-8
# of the hidden units. Their errors are independent, so together they change a gradient by the
# square root of that share of its size, 2^-4; and the largest of many tiles by some times more.
DISAGREEMENT = 0.25


def seconds(function: Callable[[], object]) -> float:
    """The median time of a call on the GPU."""
    return cast(float, triton.testing.do_bench(function, return_mode="median")) / 1e3


def _file() -> Path:
    return path_of("mflow_networks.json")


def choices(device: torch.device, *, stored: bool = True) -> dict[str, str]:
    """The choices of this process and, if `stored`, of earlier runs on a card, by computation."""
    made = {key: choice for (key, _), choice in _decided.items()}
    prefix = f"{card_of_results(device)}, "
    found = (read(_file()) if stored else {}) | made
    return {k.removeprefix(prefix): v for k, v in sorted(found.items()) if k.startswith(prefix)}
