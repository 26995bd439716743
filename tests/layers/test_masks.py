"""Masked chains: padded batches compute what each sequence computes alone."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import compiles, normal, perturbed
from torch import Tensor, nn

from layers.bijections import LeakyReLU
from layers.chains import assert_all_close, gradients
from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    Bijection,
    FlowStep,
    InvertibleConv1x1,
    ManifoldFlow,
    Permutation,
    PixelPairs,
    ReversibleChain,
    ScaleFunction,
    SplineCoupling,
    Split,
    Squeeze,
    Unsqueeze,
)
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.testing import assert_close, check_bijection

Layers = Callable[[], list[nn.Module]]
LINE = {"width": 4, "spatial_dims": 1}
SCALES = ["tanh", "exp", ScaleFunction("sigmoid", eps=1e-6), "sigmoid", "softplus", None]


class Net(nn.Module):
    """A network of the caller, which gets the mask first. Its input is zero at padding, so a single
    convolution needs no mask, though its bias fills padding."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None, *_: Tensor) -> Tensor:
        return self.conv(x).tanh()


CHAINS: dict[str, Layers] = {
    "actnorm": lambda: [ActNorm(4)],
    "conv1x1": lambda: [InvertibleConv1x1(4)],
    "grouped conv1x1": lambda: [InvertibleConv1x1(4, n_split=2)],
    **{
        f"coupling, {i}": lambda scale=scale: [AffineCoupling(4, scale=scale, **LINE)]  # type: ignore[misc]
        for i, scale in enumerate(SCALES)
    },
    "spline": lambda: [SplineCoupling(4, bins=3, **LINE)],
    "step": lambda: [FlowStep(4, **LINE)],
    "user's network": lambda: [FlowStep(4, Net(2, 4))],
    "split": lambda: [Split(4, **LINE)],
    "Glow-TTS": lambda: [
        PixelPairs("neighbours"),
        *(
            layer
            for _ in range(3)
            for layer in (
                ActNorm(8),
                InvertibleConv1x1(8, n_split=4),
                AffineCoupling(8, scale=ScaleFunction("exp", order="scale-shift"), **LINE),
            )
        ),
        PixelPairs("neighbours", inverted=True),
    ],
    "VITS": lambda: [
        layer
        for _ in range(3)
        for layer in (AffineCoupling(4, scale=None, **LINE), Permutation([3, 2, 1, 0]))
    ],
    "mixed": lambda: [
        *(FlowStep(4, **LINE), LeakyReLUOfFrames(), FlowStep(4, scale=None, **LINE), ActNorm(4)),
        *(Split(4, **LINE), SplineCoupling(2, bins=3, **LINE), InvertibleConv1x1(2), ActNorm(2)),
        ReversibleChain([FlowStep(2, coupling="spline", bins=3, **LINE)]),
    ],
}
LENGTHS = (4, 8, 2)
every_chain = pytest.mark.parametrize("name", CHAINS)


class LeakyReLUOfFrames(LeakyReLU):
    """A layer of the caller, which takes the mask and keeps zeros."""

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        assert self.masked is bool(context)
        assert not self.masked or not (x * (1 - context[0])).any()
        return super().forward(x)


def chain_of(name: str, **options: object) -> ReversibleChain:
    torch.manual_seed(0)
    return perturbed(ReversibleChain(CHAINS[name](), **options)).double()  # type: ignore[arg-type]


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """A padded batch (N, 4, 8), with NaN at padding, which nothing may read, and its mask."""
    mask = torch.arange(8) < torch.tensor(lengths)[:, None, None]
    return normal(len(lengths), 4, 8).double().masked_fill(~mask, torch.nan), mask


def zeroed(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0)


def alone(chain: ReversibleChain, x: Tensor, inverse: bool = False) -> tuple[Tensor, ...]:
    """The latents and logdet of one sequence (1, C, T) by the chain without a mask."""
    z, logdet = chain.inverse(x) if inverse else chain(x)
    return (*z, logdet) if isinstance(z, tuple) else (z, logdet)


