"""What runs in place of an operator's kernels on a card where they fail.

`falls_back` decorates the computations of an operator. Before its kernels run on a card for the
first time, `agreement` compares them with the reference. An operator that disagrees is computed by
its reference there, and so is a call whose launch fails. Each is said once, in a warning.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mflow_kernels.ops.card_files import card_of_results
from mflow_kernels.ops.compiler import KERNELS, TRITON_INSTALLED
from mflow_kernels.ops.launch import (
    KERNELS_ON_CPU,
    LaunchError,
    is_guarded,
    is_walked,
    use_kernels,
    uses_triton,
)

Computation = TypeVar("Computation", bound=Callable[..., Any])

# Without kernels, a computation is left as it is and costs no further call.
HAS_KERNELS = (
    TRITON_INSTALLED and KERNELS == "auto" and (torch.backends.cuda.is_built() or KERNELS_ON_CPU)
)

REPORT = "`python -m mflow_kernels.env --check` reports what runs here"

# Empty results of each operator, by its name. A reference's are fitted to their shapes: a launch
# that fails would have stored more partial sums.
FAKES: dict[str, Callable[..., Any]] = {}

_failed: set[object] = set()  # calls whose launch failed, by `_kind`
_warned: set[tuple[str, torch.device, str]] = set()
_raises = False


Fault = Callable[[str, torch.device], str]
_fault: Fault = lambda operator, device: ""  # noqa: E731  `find_faults_by` replaces it


def find_faults_by(fault: Fault) -> None:
    """Set the function that says why an operator's kernels are not used on a card.

    `agreement` calls this, because it imports the operators, and they import this module.
    """
    global _fault
    _fault = fault


@contextmanager
def raising() -> Iterator[None]:
    """Within this context nothing falls back: a launch that fails raises."""
    global _raises
    before, _raises = _raises, True
    try:
        yield
    finally:
        _raises = before


def falls_back(name: str) -> Callable[[Computation], Computation]:
    """Decorate the computation mflow::name, whose first argument is a tensor or a tuple of them."""

    def decorate(compute: Computation) -> Computation:
        if not HAS_KERNELS:
            return compute

        @wraps(compute)
        def run(*arguments: Any, **named: Any) -> Any:
            first = arguments[0] if arguments else next(iter(named.values()))
            first = first[0] if isinstance(first, tuple) else first
            device = first.device
            if _raises or not is_guarded(device) or isinstance(first, FakeTensor) or is_walked():
                return compute(*arguments, **named)
            if not uses_triton(first):
                return compute(*arguments, **named)
            return _attempt(name, compute, device, arguments, named)

        return run  # type: ignore[return-value]

    return decorate


def _attempt(
    name: str,
    compute: Callable[..., Any],
    device: torch.device,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> Any:
    operator = name.removesuffix("_backward")
    found = _fault(operator, device)
    if found:
        _warn(operator, device, f"is not used: {found}")
    elif not _failed or _kind(name, device, arguments, named) not in _failed:
        try:
            return compute(*arguments, **named)
        except LaunchError as error:
            _failed.add(_kind(name, device, arguments, named))
            first_line = str(error).splitlines()[0]
            _warn(operator, device, f"cannot run on a state of this size: {first_line}")
    promise = FAKES.get(name)
    promised = None if promise is None else promise(*arguments, **named)
    with use_kernels("torch"):
        results = compute(*arguments, **named)
    return results if promised is None else _fitted(results, promised)


def _kind(
    name: str, device: torch.device, arguments: tuple[Any, ...], named: dict[str, Any]
) -> object:
    """What decides whether Triton can compile and start a call's kernels, except for the size of
    the batch."""
    given = torch.utils._pytree.tree_leaves((arguments, named))
    return (
        name,
        device,
        *(
            (value.dtype, value.shape[1:]) if isinstance(value, Tensor) else value
            for value in given
        ),
    )


def _warn(operator: str, device: torch.device, problem: str) -> None:
    if (operator, device, problem) in _warned:
        return
    _warned.add((operator, device, problem))
    warnings.warn(
        f"{operator}: the kernel {problem}. Plain torch computes it ({card_of_results(device)}). "
        f"{REPORT}",
        stacklevel=4,
    )


def _fitted(found: Any, promised: Any) -> Any:
    """The results in the promised shapes, filled up with zeros."""
    if isinstance(promised, tuple):
        return tuple(map(_fitted, found, promised))
    if found.shape == promised.shape:
        return found
    promised.zero_()[tuple(map(slice, found.shape))] = found
    return promised
