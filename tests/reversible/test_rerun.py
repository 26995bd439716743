"""Networks run again in the backward pass; one that does not repeat its first run raises."""

import random
import threading
from collections import defaultdict
from collections.abc import Callable
from itertools import count, cycle

import pytest
import torch
from cases import HostReads
from layers.chains import chain_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mflow_kernels import FlowStep, ReversibleChain
from mflow_kernels.reversible import draws, fingerprints, rerun
from mflow_kernels.reversible.instructions import Call


class Net(nn.Module):
    """A network that changes its hidden units. Its last layer is zero, as in a new flow: random
    numbers change its gradients but not its params."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.first, self.change, self.last = nn.Conv2d(2, 8, 1), change, nn.Conv2d(8, 4, 1)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self.first(x).relu()))


def dropout() -> Net:
    return Net(nn.Dropout(0.5))


def that_counts() -> Net:
    calls = count(1)
    return Net(lambda h: h / next(calls))


def with_another_path() -> Net:
    paths = cycle([lambda h: h, lambda h: h.sigmoid().sigmoid()])
    return Net(lambda h: next(paths)(h))


def with_spectral_norm() -> Net:
    net = Net()
    nn.utils.parametrizations.spectral_norm(net.first)
    return net


class CountsInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1e-4
        return h + self.calls


STATEFUL = {
    "draws in Python": lambda: Net(lambda h: h * random.random()),
    "counts": that_counts,
    "counts in a buffer": lambda: Net(CountsInABuffer()),
    "spectral norm": with_spectral_norm,
    "another path": with_another_path,
}


def train(chain: ReversibleChain, x: Tensor) -> None:
    z, logdet = chain(x)
    (z.pow(4).sum() - logdet.sum()).backward()


@pytest.mark.parametrize("net", STATEFUL.values(), ids=STATEFUL)
def test_a_network_with_its_own_state_raises(net: Callable[[], nn.Module]) -> None:
    random.seed(0)
    x = torch.randn(2, 4, 3, 3)
    chain = chain_of(net)
    words = r"network 2 \(Net\) .*has state.*reversible=False"
    with pytest.raises(RuntimeError, match=words):
        train(chain, x)
    chain.reversible = False
    train(chain, x)
    assert all(p.grad is not None for p in chain.parameters())


def test_the_first_backward_pass_reads_one_number_and_later_ones_none() -> None:
    chain, x = chain_of(dropout), torch.randn(2, 4, 3, 3)
    found = []
    for training in (True, True, False, False, True):
        chain.train(training)  # another mode is checked separately
        with HostReads() as reads:
            train(chain, x)
        found.append(len(reads.found))
    assert found == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_raise(dtype: torch.dtype) -> None:
    """Rebuilt states and low precision change a network's numbers by far less than the limit."""
    net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 16, 1))
    x = torch.randn(8, 8, 9, 9).to(dtype).float()
    with torch.autocast("cpu", dtype):
        call = rerun.RerunCall(Call(net, net))
        with torch.no_grad():
            call.first_run(x, ())
        call.run_again((x + 1e-5 * torch.randn_like(x)).requires_grad_(), ())
    assert call.difference is not None
    assert 0 < call.difference < fingerprints.ROUNDING / 3


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5])
def test_the_difference_of_tensors_is_estimated_from_their_fingerprints(share: float) -> None:
    a = torch.randn(4, 32, 16, 16)
    b = torch.where(torch.rand(a.shape) < share, 0.0, a)
    true = (a - b).norm() / a.norm()
    same = fingerprints.fingerprint(a[:1])
    found = fingerprints.difference(
        [same, fingerprints.fingerprint(a)], [same, fingerprints.fingerprint(b)]
    )
    # The norm of sixteen normal numbers has a relative deviation of 0.18; allow four of these.
    assert true * 0.28 < found < true * 1.72