@every_chain
def test_a_padded_batch_is_its_sequences(name: str) -> None:
    plain, chain = chain_of(name, reversible=False), chain_of(name, masked=True)
    x, mask = batch()
    z, logdet = chain(x, mask)
    back, negative = chain.inverse(z, mask)
    stored = z if isinstance(z, tuple) else (z,)
    assert_close(back, zeroed(x, mask), terms=1000)
    assert_close(negative, -logdet, terms=1000)
    for state in (*stored, back):
        assert not (state * ~mask).any()
    for i, length in enumerate(LENGTHS):
        *latents, own_logdet = alone(plain, x[i : i + 1, :, :length])
        for got, want in zip(stored, latents, strict=True):
            assert_close(got[i : i + 1, :, :length], want, terms=1000)
        assert_close(logdet[i : i + 1], own_logdet, terms=1000, scale=10.0)


# Masks are applied between launches, so interpreters run one chain of all kinds of layers.
@pytest.mark.parametrize("name", ["mixed"] if KERNELS_ON_CPU else CHAINS)
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_gradients_are_those_of_the_sequences(name: str, backwards: bool) -> None:
    """Padding has no gradient and adds none, with rebuilt and with stored states."""
    x, mask = batch()
    plain = chain_of(name, reversible=False)
    z, _ = chain_of(name, masked=True)(x, mask)
    given = z if isinstance(z, tuple) and backwards else (z,) if backwards else (x,)
    inputs = [t.detach().masked_fill(~mask, torch.nan) for t in given]  # type: ignore[union-attr]

    def call(chain: ReversibleChain) -> Callable[..., object]:
        def run(*states: Tensor) -> object:
            state = states if len(states) > 1 else states[0]
            return chain.inverse(state, mask) if backwards else chain(state, mask)

        return run

    def sequences(*states: Tensor) -> tuple[Tensor, Tensor]:
        parts, logdets = [], []
        for i, length in enumerate(LENGTHS):
            own = tuple(state[i : i + 1, :, :length] for state in states)
            *latents, logdet = alone(plain, own if len(own) > 1 else own[0], backwards)  # type: ignore[arg-type]
            parts.append([nn.functional.pad(part, (0, 8 - length)) for part in latents])
            logdets.append(logdet)
        padded = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return (padded if len(padded) > 1 else padded[0]), torch.cat(logdets)  # type: ignore[return-value]

    want = gradients(plain, *inputs, call=sequences)
    for every in (2,) if KERNELS_ON_CPU else (None, 2):
        for reversible in (False, True):
            how = {"reversible": reversible, "checkpoint_every": every, "masked": True}
            chain = chain_of(name, **how)
            for _ in range(2):  # the first pass compares both runs, the second trusts them
                assert_all_close(gradients(chain, *inputs, call=call(chain)), want, terms=4096)
            assert not reversible or chain.drift < 1e-12  # type: ignore[operator]


class Packed(Bijection):
    """A masked chain as a bijection of the valid frames (N, C, M), which stand anywhere."""

    def __init__(self, chain: ReversibleChain, mask: Tensor) -> None:
        super().__init__()
        self.chain, self.mask = chain, mask

    def _unpacked(self, x: Tensor) -> Tensor:
        mask = self.mask[: len(x)].expand(-1, x.shape[1], -1)
        return x.new_full(mask.shape, 3.0).masked_scatter(mask, x)

    def _packed(self, x: Tensor) -> Tensor:
        return x[self.mask[: len(x)].expand_as(x)].view(*x.shape[:2], -1)

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        z, logdet = self.chain(self._unpacked(x), self.mask[: len(x)])
        parts = tuple(map(self._packed, z)) if isinstance(z, tuple) else self._packed(z)
        return parts, logdet

    def inverse(self, z: Tensor | tuple[Tensor, ...], *_: Tensor) -> tuple[Tensor, Tensor]:
        state = tuple(map(self._unpacked, z)) if isinstance(z, tuple) else self._unpacked(z)
        n = len(z[0]) if isinstance(z, tuple) else len(z)
        x, logdet = self.chain.inverse(state, self.mask[:n])
        return self._packed(x), logdet


