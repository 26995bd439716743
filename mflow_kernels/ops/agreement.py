"""Compare every operator's kernels with the operator's reference, on small cases, once for a card.

An operator is compared before its kernels run on a card for the first time. What was found is kept
in a file for the card, the driver and the versions of torch, Triton and this package. The
references run on the CPU in float64.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops.actnorm import actnorm
from mflow_kernels.ops.card_files import card_of_results, path_of, read, tile_error, write
from mflow_kernels.ops.conv1x1 import conv1x1
from mflow_kernels.ops.coupling import affine_coupling
from mflow_kernels.ops.coupling_conv1x1 import coupling_conv1x1
from mflow_kernels.ops.coupling_network import coupling_network
from mflow_kernels.ops.fallback import find_faults_by, raising
from mflow_kernels.ops.fastest import DISAGREEMENT
from mflow_kernels.ops.launch import capturing, use_kernels
from mflow_kernels.ops.logdet import accumulate_logdet
from mflow_kernels.ops.rational_quadratic import rational_quadratic
from mflow_kernels.ops.rebuild_conv1x1 import rebuild_conv1x1, rebuild_splits
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling
from mflow_kernels.ops.scale import ScaleFunction

# Rounding to float32 moves no tile by more than about 1e-4 of its size, and a wrong tile differs by
# about its own. The network computes in bfloat16.
FLOAT32_DISAGREEMENT = 1e-3
BINS, BOUND = 8, 3.0
BATCH = 2


class Case(NamedTuple):
    """A call of an operator.

    Attributes:
        name: the operator and, after a comma, what distinguishes its cases.
        shapes: of the tensors, which hold normal numbers. Those of weights, whose first size is not
            BATCH, are divided by the root of the number of elements of a row.
        call: takes the tensors and returns the results, with gradients if `differentiable`.
        dtype: of the tensors on the card.
        limit: the largest `tile_error` of a result or gradient that is accepted.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any]
    differentiable: bool = True
    dtype: torch.dtype = torch.float32
    limit: float = FLOAT32_DISAGREEMENT

    @property
    def operator(self) -> str:
        return self.name.split(",")[0]


def _rebuilt_coupling(z_b: Tensor, dz_b: Tensor, params: Tensor) -> tuple[Tensor, ...]:
    dlogdet = z_b[:, 0, 0, 0].contiguous()
    made = rebuild_coupling(z_b, dz_b, dlogdet, params, ScaleFunction("tanh"), False)
    return made.y_b, made.dy_b, made.dparams