def test_a_wrongly_rebuilt_state_is_not_blamed_on_the_network() -> None:
    """The drift shows it instead."""
    a, b = ([fingerprints.fingerprint(torch.randn(64)) for _ in range(2)] for _ in range(2))
    assert fingerprints.difference(a, b) == 0
    assert fingerprints.difference([a[0], a[1]], [a[0], b[1]]) > fingerprints.ROUNDING
    assert fingerprints.difference(a, a[:1]) == float("inf")


def test_networks_are_known_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture is simulated on a CPU."""
    x, drawing = torch.randn(2, 4, 3, 3), chain_of(dropout)
    train(drawing, x)
    for module in (rerun, draws):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    train(drawing, x)
    with pytest.raises(RuntimeError, match="run one forward and backward pass"):
        train(chain_of(Net), x)
    with pytest.raises(RuntimeError, match="run one forward and backward pass"):
        train(drawing.eval(), x)  # it has not run in these modes


class Noisy(nn.Module):
    """A network that keeps the masks that it draws, of each thread."""

    def __init__(self, masks: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.masks, self.last = masks, nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand_like(x)
        self.masks[threading.current_thread().name].append(mask)
        return self.last(x * mask)


def test_threads_that_train_one_chain_draw_their_own_masks() -> None:
    masks: dict[str, list[Tensor]] = defaultdict(list)
    chain = ReversibleChain([FlowStep(4, Noisy(masks)) for _ in range(4)])

    def step() -> None:
        train(chain, torch.randn(256, 4))

    for _ in range(10):
        masks.clear()
        threads = [threading.Thread(target=step) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(masks) == 3
        for drawn in masks.values():
            assert len(drawn) == 8
            for first, again in zip(drawn[:4], drawn[:3:-1], strict=True):
                assert torch.equal(first, again)


def test_a_network_that_begins_to_draw() -> None:
    chain, x = chain_of(Net), torch.randn(2, 4, 3, 3)
    train(chain, x)
    seen: list[Tensor] = []

    def noise(h: Tensor) -> Tensor:
        seen.append(torch.rand_like(h))
        return h * seen[-1]

    net = chain.layers[1].coupling.net
    net.change = noise
    for _ in range(2):
        train(chain, x)
        assert torch.equal(seen[-2], seen[-1])


def test_a_context_that_a_network_changes_is_named() -> None:
    def change(x: Tensor, context: Tensor) -> Tensor:
        return torch.cat([x, context.add_(1)], 1)

    class Changes(nn.Module):
        forward = staticmethod(change)

    chain = ReversibleChain([FlowStep(4, Changes())])
    with pytest.raises(RuntimeError, match=r"network 0 \(Changes\) changed its context in place"):
        chain(torch.randn(3, 4), torch.randn(3, 2))


def test_reentrant_checkpoints_are_named_before_the_first_step() -> None:
    reentrant = lambda h: checkpoint(torch.tanh, h, use_reentrant=True)  # noqa: E731
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"network 0 \(Net\) .*use_reentrant=False has them"):
        chain_of(lambda: Net(reentrant))(x)
    train(chain_of(lambda: Net(lambda h: checkpoint(torch.tanh, h, use_reentrant=False))), x)


def test_a_checkpoint_that_draws_is_named() -> None:
    """It would draw other numbers in its own second run."""
    drop = nn.Dropout(0.5)
    chain = chain_of(lambda: Net(lambda h: checkpoint(drop, h, use_reentrant=False)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"network 2 \(Net\) draws .* checkpoint can go"):
            train(chain, torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_infinite_running_statistics_stay_infinite(momentum: float | None) -> None:
    """Updating them with momentum 0 would give NaN: 0 * inf."""
    chain = chain_of(lambda: Net(nn.BatchNorm2d(8, momentum=momentum)))
    nets = [layer.coupling.net for layer in chain.layers]
    for net in nets:
        net.first.weight.data.mul_(1e30)
    train(chain, torch.randn(2, 4, 3, 3))
    for norm in (net.change for net in nets):
        assert norm.running_var.isinf().any()
        assert not norm.running_var.isnan().any()
        assert norm.num_batches_tracked == 1