@pytest.mark.skipif(KERNELS_ON_CPU, reason="many small samples, and the interpreter adds nothing")
@every_chain
def test_the_contract_of_a_bijection(name: str) -> None:
    pairs = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool).repeat_interleave(2, 1)
    check_bijection(Packed(ReversibleChain(CHAINS[name](), masked=True), pairs[:, None]), (2, 4, 4))


@compiles
@pytest.mark.parametrize("name", ["step", "spline"])
def test_stored_chains_compile_whole(name: str) -> None:
    torch.compiler.reset()
    chain, (x, mask) = chain_of(name, masked=True, reversible=False), batch()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    calls = (lambda x: chain(x, mask)), (lambda x: compiled(x, mask))
    want, got = (gradients(chain, x, call=call) for call in calls)
    assert_all_close(got, want, terms=4096)


def test_autocast_rounds_networks_only() -> None:
    chain, (x, mask) = chain_of("Glow-TTS", masked=True).float(), batch()
    exact, _ = chain(x.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = chain(x.float(), mask)
        logdet.sum().backward()
    assert z.dtype == logdet.dtype == torch.float32
    assert not (z * ~mask).any()
    assert_close(z.bfloat16(), exact, terms=1000)
    assert chain.drift is not None
    assert chain.drift < 1e-5


def test_images_of_different_sizes() -> None:
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[0, :, :2], mask[1, :, :, :2] = True, True
    x = normal(2, 4, 4, 4)
    torch.manual_seed(0)
    layers = [Squeeze(), FlowStep(16, width=4), Unsqueeze(), FlowStep(4, width=4)]
    plain = perturbed(ReversibleChain(layers))
    chain = ReversibleChain(copy.deepcopy(layers), masked=True)
    z, logdet = chain(x, mask)
    assert_close(chain.inverse(z, mask)[0], x * mask, terms=1000)
    for i, own in enumerate((x[:1, :, :2], x[1:, :, :, :2])):
        want, own_logdet = plain(own)
        assert_close(z[i : i + 1, :, : own.shape[2], : own.shape[3]], want, terms=1000)
        assert_close(logdet[i : i + 1], own_logdet, terms=1000, scale=10.0)


@pytest.mark.parametrize("layers", [[ActNorm(4)], [FlowStep(4, **LINE)]], ids=["actnorm", "step"])
def test_initialization_counts_valid_frames(layers: list[nn.Module]) -> None:
    x, mask = batch()
    plain = copy.deepcopy(layers[0]).double()
    frames = x.movedim(1, -1)[mask[:, 0]].T[None]
    plain.initialize(frames)  # type: ignore[operator]
    chain = ReversibleChain(layers, masked=True).double()
    chain.initialize(x, mask)
    for name, value in plain.state_dict().items():
        assert torch.equal(chain.layers[0].state_dict()[name], value), name


def test_density_and_samples_have_no_padding() -> None:
    plain = chain_of("step", input_shape=(4, 8))
    chain = chain_of("step", input_shape=(4, 8), masked=True)
    x, mask = batch((8, 8, 5))
    assert_close(chain.log_prob(x, context=mask)[:2], plain.log_prob(x)[:2], terms=1000)
    other = x.clone()
    other[2, :, 5:] = 7
    assert torch.equal(chain.log_prob(other, context=mask), chain.log_prob(x, context=mask))
    short = chain_of("step").log_prob(x[2:, :, :5])
    assert_close(chain.log_prob(x, context=(mask,))[2:], short, terms=1000)
    samples, log_prob = chain.sample_and_log_prob(3, context=mask[2:])
    assert not samples[:, :, 5:].any()
    assert samples[:, :, :5].all()
    assert_close(log_prob, chain.log_prob(samples, context=mask[2:]), terms=1000)


def test_a_context_comes_after_the_mask() -> None:
    layers = [FlowStep(4, context_channels=3, **LINE) for _ in range(2)]
    chain = perturbed(ReversibleChain(layers, masked=True)).double()
    (x, mask), context = batch(), normal(3, 3).double()
    z, _ = chain(x, mask, context)
    assert_close(chain.inverse(z, mask, context)[0], zeroed(x, mask), terms=1000)
    assert not torch.equal(chain(x, mask, 2 * context)[0], z)
    value = chain.log_prob(x, context=(mask, context))
    assert torch.equal(value, chain.log_prob(x, context=(mask.double(), context)))


def test_a_saved_chain_is_masked(tmp_path: Path) -> None:
    chain = perturbed(ReversibleChain(CHAINS["Glow-TTS"](), masked=True))
    chain.save_pretrained(tmp_path / "model")
    loaded = ReversibleChain.from_pretrained(tmp_path / "model")
    x, mask = batch()
    assert torch.equal(loaded(x.float(), mask)[0], chain.eval()(x.float(), mask)[0])


MASK = torch.ones(2, 1, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ((), TypeError, r"mask: expected a tensor \(N, 1, \*spatial\) after the state, got none"),
        ((None,), TypeError, "mask: expected a torch.Tensor, got NoneType"),
        ((MASK.long(),), TypeError, "mask: expected dtype bool, float32, .* got int64"),
        ((MASK[:, 0],), ValueError,
         r"mask: expected shape \(2, 1, 8\) for a state \(2, 4, 8\), got \(2, 8\)"),
        ((MASK[:1],), ValueError, r"expected shape \(2, 1, 8\) .*, got \(1, 1, 8\)"),
        ((MASK.expand(2, 4, 8),), ValueError, r"expected shape \(2, 1, 8\) .*, got \(2, 4, 8\)"),
        ((MASK[:, :, :7],), ValueError, r"expected shape \(2, 1, 8\) .*, got \(2, 1, 7\)"),
        ((MASK / 2,), ValueError, "mask: expected only 0 and 1, got other values"),
        ((MASK.to("meta"),), ValueError, "mask: expected device cpu, got meta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["actnorm", "conv1x1", "coupling, 0", "spline", "step"])
def test_bad_masks(name: str, mask: tuple[Tensor, ...], error: type[Exception], words: str) -> None:
    chain = ReversibleChain(CHAINS[name](), masked=True)
    (layer,) = chain.layers
    for call in (chain, chain.inverse, chain.initialize, layer, layer.inverse, layer.initialize):
        with pytest.raises(error, match=words):
            call(torch.zeros(2, 4, 8), *mask)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ReversibleChain([ReversibleChain([ActNorm(2)], masked=True)]), ValueError,
         r"layers\[0\]: it is masked, so the chain needs masked=True"),
        (lambda: ReversibleChain([PixelPairs("halves")], masked=True), ValueError,
         r"layers\[0\]: expected a layer that keeps the order of frames, got PixelPairs"),
        (lambda: ReversibleChain([Permutation([1, 0], axis="pixels")], masked=True), ValueError,
         r"layers\[0\]: expected a layer that keeps the order of frames, got Permutation"),
        (lambda: chain_of("Glow-TTS", masked=True)(*batch((3, 8))), ValueError,
         "mask: expected blocks of 2 frames that are all valid or all padding"),
        (lambda: ManifoldFlow(ReversibleChain([ActNorm(2)], masked=True, input_shape=(2, 4)), 3),
         ValueError, "flow: expected a flow without a mask, got one with masked=True"),
        (lambda: InvertibleConv1x1(4, n_split=3), ValueError,
         "n_split: expected an even divisor of 4 channels, got 3"),
        (lambda: InvertibleConv1x1(6, n_split=4), ValueError, "got 4"),
        (lambda: InvertibleConv1x1(6, n_split=0), ValueError, "n_split: expected 2 to 6, got 0"),
        (lambda: AffineCoupling(4, Net(2, 4), scale=None)(torch.zeros(1, 4, 8)), ValueError,
         r"net's output: expected shape \(1, 2, 8\), got \(1, 4, 8\)"),
        (lambda: ReversibleChain([AffineCoupling(4, Net(2, 4), scale=ScaleFunction(
            "sigmoid", eps=1.0))], masked=True)(torch.zeros(2, 4, 8), MASK), ValueError,
         "scale.eps: expected less than 1 for a mask, got 1.0"),
    ],
)  # fmt: skip
def test_bad_input(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
