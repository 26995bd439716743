"""Replacements for the capture of CUDA graphs on a machine without a GPU."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mflow_kernels.layers import ReversibleChain
from mflow_kernels.models import graphs
from mflow_kernels.models.graphs import Captured

Forward = Callable[[], tuple[Tensor, ...]]
Backward = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

# They read numbers from the device or send them to it, which a capture refuses.
TRANSFERS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.nonzero.default,
}

DETACH = torch.ops.aten.detach.default


class FakeCapture:
    """A replay runs its pass again and copies the results over those of the first run, as the
    replay of a CUDA graph does. It restores the drift of every chain, which a graph would not
    change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures, self.forwards, self.backwards = 0, 0, 0
        self.chains: dict[int, ReversibleChain] = {}
        record = ReversibleChain.record_drift

        def spied(chain: ReversibleChain, drift: Tensor) -> None:
            self.chains[id(chain)] = chain
            record(chain, drift)

        monkeypatch.setattr(ReversibleChain, "record_drift", spied)

    @contextmanager
    def drifts_restored(self) -> Iterator[None]:
        before = [(chain, chain.drift) for chain in self.chains.values()]
        for chain, _ in before:
            chain.drift = None
        yield
        for chain, drift in before:
            chain.drift = drift

    def __call__(self, forward: Forward, backward: Backward) -> Any:
        for _ in range(3):
            backward(forward())
        ran = []
        first = forward()
        losses, gradients = (
            tuple(torch.full_like(t, math.nan) for t in tensors)
            for tensors in (first, backward(first))
        )

        def forward_again() -> None:
            self.forwards += 1
            with torch.enable_grad(), self.drifts_restored(), _disable_current_modes():
                ran.append(forward())
            leave(losses, ran[0])

        def backward_again() -> None:
            self.backwards += 1
            with self.drifts_restored(), _disable_current_modes():
                leave(gradients, backward(ran.pop()))

        def leave(where: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
            with torch.no_grad():
                for to, tensor in zip(where, tensors, strict=True):
                    to.copy_(tensor)

        self.captures += 1
        replay_forward: Any = SimpleNamespace(replay=forward_again)
        replay_backward: Any = SimpleNamespace(replay=backward_again)
        return Captured(replay_forward, losses, replay_backward, gradients)


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def fake_capture(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    fake = FakeCapture(monkeypatch)
    monkeypatch.setattr(graphs, "capture", fake)
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    return fake


class Recording(TorchDispatchMode):
    """A graph of torch's operators: a replay runs those that were recorded, on the same memory.

    It runs no other Python code, as the replay of a CUDA graph. Kernels of this package and loops
    of csrc are not recorded, so the recorded code must compute by the references.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TRANSFERS:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(found)))
        return found

    def functions(self) -> list[Any]:
        """The recorded operators, without those that launch nothing."""
        return [function for function, *_ in self.calls if function is not DETACH]

    def replay(self) -> None:
        uncast = torch.autocast("cpu", enabled=False)  # the recorded operators are below autocast
        with torch.no_grad(), uncast, _disable_current_modes():
            for func, args, kwargs, results in self.calls:
                for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class RecordedCapture:
    """Records both passes after a warm-up, and keeps the recordings."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def __call__(self, forward: Forward, backward: Backward) -> Any:
        for _ in range(3):
            backward(forward())
        graphs: Any = Recording(), Recording()
        with graphs[0]:
            losses = forward()
        with graphs[1]:
            gradients = backward(losses)
        self.recordings += graphs
        return Captured(graphs[0], tuple(loss.detach() for loss in losses), graphs[1], gradients)
