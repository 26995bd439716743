"""Every invertible layer in a chain: those of this package and those of users, alone and together,
reversible and stored, with context."""

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
from cases import compiles, perturbed
from torch import Tensor, nn

from layers.bijections import LeakyReLU, TokenCoupling
from layers.chains import (
    InSequence,
    assert_all_close,
    both_gradients,
    gradients,
    inverse_of,
    loss_of,
    parts,
)
from layers.table import LAYERS, TOGETHER, USERS
from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    Bijection,
    FlowStep,
    InvertibleConv1x1,
    Permutation,
    PixelPairs,
    ReversibleChain,
    Split,
    Squeeze,
)
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.reversible.instructions import Join, SplitOff
from mflow_kernels.testing import assert_close, check_bijection

CHAINS = {name: (lambda make=make: [make()], shape) for name, (make, shape) in LAYERS.items()}
CHAINS |= USERS | TOGETHER
every_chain = pytest.mark.parametrize("name", CHAINS)


def chain_of(name: str, **options: object) -> tuple[ReversibleChain, Tensor]:
    make, shape = CHAINS[name]
    if name in ("nflows' spline", "vectors"):
        pytest.importorskip("nflows")
    torch.manual_seed(0)
    chain = ReversibleChain(make(), input_shape=[*shape[1:]], **options)  # type: ignore[arg-type]
    return perturbed(chain).double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.skipif(KERNELS_ON_CPU, reason="test_bijection.py runs the kernels of each layer")
@pytest.mark.parametrize("name", [*USERS, *TOGETHER])
def test_round_trip_jacobian_and_logdet(name: str) -> None:
    chain, x = chain_of(name)
    check_bijection(chain, tuple(x.shape))


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("name", "every", "dtype"),
    [
        *((name, 2, torch.float64) for name in (TOGETHER if KERNELS_ON_CPU else CHAINS)),
        *(
            (name, every, torch.float64)
            for name in TOGETHER
            for every in (None, 1)
            if not KERNELS_ON_CPU
        ),
        ("images", None, torch.float32),
    ],
)
def test_gradients_are_those_of_stored_states(
    name: str, backwards: bool, every: int | None, dtype: torch.dtype
) -> None:
    chain, x = chain_of(name, checkpoint_every=every)
    chain, x = chain.to(dtype), x.to(dtype)
    inputs = tuple(z.detach() for z in parts(chain(x)[0])) if backwards else (x,)
    for _ in range(2):  # the first pass compares both runs, the second trusts them
        both = both_gradients(chain, *inputs, backwards=backwards)
        assert_all_close(*both, terms=2 * 16 * 64)
    # In float32, the rounding grows with the number of steps between two kept states.
    assert chain.drift is not None
    assert_close(chain.drift, torch.zeros_like(chain.drift), terms=64, scale=4.0)


def hook_all(chain: nn.Module) -> list[str]:
    """Register hooks of each kind on all parameters. The list receives a name for each call."""
    called: list[str] = []

    def doubled(gradient: Tensor) -> Tensor:
        called.append("one")
        return 2 * gradient

    def tripled(p: Tensor) -> None:
        called.append("accumulated")
        assert p.grad is not None
        p.grad.mul_(3)

    parameters = tuple(chain.parameters())
    for p in parameters:
        p.register_hook(doubled)
        p.register_post_accumulate_grad_hook(tripled)
    if parameters:
        torch.autograd.graph.register_multi_grad_hook(parameters, lambda _: called.append("all"))
    return called


@every_chain
def test_hooks_of_parameters_run_once_with_the_whole_gradient(name: str) -> None:
    """The second run of a network runs none of them."""
    found, calls = [], []
    for reversible in (True, False):
        chain, x = chain_of(name, reversible=reversible)
        called = hook_all(chain)
        for _ in range(2):
            found.append(gradients(chain, x, call=chain))
            calls.append(sorted(called))
            called.clear()
    assert calls == calls[:1] * 4
    for got, want in zip(found[:2], found[2:], strict=True):
        assert_all_close(got, want, terms=2 * 16 * 64)


