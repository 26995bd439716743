"""Reversible chains under dropout, autocast, compilation and export."""

from collections.abc import Callable

import pytest
import torch
from cases import compiles, not_about_kernels, perturbed
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from layers.chains import assert_all_close, chain_of, gradients, levels, loss_of
from mflow_kernels import FlowStep, Glow, ReversibleChain
from mflow_kernels.testing import assert_close


def dropout_and_norm() -> nn.Module:
    """A coupling network with random numbers and running statistics."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Dropout(0.5), nn.Conv2d(8, 4, 1),
    )  # fmt: skip


def test_a_mode_switched_before_the_backward_pass() -> None:
    """Networks run again in the mode of the forward pass, and keep their new mode afterwards."""
    chain = perturbed(chain_of(dropout_and_norm)).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    results = []
    for call in (chain.train, chain.eval):
        chain.train()
        torch.manual_seed(1)
        z, logdet = chain(x)
        call()
        buffers = [b.clone() for b in chain.buffers()]
        results.append(torch.autograd.grad(loss_of(z, logdet), list(chain.parameters())))
        assert all(map(torch.equal, buffers, chain.buffers()))
        modes = {m.training for m in chain.modules()}
        assert modes == {call == chain.train}
    torch.testing.assert_close(*results, rtol=0, atol=0)


Backward = Callable[[nn.Module, Tensor], object]  # leaves gradients in the parameters


def loss_under(context: Callable[[], object]) -> Backward:
    def run(chain: nn.Module, x: Tensor) -> None:
        with context():  # type: ignore[attr-defined]
            loss = loss_of(*chain(x))
        loss.backward()

    return run


def retained(chain: nn.Module, x: Tensor) -> None:
    loss = loss_of(*chain(x))
    loss.backward(retain_graph=True)
    loss.backward()


def partial(chain: nn.Module, x: Tensor) -> None:
    """Gradients of the first and of the last parameters, from one graph."""
    parameters = list(chain.parameters())
    loss = loss_of(*chain(x))
    for some in (parameters[:3], parameters[-3:], parameters):
        for p, g in zip(some, torch.autograd.grad(loss, some, retain_graph=True), strict=True):
            p.grad = g if p.grad is None else p.grad + g
    loss.backward(inputs=parameters[:2])


def outputs_have_hooks(chain: nn.Module, x: Tensor) -> None:
    z, logdet = chain(x)
    z.register_hook(lambda g: 2 * g)
    logdet.register_hook(lambda g: g.sin())
    loss_of(z, logdet).backward()


def modules_have_hooks(chain: nn.Module, x: Tensor) -> None:
    """Hooks of a network's layers and of its activations."""
    first = chain.layers[1].coupling.net[0]  # type: ignore[index, union-attr]

    def activation(module: nn.Module, given: object, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return 1.5 * h

    handles = [
        first.register_forward_hook(activation),
        first.register_forward_pre_hook(lambda module, given: (given[0] + 1,)),
        first.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)),
        first.register_full_backward_pre_hook(lambda module, dy: (3 * dy[0],)),
    ]
    loss_of(*chain(x)).backward()
    for handle in handles:
        handle.remove()


def removed_hooks(chain: nn.Module, x: Tensor) -> None:
    handles = [p.register_hook(lambda g: 2 * g) for p in chain.parameters()]
    loss_of(*chain(x)).backward()
    for handle in handles:
        handle.remove()
    loss_of(*chain(x)).backward()


def a_hook_that_differentiates(chain: nn.Module, x: Tensor) -> None:
    """It runs its own backward pass, in which other hooks run as usual."""
    *_, other, p = chain.parameters()
    called: list[Tensor] = []

    def inner(gradient: Tensor) -> None:
        with torch.enable_grad():
            torch.autograd.grad(other.square().sum(), other)

    handles = [other.register_hook(called.append), p.register_hook(inner)]  # type: ignore[arg-type]
    loss_of(*chain(x)).backward()
    for handle in handles:
        handle.remove()
    assert len(called) == 2


def counted(chain: nn.Module, x: Tensor) -> None:
    with FlopCounterMode(display=False):
        loss_of(*chain(x)).backward()


def checkpointed(reentrant: bool) -> Backward:
    def run(chain: nn.Module, x: Tensor) -> None:
        given = x.clone().requires_grad_()
        loss_of(*checkpoint(chain, given, use_reentrant=reentrant)).backward()

    return run


