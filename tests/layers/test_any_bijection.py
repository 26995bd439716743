"""Every invertible layer in a chain: those of this package and those of users, alone and together,
reversible and stored, with context."""

import copy
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
from cases import compiles, perturbed
from torch import Tensor, nn

from layers.bijections import LeakyReLU, TokenCoupling
from layers.chains import assert_all_close, both_gradients, gradients
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
    Unsqueeze,
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
    chain = ReversibleChain(make(), input_shape=shape[1:], **options)  # type: ignore[arg-type]
    return perturbed(chain).double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.skipif(KERNELS_ON_CPU, reason="test_bijection.py runs the kernels of each layer")
@pytest.mark.parametrize("name", [*USERS, *TOGETHER])
def test_round_trip_jacobian_and_logdet(name: str) -> None:
    chain, x = chain_of(name)
    check_bijection(chain, tuple(x.shape))


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 2) for name in (TOGETHER if KERNELS_ON_CPU else CHAINS)),
        *((name, every) for name in TOGETHER for every in (None, 1) if not KERNELS_ON_CPU),
    ],
)
def test_gradients_are_those_of_stored_states(
    name: str, backwards: bool, every: int | None
) -> None:
    stored, x = chain_of(name, reversible=False, checkpoint_every=every)
    z, _ = stored(x)
    inputs = z if isinstance(z, tuple) else (z,)
    inputs = tuple(t.detach() for t in inputs) if backwards else (x,)
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible = True

    def run(chain: ReversibleChain) -> list[Tensor]:
        inverse = lambda *z: chain.inverse(z if isinstance(stored(x)[0], tuple) else z[0])  # noqa: E731
        return gradients(chain, *inputs, call=inverse if backwards else chain)

    for _ in range(2):  # the first pass compares both runs, the second trusts them
        assert_all_close(run(rebuilt), run(stored), terms=2 * 16 * 64)
    assert rebuilt.drift is not None
    assert rebuilt.drift < 1e-12


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_a_context_reaches_users_layers(backwards: bool) -> None:
    layers = [
        *(TokenCoupling(4, context=3), LeakyReLU(), Permutation([3, 2, 1, 0])),
        *(
            TokenCoupling(4, context=3),
            AffineCoupling(4, width=4, spatial_dims=1, context_channels=3),
        ),
    ]
    stored = perturbed(ReversibleChain(layers, reversible=False)).double()
    x, context = torch.randn(2, 4, 6).double(), torch.randn(2, 3).double()
    got, want = both_gradients(stored, x, context, inverse=backwards)
    assert len(got) == 3 + len(list(stored.parameters()))
    assert got[2].any()
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
    squares = [
        z.square().flatten(1).sum(1) for z in (latents if type(latents) is tuple else [latents])
    ]
    normal = -(sum(squares) + x[0].numel() * torch.log(torch.tensor(2 * torch.pi))) / 2
    assert_close(chain.log_prob(samples), normal + logdet, terms=4 * x[0].numel(), scale=4.0)


@compiles
@pytest.mark.parametrize("name", ["images", "tokens", "coarse to fine", "a chain in a chain"])
def test_stored_chains_compile_whole(name: str) -> None:
    torch.compiler.reset()
    chain, x = chain_of(name, reversible=False)
    z = chain(x)[0]
    latents = tuple(part.detach() for part in (z if isinstance(z, tuple) else (z,)))
    inverse = lambda *z: chain.inverse(z if len(z) > 1 else z[0])  # noqa: E731
    for call, inputs in ((chain, (x,)), (inverse, latents)):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        want, got = (gradients(chain, *inputs, call=c) for c in (call, compiled))
        assert_all_close(got, want, terms=2 * 16 * 64)


@compiles
def test_a_reversible_chain_says_why_it_does_not_compile_whole() -> None:
    torch.compiler.reset()
    chain, x = chain_of("images")
    with pytest.raises(Exception, match="compile with reversible=False, or without fullgraph"):
        torch.compile(chain, backend="aot_eager", fullgraph=True)(x)


