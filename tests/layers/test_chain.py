"""Reversible chains have the gradients of stored ones and leave the caller's tensors alone."""

from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from cases import perturbed
from torch import Tensor, nn

from layers.chains import assert_all_close, both_gradients, chain_of, loss_of, parts
from mflow_kernels import CouplingNetwork, FlowStep, Glow, ReversibleChain, Split, Squeeze
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close


def test_memory_holds_the_last_state_and_the_first_of_each_level() -> None:
    chain = perturbed(Glow((3, 8, 8), 2, 6, 8)).chain  # type: ignore[union-attr]
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    for every, states in ((None, 0), (1, 13), (4, 4)):
        chain.checkpoint_every = every
        saved: list[Tensor] = []

        def pack(t: Tensor, into: list[Tensor] = saved) -> Tensor:
            into.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            chain(x)
        # Four-dimensional tensors: both levels' inputs, the last state, the latent, stored states.
        states_saved = [t for t in saved if t.dim() == 4 and not isinstance(t, nn.Parameter)]
        assert len(states_saved) == 4 + 2 * states


class Labelled(nn.Module):
    """A network for any number of channels, which gets a context."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Linear(3, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        params = torch.cat([x.cumsum(1), x.sin()], 1)
        return params * self.label(label)[:, :, None, None]


def in_all_levels() -> list[nn.Module]:
    net = Labelled()
    coarse = [Squeeze(), FlowStep(8, net), FlowStep(8, net)]
    return [Squeeze(), FlowStep(4, net), FlowStep(4, net), Split(4, net), *coarse]


def step_twice(*between: nn.Module) -> list[nn.Module]:
    step = FlowStep(4, Labelled())
    return [Squeeze(), step, *between, step]


def frozen_in_part() -> list[nn.Module]:
    net = Labelled()
    net.label.weight.requires_grad_(False)
    steps = [FlowStep(4, net) for _ in range(3)]
    steps[1].actnorm.bias.requires_grad_(False)
    return [Squeeze(), *steps]


SHARED = {
    "a network of all levels": in_all_levels,
    "a step, adjacent": step_twice,
    "a step, apart": lambda: step_twice(FlowStep(4, Labelled())),
    "a network that is frozen in part": frozen_in_part,
}


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("layers", SHARED.values(), ids=SHARED)
def test_what_layers_share(layers: Callable[[], list[nn.Module]], backwards: bool) -> None:
    chain = perturbed(ReversibleChain(layers(), checkpoint_every=2)).double()
    x, label = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 3).double()
    z = tuple(part.detach() for part in parts(chain(x, label)[0]))
    given = (*z, label) if backwards else (x, label)
    got, want = both_gradients(chain, *given, backwards=backwards, contexts=1)
    assert len(got) == 1 + len(given) + sum(p.requires_grad for p in chain.parameters())
    assert_all_close(got, want, terms=2 * 3 * 64)


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_gradients_of_a_level_are_complete_before_the_next_is_undone(backwards: bool) -> None:
    events: list[str] = []
    flow = perturbed(Glow((1, 8, 8), 3, 1, 4))
    for net in (m for m in flow.modules() if isinstance(m, CouplingNetwork)):
        net.register_forward_pre_hook(
            lambda *_: events.append("undo") if torch.is_grad_enabled() else None
        )
    for p in flow.parameters():
        p.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    x = torch.randn(2, 1, 8, 8)

    def loss() -> Tensor:
        if backwards:
            return loss_of(*flow.inverse(tuple(z.detach() for z in flow(x)[0])))
        return loss_of(*flow(x))

    loss().backward()  # the first pass also runs networks with gradients in the forward pass
    second = loss()
    events.clear()
    second.backward()
    assert [kind for kind, _ in groupby(events)] == 3 * ["undo", "gradient"]


def test_frozen_levels_are_not_undone() -> None:
    chain = perturbed(Glow((1, 8, 8), 3, 1, 4)).chain
    for layer in list(chain.layers)[: len(chain.layers) // 2]:
        layer.requires_grad_(False)
    trained = [p for p in chain.parameters() if p.requires_grad]
    x = torch.randn(2, 1, 8, 8)
    results = []
    for chain.reversible in (True, False):
        results.append(list(torch.autograd.grad(loss_of(*chain(x)), trained)))
    assert_all_close(*results, terms=2 * 3 * 64)
    assert chain.drift is not None


def test_twice_in_one_graph_and_autograd_grad() -> None:
    chain = perturbed(chain_of(lambda: nn.Conv2d(2, 4, 1))).double()
    x = torch.randn(2, 4, 3, 3).double()
    parameters = list(chain.parameters())

    def twice() -> Tensor:
        once, logdet = chain(x)
        return loss_of(*chain(once)) + logdet.sum()

    got = torch.autograd.grad(twice(), parameters)
    chain.reversible = False
    assert_all_close(list(got), list(torch.autograd.grad(twice(), parameters)), terms=2 * 6 * 18)


class Squash(nn.Module):
    """Its coupling keeps few digits of x_b: y_b = e^-8 x_b + sin x_a."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x) - 8, x.sin()], 1)