class Wrong(LeakyReLU):
    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(z)
        return 1.01 * x, logdet


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, given, result: (result[0] + 0.1, result[1]))
    return layer


UNDONE_WRONGLY: dict[str, Callable[[], nn.Module]] = {
    "inverse": Wrong,
    "hook": lambda: hooked(LeakyReLU()),
    "hook of a step": lambda: hooked(FlowStep(4)),
    "in a sequence": lambda: InSequence(FlowStep(4), Wrong()),
}


@pytest.mark.parametrize("layer", UNDONE_WRONGLY.values(), ids=UNDONE_WRONGLY)
def test_a_layer_that_its_inverse_does_not_undo_is_named(layer: Callable[[], nn.Module]) -> None:
    chain, x = ReversibleChain([FlowStep(4), layer(), FlowStep(4)]), torch.randn(2, 4, 4, 4)
    with pytest.raises(RuntimeError, match=r"layers\.1 .* is not undone .* relative distance of 0"):
        chain(x)
    chain.reversible = False
    chain(x)


@pytest.mark.parametrize("reversible", [False, True])
def test_hooks_of_layers_run(reversible: bool) -> None:
    chain, x = (
        ReversibleChain([FlowStep(4), Squeeze()], reversible=reversible),
        torch.randn(2, 4, 4, 4),
    )
    want = chain(x)[0]
    called: list[str] = []
    for name, layer in chain.layers.named_children():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))  # type: ignore[misc]
    assert_close(chain(x)[0], want, terms=64)
    assert called == ["0", "1"]


@pytest.mark.skipif(KERNELS_ON_CPU, reason="the references give second derivatives")
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", CHAINS)
def test_second_derivatives_are_those_of_stored_states(name: str, backwards: bool) -> None:
    """Of a gradient penalty, with a loss that has a gradient of its own."""
    chain, x = chain_of(name)
    given = tuple(z.detach() for z in parts(chain(x)[0])) if backwards else (x,)
    both = []
    for chain.reversible in (True, False):
        inputs = [z.clone().requires_grad_() for z in given]
        loss = loss_of(*(inverse_of(chain)(*inputs) if backwards else chain(*inputs)))  # type: ignore[misc]
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = loss + sum(g.square().sum() for g in grads)
        leaves = [*inputs, *chain.parameters()]
        found = torch.autograd.grad(penalty, leaves, allow_unused=True)
        both.append([g for g in found if g is not None])
    assert_all_close(*both, terms=(2 * 16 * 64) ** 2)


WITH_CONTEXT: dict[str, list[nn.Module]] = {
    "user's": [
        *(TokenCoupling(4, context=3), LeakyReLU(), Permutation([3, 2, 1, 0])),
        TokenCoupling(4, context=3),
        AffineCoupling(4, width=4, spatial_dims=1, context_channels=3),
    ],
    "levels": [
        FlowStep(4, width=4, spatial_dims=1, context_channels=3),
        Split(4, width=4, spatial_dims=1, context_channels=3),
        FlowStep(2, width=4, spatial_dims=1, context_channels=3),
    ],
}


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("layers", WITH_CONTEXT.values(), ids=WITH_CONTEXT)
def test_a_context_reaches_all_layers(layers: list[nn.Module], backwards: bool) -> None:
    chain = perturbed(ReversibleChain(layers)).double()
    x, context = torch.randn(2, 4, 6).double(), torch.randn(2, 3).double()
    z = tuple(part.detach() for part in parts(chain(x, context)[0]))
    back, _ = inverse_of(chain, context)(*z)  # type: ignore[misc]
    assert_close(back, x, terms=1000)
    given = (*z, context) if backwards else (x, context)
    got, want = both_gradients(chain, *given, backwards=backwards, contexts=1)
    own = len(list(chain.parameters()))
    assert len(got) == 1 + len(given) + own
    assert got[-own - 1].any()
    assert_all_close(got, want, terms=2 * 16 * 64)


PAIRS: tuple[Any, ...] = get_args(get_type_hints(PixelPairs.__init__)["by"])