def test_neighbours_share_launches() -> None:
    """Actnorm, 1x1 convolution and coupling compute as a step of flow, in as few launches."""
    apart = [
        layer
        for _ in range(3)
        for layer in (ActNorm(4), InvertibleConv1x1(4), AffineCoupling(4, width=4))
    ]
    chain = perturbed(ReversibleChain(apart)).double()
    (instruction,) = chain._program().instructions
    assert len(instruction.steps) == 3  # type: ignore[attr-defined]
    steps = ReversibleChain([FlowStep(4, width=4) for _ in range(3)]).double()
    for i, step in enumerate(steps.layers):
        parts = step.actnorm, step.conv, step.coupling
        for part, layer in zip(parts, apart[3 * i : 3 * i + 3], strict=True):
            part.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for got, want in zip(chain(x), steps(x), strict=True):
        assert torch.equal(got, want)


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


class Returns(Bijection):
    def __init__(self, result: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return self.result(x)  # type: ignore[return-value]

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x: x, r"layers.1 \(Returns\): expected \(z, logdet\), got Tensor"),
        (lambda x: ((x, x), x), r"layers.1 \(Returns\): expected a state of 2 samples, got tuple"),
        (
            lambda x: (x, x),
            r"layers.1 \(Returns\): expected a logdet of shape \(2,\), got \(2, 4\)",
        ),
    ],
)
def test_what_a_layer_must_return(
    reversible: bool, result: Callable[[Tensor], object], words: str
) -> None:
    chain = ReversibleChain([LeakyReLU(), Returns(result)], reversible=reversible)
    with pytest.raises(TypeError, match=words):
        chain(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ReversibleChain([]), ValueError, "layers: expected at least one"),
        (lambda: ReversibleChain([nn.ReLU()]), TypeError,
         r"layers\[0\]: expected a Bijection or another module with an `inverse`, got ReLU"),
        (lambda: ReversibleChain([Squeeze()], checkpoint_every=0), ValueError, "got 0"),
        (lambda: ReversibleChain([Split(4)]).inverse((torch.zeros(1, 2, 2, 2),)), ValueError,
         "expected 2 latents, got 1"),
        (lambda: ReversibleChain([Squeeze()], checkpoint_every=1.5), TypeError,
         "checkpoint_every: expected a whole number, got float"),
        (lambda: ReversibleChain([FlowStep(4), Split(4), FlowStep(4)]), ValueError,
         r"layers\[2\]: expected a layer of 2 channels, got one of 4"),
        (lambda: ReversibleChain([Squeeze(), FlowStep(6)]), ValueError,
         r"layers\[1\]: expected a multiple of 4 channels, got one of 6"),
        (lambda: ReversibleChain([FlowStep(6), Unsqueeze()]), ValueError,
         r"layers\[1\]: cannot take 6 channels"),
        (lambda: ReversibleChain([Permutation([1, 0]), FlowStep(3)]), ValueError,
         r"layers\[1\]: expected a layer of 2 channels, got one of 3"),
        (lambda: Permutation([0, 0, 1]), ValueError, "index: expected each of 0 to n - 1 once"),
        (lambda: Permutation([0], axis="rows"), ValueError, "axis: expected one of"),
        (lambda: Permutation([1, 0], axis="pixels")(torch.zeros(1, 2, 3)), ValueError,
         "x: expected 2 pixels"),
        (lambda: PixelPairs("rows"), ValueError, "by: expected one of checkerboard, halves, n"),
        (lambda: PixelPairs("halves")(torch.zeros(1, 2, 3)), ValueError, "an even last axis"),
        (lambda: FlowStep(4, coupling="cubic"), ValueError,
         "coupling: expected one of affine, spline"),
        (lambda: Split(4, kept=4), ValueError, "kept: expected 1 to 3, got 4"),
    ],
)  # fmt: skip
def test_bad_input(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
