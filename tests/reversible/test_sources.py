"""No gradient of a reversible chain is lost: those of tensors that a network uses but does not own,
of parametrized and frozen weights, of networks that change their input or are compiled."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import perturbed
from layers.bijections import LeakyReLU
from layers.chains import InSequence, assert_all_close, both_gradients, gradients, loss_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from mflow_kernels import AffineCoupling, FlowStep, Glow, ReversibleChain
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.testing import assert_close

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A network whose params are multiplied by a factor from elsewhere."""

    def __init__(self, factor: Callable[[], Tensor | float] = lambda: 1.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.factor()


def chain_of(net: Callable[[], nn.Module], steps: int = 3, **options: object) -> ReversibleChain:
    torch.manual_seed(0)
    return ReversibleChain([FlowStep(4, net()) for _ in range(steps)], **options).double()  # type: ignore[arg-type]


def test_tensors_that_a_network_uses_but_does_not_own() -> None:
    hidden = [torch.linspace(0.5, 1.5, 4).requires_grad_() for _ in range(3)]
    weights = iter(hidden)
    chain = chain_of(lambda: Net(partial(torch.exp, next(weights))))
    inputs = [*chain.parameters(), *hidden]
    found = []
    for chain.reversible in (True, True, False):
        found.append(list(torch.autograd.grad(loss_of(*chain(X)), inputs)))
    assert all(g.any() for g in found[0][-3:])
    assert_all_close(found[0], found[2], terms=1000)
    assert_all_close(found[1], found[2], terms=1000)


@pytest.mark.parametrize("layer", ["network", "layer"])
def test_a_graph_outside_of_a_network_is_an_error_before_the_first_step(layer: str) -> None:
    """As that of a network that makes the weights of another one."""
    hyper = nn.Linear(3, 4).double()
    made = hyper(torch.ones(3, dtype=torch.float64))
    if layer == "network":
        chain, name = chain_of(lambda: Net(lambda: made)), r"network 0 \(Net\)"
    else:
        relu = LeakyReLU()
        del relu.log_a
        relu.log_a = made.mean()  # type: ignore[assignment]
        chain, name = ReversibleChain([relu]), r"layers.0 \(LeakyReLU\)"
    with pytest.raises(RuntimeError, match=name + ".*computed outside of it.*reversible=False"):
        chain(X)
    chain.reversible = False
    loss_of(*chain(X)).backward()
    assert hyper.weight.grad is not None


def test_a_tensor_that_appears_after_the_first_run_is_an_error() -> None:
    chain = chain_of(Net)
    loss_of(*chain(X)).backward()
    hidden = torch.ones(4, dtype=torch.float64, requires_grad=True)
    chain.layers[1].coupling.net.factor = lambda: hidden
    loss = loss_of(*chain(X))
    with pytest.raises(RuntimeError, match="did not use in its first run"):
        loss.backward()


class Soft(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 0.5 * w.tanh()


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("part", ["conv.log_diagonal", "conv.lower", "actnorm.log_scale", "net"])
def test_parametrized_weights(part: str, backwards: bool) -> None:
    chain = perturbed(chain_of(Net))
    for step in chain.layers:
        if part == "net":
            parametrizations.weight_norm(step.coupling.net.layers[0])
        else:
            module, name = part.split(".")
            parametrize.register_parametrization(getattr(step, module), name, Soft())
    got, want = both_gradients(chain, X, backwards=backwards)
    assert len(got) == 2 + len(list(chain.parameters()))
    assert_all_close(got, want, terms=1000)


def test_cached_weights_are_an_error_in_the_backward_pass() -> None:
    chain = chain_of(Net)
    for step in chain.layers:
        parametrize.register_parametrization(step.coupling.net.layers[0], "weight", Soft())
    for _ in range(2):
        with parametrize.cached():
            loss = loss_of(*chain(X))
            with pytest.raises(RuntimeError, match=r"network 2 .* leave it before the backward"):
                loss.backward()
        with parametrize.cached():
            loss = loss_of(*chain(X))
        loss.backward()


class Kept(Net):
    """A network that keeps its hidden tensor, for a penalty."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.layers[0](x)
        return self.layers[2](self.kept.tanh())


@pytest.mark.parametrize("kept_by", ["a hook", "a hook after the first step", "the network"])
def test_activations_are_no_part_of_the_loss(kept_by: str) -> None:
    chain = chain_of(Kept if kept_by == "the network" else Net)
    net = chain.layers[1].coupling.net

    def register() -> None:
        net.layers[0].register_forward_hook(lambda m, i, o: setattr(net, "kept", o))

    if kept_by == "a hook":
        register()
    loss_of(*chain(X)).backward()
    if kept_by == "a hook after the first step":
        register()
    for _ in range(2):
        loss = loss_of(*chain(X))
        with pytest.raises(RuntimeError, match="loss uses activations of network 1"):
            (loss + net.kept.square().sum()).backward()
        loss_of(*chain(X)).backward()  # keeping without using is allowed


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shift


@pytest.mark.parametrize("change", ["statistics", "buffer", "sign of W", "statistics of a layer"])
def test_a_buffer_that_changes_before_the_backward_pass_is_an_error(change: str) -> None:
    if change == "statistics of a layer":
        chain = ReversibleChain([InSequence(AffineCoupling(4, Normed()))]).double()
    else:
        chain = chain_of(Normed)
    chain.eval()
    loss_of(*chain(X)).backward()
    loss = loss_of(*chain(X))
    if change == "buffer":
        chain.layers[0].coupling.net.shift += 1
    elif change == "sign of W":
        chain.layers[1].conv.sign.neg_()
    else:
        chain.train()
        chain(3 * X + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class ChangesItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.sub_(1)
        return self.layers(x)


class OwnGenerator(Net):
    """Numbers of its own generator, in place and not, and dropout by the operator of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y = y * torch.empty_like(y).uniform_(generator=self.generator)
        y = y * torch.bernoulli(torch.full_like(y, 0.5), generator=self.generator)
        return torch.native_dropout(y, 0.5, True)[0]


class Differentiates(Net):
    """A network that uses its own derivative, with a leaf that it makes."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.layers(leaf).sum(), leaf, create_graph=True)
        return self.layers(x + slope)


class Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(2, 2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([x, super().forward(x, x, x)[0]], 1)


RERUN: dict[str, Callable[[], nn.Module]] = {
    "changes its input": ChangesItsInput,
    "starts in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 4)),
    "differentiates": Differentiates,
    "own generator": OwnGenerator,
    "attention with dropout": Attention,
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 4))),
    # Random slopes, dropout, and statistics of instances and of batches that are tracked.
    "noisy": lambda: nn.Sequential(
        nn.Linear(2, 8), nn.Unflatten(1, (2, 4)),
        nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.RReLU(),
        nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("every", [1, 8, None])
@pytest.mark.parametrize("net", RERUN.values(), ids=RERUN)
def test_networks_that_are_rerun_as_they_are(net: Callable[[], nn.Module], every: int) -> None:
    # Not a deep copy: the copied parameters of a scripted module are no leaves.
    stored, rebuilt = (chain_of(net, reversible=r, checkpoint_every=every) for r in (False, True))
    for _ in range(3):
        results, generators = [], []
        for chain in (rebuilt, stored):
            torch.manual_seed(2)
            results.append(gradients(chain, X, call=chain))
            generators.append(torch.get_rng_state())
        assert_all_close(*results, terms=1000)
        assert torch.equal(*generators)
    for a, b in zip(rebuilt.buffers(), stored.buffers(), strict=True):
        assert_close(a.double(), b.double(), terms=1000)


def test_lazy_layers_are_initialized_before_the_first_step() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4))

    torch.manual_seed(0)
    chain = ReversibleChain([FlowStep(4, lazy()) for _ in range(2)])
    x = X.float()
    with pytest.raises(TypeError, match="lazy parameters; call `initialize`"):
        chain(x)
    chain.initialize(x)
    assert_all_close(*both_gradients(chain, x), terms=1000)


@pytest.mark.parametrize("part", ["coupling.net", "conv", "actnorm"])
@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_between_the_passes_changes_no_gradient(part: str, frozen: bool) -> None:
    """Autograd fixes at the forward pass which gradients there are."""
    chain = perturbed(chain_of(Net))
    results = []
    for chain.reversible in (True, False):
        for p in chain.layers[1].get_submodule(part).parameters():
            p.requires_grad_(frozen)
        chain.zero_grad()
        loss = loss_of(*chain(X))
        for p in chain.layers[1].get_submodule(part).parameters():
            p.requires_grad_(not frozen)
        loss.backward()
        results.append([p.grad for p in chain.parameters() if p.grad is not None])
        chain.requires_grad_()
    assert_all_close(*results, terms=1000)


def test_an_optimizer_in_the_backward_pass() -> None:
    """Hooks that update a parameter once its gradient is there, level by level."""
    results = []
    for reversible in (True, False):
        torch.manual_seed(0)
        flow = perturbed(Glow((1, 8, 8), 2, 2, 4, reversible=reversible)).double()
        for p in flow.parameters():
            one = torch.optim.SGD([p], 1e-3)
            p.register_post_accumulate_grad_hook(lambda _, one=one: one.step())
        x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        loss_of(*flow(x)).backward()
        results.append([p.detach() for p in flow.parameters()])
    assert_all_close(*results, terms=1000)


@pytest.mark.skipif(KERNELS_ON_CPU, reason="eight steps, and the interpreter adds nothing")
@pytest.mark.parametrize("every", [8, None, 1])
def test_the_drift_is_that_of_the_states_that_were_rebuilt(every: int | None) -> None:
    """Couplings whose inverse loses digits: the drift grows with the error of the gradient."""
    found = []
    for log_s in (0.5, 1.5, 2.0):
        torch.manual_seed(0)
        steps = [FlowStep(4, width=16, spatial_dims=0, scale="exp") for _ in range(8)]
        chain = ReversibleChain(steps, checkpoint_every=every)
        x = torch.randn(64, 4)
        with torch.no_grad():
            for i, step in enumerate(steps):
                step.coupling.net[-1].weight.normal_(0, 0.1)
                step.coupling.net[-1].bias[:2] = -log_s if i % 2 == 0 else log_s
        exact = copy.deepcopy(chain).double()
        exact.reversible = False
        got, want = gradients(chain, x, call=chain), gradients(exact, x.double(), call=exact)
        error = sum((a - b).square().sum() for a, b in zip(got, want, strict=True)).sqrt()
        found.append((chain.drift.item(), (error / sum(b.norm() for b in want)).item()))
    drifts = [drift for drift, _ in found]
    assert drifts[0] < 1e-5
    assert not drifts[-1] < 100 * drifts[0]  # NaN counts
    for drift, error in found:
        assert not error > 10 * drift or drift != drift


def test_a_network_is_forgotten_with_its_chain() -> None:
    chain = chain_of(Net)
    loss_of(*chain(X)).backward()
    nets = [weakref.ref(step.coupling.net) for step in chain.layers]
    del chain
    gc.collect()
    assert [net() for net in nets] == [None] * 3
