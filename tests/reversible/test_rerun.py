"""Networks run again in the backward pass; one that does not repeat its first run raises."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import HostReads
from layers.chains import chain_of
from torch import Tensor, nn

from mflow_kernels import ReversibleChain
from mflow_kernels.reversible import fingerprints, rerun
from mflow_kernels.reversible.instructions import Call


class Net(nn.Module):
    """A network whose last layer is zero, as in a new flow: random numbers change its gradients but
    not its params."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def hidden(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(x).relu()))


class OwnGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def hidden(self, h: Tensor) -> Tensor:
        return h * torch.bernoulli(torch.full_like(h, 0.5), generator=self.generator)


class DrawsInPython(Net):
    def hidden(self, h: Tensor) -> Tensor:
        return h * random.random()


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def hidden(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h / self.calls


class CountsInABuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def hidden(self, h: Tensor) -> Tensor:
        self.calls += 1e-4
        return h + self.calls


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(self.first)


class AnotherPath(Net):
    def __init__(self) -> None:
        super().__init__()
        self.path = 0

    def hidden(self, h: Tensor) -> Tensor:
        self.path += 1
        return h if self.path % 2 else h.sigmoid().sigmoid()


class Dropout(Net):
    def hidden(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5, self.training)


def train(chain: ReversibleChain, x: Tensor) -> None:
    z, logdet = chain(x)
    (z.pow(4).sum() - logdet.sum()).backward()


@pytest.mark.parametrize(
    "net", [OwnGenerator, DrawsInPython, Counts, CountsInABuffer, Normed, AnotherPath]
)
def test_a_network_with_its_own_state_raises(net: Callable[[], nn.Module]) -> None:
    random.seed(0)
    x = torch.randn(2, 4, 3, 3)
    chain = chain_of(net)
    words = rf"network 2 \({net.__name__}\) .*has state.*reversible=False"
    with pytest.raises(RuntimeError, match=words):
        train(chain, x)
    chain.reversible = False
    train(chain, x)
    assert all(p.grad is not None for p in chain.parameters())


def test_the_first_backward_pass_reads_one_number_and_later_ones_none() -> None:
    chain, x = chain_of(Dropout), torch.randn(2, 4, 3, 3)
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


def test_networks_that_draw_random_numbers_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CUDA graph cannot restore a generator's state. The capture is simulated on a CPU."""
    x = torch.randn(2, 4, 3, 3)
    drawing, still = chain_of(Dropout), chain_of(Net)
    train(drawing, x)
    train(still, x)
    monkeypatch.setattr(rerun, "capturing", lambda device: True)
    train(still, x)
    with pytest.raises(RuntimeError, match=r"\(Dropout\) draws random numbers.*reversible=False"):
        train(drawing, x)
    with pytest.raises(RuntimeError, match="run one forward and backward pass"):
        train(chain_of(Net), x)
    with pytest.raises(RuntimeError, match="run one forward and backward pass"):
        train(drawing.eval(), x)  # it has not run in these modes


@pytest.mark.parametrize("momentum", [0.1, None])
def test_infinite_running_statistics_stay_infinite(momentum: float | None) -> None:
    """Updating them with momentum 0 would give NaN: 0 * inf."""

    class Overflows(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8, momentum=momentum)

        def hidden(self, h: Tensor) -> Tensor:
            return self.norm(1e30 * h)

    chain = chain_of(Overflows)
    train(chain, torch.randn(2, 4, 3, 3))
    for layer in chain.layers:
        norm = layer.coupling.net.norm
        assert norm.running_var.isinf().any()
        assert not norm.running_var.isnan().any()
        assert norm.num_batches_tracked == 1