@pytest.mark.parametrize(
    "layer",
    [
        *(PixelPairs(by, back) for by in PAIRS for back in (False, True)),
        *(Permutation([2, 0, 3, 1]), Permutation(torch.arange(24).flip(0), axis="pixels")),
    ],
    ids=[*(f"{by}{back}" for by in PAIRS for back in ("", ", back")), "channels", "pixels"],
)
def test_rearrangements_keep_the_layout(layer: Bijection) -> None:
    x = torch.randn(2, 4, 4, 6, requires_grad=True)
    z = layer(x)[0]
    z.sum().backward()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(last)[0]
    y.sum().backward()
    assert torch.equal(y, z)
    assert z.is_contiguous()
    for t in (y, last.grad, *layer.inverse(y)[:1]):
        assert t is not None
        assert t.is_contiguous(memory_format=torch.channels_last)


@every_chain
def test_density_and_samples(name: str) -> None:
    chain, x = chain_of(name)
    chain.float()
    samples = chain.sample(2, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (2, *x.shape[1:])
    latents, logdet = chain(samples)
    assert chain.input_shape == x.shape[1:]
    assert chain.latent_shapes == tuple(z.shape[1:] for z in parts(latents))
    squares = [z.square().flatten(1).sum(1) for z in parts(latents)]
    normal = -(sum(squares) + x[0].numel() * torch.log(torch.tensor(2 * torch.pi))) / 2
    assert_close(chain.log_prob(samples), normal + logdet, terms=4 * x[0].numel(), scale=4.0)


def called_one_by_one() -> nn.Module:
    layers = [ActNorm(4), InvertibleConv1x1(4), AffineCoupling(4, width=4), FlowStep(4, width=4)]
    return perturbed(InSequence(*layers)).double()


@compiles
@pytest.mark.parametrize("name", ["images", "tokens", "coarse to fine", "one by one"])
def test_stored_chains_compile_whole(name: str) -> None:
    torch.compiler.reset()
    if name == "one by one":
        model, x = called_one_by_one(), torch.randn(2, 4, 3, 2, dtype=torch.float64)
    else:
        model, x = chain_of(name, reversible=False)
    latents = tuple(part.detach() for part in parts(model(x)[0]))
    for call, inputs in ((model, (x,)), (inverse_of(model), latents)):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        want, got = (gradients(model, *inputs, call=c) for c in (call, compiled))
        assert_all_close(got, want, terms=2 * 16 * 64)


@compiles
def test_a_reversible_chain_says_why_it_does_not_compile_whole() -> None:
    torch.compiler.reset()
    chain, x = chain_of("chain")
    with pytest.raises(Exception, match="with reversible=False, or without fullgraph"):
        torch.compile(chain, backend="aot_eager", fullgraph=True)(x)


class Doubled(AffineCoupling):
    """A subclass that changes what the layer does."""

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, *context)
        return 2 * z, logdet + x[0].numel() * torch.log(torch.tensor(2.0))

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(z / 2, *context)
        return x, logdet - x[0].numel() * torch.log(torch.tensor(2.0))


def test_a_subclass_that_overrides_forward_is_called() -> None:
    layer, x = perturbed(Doubled(4, width=4)), torch.randn(2, 4, 4, 4)
    assert torch.equal(ReversibleChain([layer])(x)[0], layer(x)[0])


class Cut(Bijection):
    """A user's layer that splits off half of any number of channels."""

    def instructions(self) -> list[SplitOff]:
        return [SplitOff()]


def test_a_split_of_any_number_of_channels() -> None:
    """The chain needs a layer with a number of channels neither after the split nor at all."""
    x = torch.randn(2, 4, 4, 4)
    squeezed, _ = Squeeze()(x)
    for layers, latent in (([Cut(), FlowStep(2)], x[:, 2:]), ([Squeeze(), Cut()], squeezed[:, 8:])):
        chain = perturbed(ReversibleChain(layers))
        z, _ = chain(x)
        assert torch.equal(z[0], latent)
        assert_close(chain.inverse(z)[0], x, terms=16)
    with pytest.raises(
        ValueError, match=r"layers\[2\]: expected a multiple of 2 channels, got .* 3"
    ):
        ReversibleChain([Squeeze(), Cut(), FlowStep(3)])
    assert isinstance(SplitOff(3).inverse(), Join)