TOOLS: dict[str, Backward] = {
    "anomaly mode": loss_under(torch.autograd.detect_anomaly),
    "save_on_cpu": loss_under(save_on_cpu),
    "counted operations": counted,
    "saved tensors": loss_under(lambda: saved_tensors_hooks(torch.clone, torch.clone)),
    "checkpoint around": checkpointed(reentrant=False),
    "reentrant checkpoint around": checkpointed(reentrant=True),
    "retain_graph": retained,
    "partial": partial,
    "hooks of outputs": outputs_have_hooks,
    "hooks of modules": modules_have_hooks,
    "removed hooks": removed_hooks,
    "a hook that differentiates": a_hook_that_differentiates,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("backward", TOOLS.values(), ids=TOOLS)
def test_what_autograd_lets_people_attach(backward: Backward) -> None:
    """Rebuilt states give the gradients of stored ones, in the first pass and later."""
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    results = []
    for reversible in (True, False):
        torch.manual_seed(0)
        chain = perturbed(chain_of(dropout_and_norm, reversible=reversible)).double()
        found = []
        for seed in range(2):
            chain.zero_grad()
            torch.manual_seed(seed)
            backward(chain, x)
            found += [p.grad.clone() for p in chain.parameters() if p.grad is not None]
        results.append(found)
    assert_all_close(*results, terms=1000)


def autocast(model: nn.Module, dtype: torch.dtype | None) -> Callable[[Tensor], object]:
    def call(x: Tensor) -> object:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return model(x)

    return call


@not_about_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lets_networks_compute_in_low_precision(dtype: torch.dtype) -> None:
    """Stored inputs repeat their bits, so that rebuilding adds far less error than the low
    precision itself. A gradient scaler sees that its scale overflows."""
    model = perturbed(Glow((3, 8, 8), 2, 4, 16, checkpoint_every=1), 0.05)
    x = torch.randn(4, 3, 8, 8)

    def run(dtype: torch.dtype | None, reversible: bool) -> list[Tensor]:
        model.chain.reversible = reversible
        return gradients(model, x, call=autocast(model, dtype))

    exact, low, again = run(None, False), run(dtype, False), run(dtype, True)

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        total = sum(t.double().pow(2).sum() for t in b)
        return (
            sum((s - t).double().pow(2).sum() for s, t in zip(a, b, strict=True)) / total
        ) ** 0.5

    assert distance(low, exact) > 1e-4  # the networks did run in low precision
    assert distance(again, low) < distance(low, exact) / 10
    if dtype == torch.float16:
        (2.0**24 * loss_of(*autocast(model, dtype)(x))).backward()
        assert not all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_casts_weights_again_in_the_backward_pass() -> None:
    """A backward pass inside autocast must not use weights that were cast without gradients."""
    chain = perturbed(chain_of(lambda: nn.Conv2d(2, 4, 1)))
    x = torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(*chain(x)).backward()
    assert all(p.grad is not None for p in chain.parameters())


@compiles
def test_networks_may_be_compiled() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
    chain = perturbed(ReversibleChain([FlowStep(4, net)]))
    x = torch.randn(2, 4, 3, 3)
    want = gradients(chain, x, call=chain)
    chain.layers[0].coupling.net = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_all_close(gradients(chain, x, call=chain), want, terms=2 * 18)


@compiles
def test_sampling_of_stored_levels_is_exported() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = perturbed(levels(reversible=False))

        def forward(self, *z: Tensor) -> Tensor:
            return self.chain.inverse(z)[0]

    sampling = Sampling()
    z = torch.randn(2, 2, 2, 2), torch.randn(2, 2, 2, 2)
    assert_close(torch.export.export(sampling, z).module()(*z), sampling(*z), terms=3 * 32)


@pytest.mark.parametrize("reversible", [True, False])
def test_autocast_leaves_float64_alone(reversible: bool) -> None:
    """As torch does: autocast casts neither float64 states nor float64 weights."""
    model = perturbed(Glow((3, 8, 8), 2, 2, 8, reversible=reversible)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = (gradients(model, x, call=autocast(model, d)) for d in (torch.bfloat16, None))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@compiles
@pytest.mark.parametrize("reversible", [True, False])
def test_a_compiled_function_may_call_backward(reversible: bool) -> None:
    """The backward pass of four steps is compiled once, and not for each step."""
    torch.compiler.reset()
    chain = perturbed(ReversibleChain([FlowStep(4, width=4) for _ in range(4)])).double()
    chain.reversible = reversible
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    want = gradients(chain, x, call=chain)

    def step(x: Tensor) -> Tensor:
        loss = loss_of(*chain(x))
        loss.backward()
        return loss

    chain.zero_grad()
    given = x.clone().requires_grad_()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        loss = torch.compile(step, backend="aot_eager")(given)
    got = [loss.detach(), given.grad, *(p.grad for p in chain.parameters())]
    assert_all_close(got, want, terms=2 * 6 * 18)