def _rebuilt_conv1x1(y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    c = y.shape[1]
    weight = weight + torch.eye(c, dtype=weight.dtype, device=weight.device)
    halves = (y[:, : c // 2], y[:, c // 2 :]), (dy[:, : c // 2], dy[:, c // 2 :])
    splits = rebuild_splits(halves[0][1], c)
    sums = y.new_empty(splits, c, c), y.new_empty(splits, c)
    # Any matrix can stand for the inverse.
    made = rebuild_conv1x1(
        *halves, None, weight, weight.t().contiguous(), bias, None, False, False, *sums
    )
    return *made.x, *made.dx, made.outer_sum.sum(0), made.dbias.sum(0)


def _products(c: int) -> tuple[Case, ...]:
    """Cases whose kernels depend on the number of channels."""
    x, square, vector = (BATCH, c, 16, 16), (c, c), (c,)
    return (
        Case(f"conv1x1, {c} channels", (x, square, vector), conv1x1),
        Case(f"coupling_conv1x1, {c} channels", (x, x, square, vector), coupling_conv1x1),
        Case(f"rebuild_conv1x1, {c} channels", (x, x, square, vector), _rebuilt_conv1x1, False),
    )


def _network(c_in: int, width: int, side: int) -> Case:
    w1, w2, w3 = (width, c_in, 3, 3), (width, width, 1, 1), (2 * c_in, width, 3, 3)
    shapes = (BATCH, c_in, side, side), w1, (width,), w2, (width,), w3, (2 * c_in,)
    name = f"coupling_network, {c_in} channels and width {width}"
    return Case(name, shapes, coupling_network, True, torch.bfloat16, DISAGREEMENT)


_X = BATCH, 12, 16, 16
_HALF = BATCH, 6, 16, 16
CASES = (
    Case("actnorm", (_X, (12,), (12,)), actnorm),
    Case("affine_coupling", (_X, _X), affine_coupling),
    Case(
        "rational_quadratic",
        ((BATCH, 4, 16, 16), (BATCH, 4 * (3 * BINS - 1), 16, 16)),
        # Away from knots, at which gradients jump.
        lambda x, params: rational_quadratic(4 * x.tanh(), params, BINS, BOUND),
    ),
    Case("accumulate_logdet", ((5, 3000), ()), accumulate_logdet),
    Case("rebuild_coupling", (_HALF, _HALF, _X), _rebuilt_coupling, False),
    *_products(12),
    *_products(48),
    *_products(192),
    _network(6, 128, 16),
    _network(24, 512, 8),
)


OPERATORS = tuple(dict.fromkeys(case.operator for case in CASES))


def error_of(case: Case, device: torch.device) -> float:
    """The largest `tile_error` of a case's results and gradients on a device."""
    given = [_drawn(case, shape, i) for i, shape in enumerate(case.shapes)]
    # In tests a CPU stands for the card, and then its kernels must not compute the reference too.
    with use_kernels("torch") if device.type == "cpu" else nullcontext():
        expected = _results(case, [t.double() for t in given], torch.device("cpu"))
    on_card = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_card, raising():
        found = _results(case, given, device)
    return max(tile_error(a, b) for a, b in zip(found, expected, strict=True))


def _drawn(case: Case, shape: Sequence[int], seed: int) -> Tensor:
    """The same numbers in each process, on the CPU."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) > 1 and shape[0] != BATCH:
        drawn /= drawn[0].numel() ** 0.5
    if drawn.dim() == 4:  # as in models
        drawn = drawn.contiguous(memory_format=torch.channels_last)
    return drawn.to(case.dtype)  # so that the reference gets the rounded numbers


def _results(case: Case, given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The results and, if the case has them, gradients, on the CPU in float64."""
    inputs = [t.to(device).requires_grad_(case.differentiable) for t in given]
    called = case.call(*inputs)
    results = called if isinstance(called, tuple) else (called,)
    if case.differentiable:
        cotangents = [
            _drawn(case, y.shape, seed).to(y) for seed, y in enumerate(results, len(inputs))
        ]
        results += torch.autograd.grad(results, inputs, cotangents)
    return [t.detach().to("cpu", torch.float64) for t in results]


class Finding(NamedTuple):
    """The largest error of a case's tiles, or why it has none; and the fault, or an empty text."""

    error: float | None
    fault: str


def compare(case: Case, device: torch.device) -> Finding:
    """Compare a case's kernels with its reference.

    Raises:
        torch.OutOfMemoryError: there was no room for the comparison.
    """
    try:
        error = error_of(case, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        text = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return Finding(None, f"{case.name}: {text}")
    if error <= case.limit:
        return Finding(error, "")
    return Finding(
        error,
        f"{case.name}: a tile differs from the reference by {error:.2g} of its size, more than "
        f"{case.limit:g}",
    )


def check(device: torch.device, operators: Sequence[str] = OPERATORS) -> list[tuple[Case, Finding]]:
    """Compare the kernels of these operators on a card now, and keep what was found.

    Raises:
        torch.OutOfMemoryError: there was no room for the comparison.
    """
    cases = [case for case in CASES if case.operator in operators]
    # A new thread has none of the caller's modes: dispatch, autocast, inference, hooks, stream.
    with ThreadPoolExecutor(1) as thread:
        found = list(thread.map(lambda case: (case, compare(case, device)), cases))
    kept = {}
    for name in operators:
        faults = [finding.fault for case, finding in found if case.operator == name]
        _faults[name, device] = next(filter(None, faults), "")
        kept[_key(name, device)] = _faults[name, device]
    write(_file(), read(_file()) | kept)
    return found


def _file() -> Path:
    return path_of("mflow_operators.json")


def _key(operator: str, device: torch.device) -> str:
    return f"{card_of_results(device)}, {operator}"


def stored_faults(device: torch.device) -> dict[str, str]:
    """What this and earlier runs found on a card: each compared operator's fault, or an empty
    text."""
    stored = read(_file())
    return {name: stored[_key(name, device)] for name in OPERATORS if _key(name, device) in stored}


_faults: dict[tuple[str, torch.device], str] = {}
_lock = threading.Lock()


def fault(operator: str, device: torch.device) -> str:
    """Why an operator's kernels are not used on a card; empty if they are. Compares them if no
    earlier run on this card did."""
    known = _faults.get((operator, device))
    if known is not None:
        return known
    if capturing(device):  # nothing may be read from the device
        return ""
    with _lock:
        if (operator, device) not in _faults:
            stored = read(_file()).get(_key(operator, device))
            if stored is not None:
                _faults[operator, device] = stored
            else:
                try:
                    check(device, [operator])
                except torch.OutOfMemoryError:  # the next call compares
                    return ""
        return _faults[operator, device]


find_faults_by(fault)
