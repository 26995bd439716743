"""Fixtures of tests that train, and a replacement for the capture of CUDA graphs."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import blank_pictures, cache, command, images, run, trained  # noqa: F401 - fixtures
from torch.utils._python_dispatch import _disable_current_modes

from mflow_kernels.layers import ReversibleChain
from mflow_kernels.training import graphs, module
from mflow_kernels.training.graphs import Captured


class FakeCapture:
    """Replaces the capture on a machine without a GPU.

    A replay runs its pass again and copies the results over those of the first run, as the replay
    of a CUDA graph does. It restores the drift of every chain, which a graph would not change.
    """

    def __init__(self, monkeypatch):
        self.captures, self.forwards, self.backwards = 0, 0, 0
        self.chains = {}
        record = ReversibleChain.record_drift

        def spied(chain, drift):
            self.chains[id(chain)] = chain
            record(chain, drift)

        monkeypatch.setattr(ReversibleChain, "record_drift", spied)

    @contextmanager
    def drifts_restored(self):
        before = [(chain, chain.drift) for chain in self.chains.values()]
        for chain, _ in before:
            chain.drift = None
        yield
        for chain, drift in before:
            chain.drift = drift

    def __call__(self, forward, backward):
        for _ in range(3):
            backward(forward())
        ran = []
        first = forward()
        losses, gradients = (
            tuple(torch.full_like(t, math.nan) for t in tensors)
            for tensors in (first, backward(first))
        )

        def forward_again():
            self.forwards += 1
            with torch.enable_grad(), self.drifts_restored(), _disable_current_modes():
                ran.append(forward())
            leave(losses, ran[0])

        def backward_again():
            self.backwards += 1
            with self.drifts_restored(), _disable_current_modes():
                leave(gradients, backward(ran.pop()))

        def leave(where, tensors):
            with torch.no_grad():
                for to, tensor in zip(where, tensors, strict=True):
                    to.copy_(tensor)

        self.captures += 1
        replay_forward = SimpleNamespace(replay=forward_again)
        replay_backward = SimpleNamespace(replay=backward_again)
        return Captured(replay_forward, losses, replay_backward, gradients)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def fake_capture(monkeypatch):
    fake = FakeCapture(monkeypatch)
    monkeypatch.setattr(graphs, "capture", fake)
    monkeypatch.setattr(module, "can_capture", lambda device: True)
    return fake