def test_a_stored_state_replaces_the_rebuilt_one() -> None:
    """The errors of rebuilt states neither add up nor enter the gradients."""
    scale = ScaleFunction("exp", order="scale-shift")
    steps = [FlowStep(4, Squash(), scale=scale) for _ in range(4)]
    chain = perturbed(ReversibleChain(steps, checkpoint_every=1))
    got, want = both_gradients(chain, torch.randn(2, 4, 3, 3))
    assert_all_close(got, want, terms=2 * 3 * 18)
    assert chain.drift is not None
    assert chain.drift > 1e-5


def test_drift_is_the_largest_of_a_graph() -> None:
    chain = perturbed(chain_of(lambda: nn.Conv2d(2, 4, 1)))
    a, b = torch.randn(2, 4, 3, 3), 3 * torch.randn(2, 4, 3, 3)

    def drift_of(*inputs: Tensor) -> Tensor | None:
        chain.drift = None
        torch.stack([loss_of(*chain(x)) for x in inputs]).sum().backward()
        return chain.drift

    alone = drift_of(a), drift_of(b)
    assert alone[0] != alone[1]
    assert drift_of(a, b) == drift_of(b, a) == max(alone)
    nothing = drift_of(torch.zeros_like(a))  # it is relative to 1 for states with small numbers
    assert nothing is not None
    assert nothing < 1e-6


def test_the_callers_tensors_are_left_alone() -> None:
    chain = perturbed(chain_of(lambda: nn.Conv2d(2, 4, 1)))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    z, logdet = chain(x)
    before = x.detach().clone(), z.detach().clone()
    loss_of(z, logdet).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])


@pytest.mark.parametrize("changed", ["output", "parameter"])
def test_a_change_before_the_backward_pass_is_noticed(changed: str) -> None:
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1))
    z, logdet = chain(torch.randn(2, 4, 3, 3, requires_grad=True))
    loss = loss_of(z, logdet)
    with torch.no_grad():
        (z if changed == "output" else chain.layers[1].coupling.net.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_replaced_parameter_is_noticed() -> None:
    """The backward pass runs networks again, so it needs the same parameters."""
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1))
    x = torch.randn(2, 4, 3, 3)
    others = {k: p.detach().clone().requires_grad_() for k, p in chain.named_parameters()}
    loss = loss_of(*torch.func.functional_call(chain, others, (x,)))
    with pytest.raises(RuntimeError, match=r"replaced.*functional_call.*reversible=False"):
        loss.backward()
    maps = {k: p for k, p in others.items() if "net" not in k}  # autograd differentiates these
    chain.zero_grad()
    gradients = []
    for reversible in (True, False):
        chain.reversible = reversible
        loss = loss_of(*torch.func.functional_call(chain, maps, (x,)))
        gradients.append(list(torch.autograd.grad(loss, list(maps.values()))))
    assert_all_close(*gradients, terms=2 * 3 * 18)


@pytest.mark.parametrize("reversible", [True, False])
def test_gradients_of_gradients(reversible: bool) -> None:
    """Autograd's second and third derivatives are those of torch.func."""
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1)).double()
    chain.reversible = reversible
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x)

    def total(x: Tensor) -> Tensor:
        z, logdet = chain(x)
        return z.pow(3).sum() + logdet.sum()

    def by_functions(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (torch.func.grad(f)(x) * v).sum()

    want, got = total, total(x)
    for _ in range(3):
        want, (dx,) = by_functions(want), torch.autograd.grad(got, x, create_graph=True)
        got = (dx * v).sum()
        expected = want(x.detach())
        assert expected.abs() > 1e-3
        assert_close(got, expected, terms=10_000)
