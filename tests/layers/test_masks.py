"""Masked chains: padded batches compute what each sequence computes alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import compiles, normal, perturbed
from torch import Tensor, nn

from layers.bijections import LeakyReLU
from layers.chains import assert_all_close, gradients, inverse_of, parts
from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    Bijection,
    FlowStep,
    InvertibleConv1x1,
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
    "mixed": lambda: [
        *(FlowStep(4, **LINE), LeakyReLUOfFrames(), FlowStep(4, scale=None, **LINE), ActNorm(4)),
        *(Split(4, **LINE), SplineCoupling(2, bins=3, **LINE), InvertibleConv1x1(2), ActNorm(2)),
        ReversibleChain([FlowStep(2, coupling="spline", bins=3, **LINE)]),
    ],
}
# The valid frames of each sequence. A sequence can begin after padding.
SPANS = (slice(0, 4), slice(0, 8), slice(4, 6))


class LeakyReLUOfFrames(LeakyReLU):
    """A layer of the caller, which takes the mask and keeps zeros."""

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        assert self.masked is bool(context)
        assert not self.masked or not (x * (1 - context[0])).any()
        return super().forward(x)


def chain_of(name: str, **options: object) -> ReversibleChain:
    torch.manual_seed(0)
    return perturbed(ReversibleChain(CHAINS[name](), **options)).double()  # type: ignore[arg-type]


def batch(*spans: slice) -> tuple[Tensor, Tensor]:
    """A padded batch (N, 4, 8), with NaN at padding, which nothing may read, and its mask."""
    spans = spans or SPANS
    mask = torch.zeros(len(spans), 1, 8, dtype=torch.bool)
    for own, span in zip(mask, spans, strict=True):
        own[:, span] = True
    return normal(len(spans), 4, 8).double().masked_fill(~mask, torch.nan), mask


def zeroed(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0)


def one_by_one(call: Callable[..., Any]) -> Callable[..., tuple[tuple[Tensor, ...], Tensor]]:
    """A function of padded states that calls a chain without a mask on each sequence alone."""

    def run(*states: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        results, logdets = [], []
        for i, span in enumerate(SPANS):
            z, logdet = call(*(state[i : i + 1, :, span] for state in states))
            around = span.start, 8 - span.stop
            results.append([nn.functional.pad(part, around) for part in parts(z)])
            logdets.append(logdet)
        return tuple(torch.cat(column) for column in zip(*results, strict=True)), torch.cat(logdets)

    return run


# Masks are applied between launches, so interpreters run one chain of all kinds of layers.
@pytest.mark.parametrize("name", ["mixed"] if KERNELS_ON_CPU else CHAINS)
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_a_padded_batch_is_its_sequences(name: str, backwards: bool) -> None:
    """Latents, log-determinants and gradients of rebuilt and of stored states: padding is zero, has
    no gradient and adds none."""
    x, mask = batch()
    plain = chain_of(name, reversible=False)
    z, _ = chain_of(name, masked=True)(x, mask)
    given = parts(z) if backwards else (x,)
    inputs = [t.detach().masked_fill(~mask, torch.nan) for t in given]

    def call(chain: ReversibleChain) -> Callable[..., Any]:
        return inverse_of(chain, mask) if backwards else lambda x: chain(x, mask)

    alone = one_by_one(inverse_of(plain) if backwards else plain)
    want = gradients(plain, *inputs, call=alone)
    for every in (2,) if KERNELS_ON_CPU else (None, 2):
        for reversible in (False, True):
            how = {"reversible": reversible, "checkpoint_every": every, "masked": True}
            chain = chain_of(name, **how)
            for _ in range(2):  # the first pass compares both runs, the second trusts them
                assert_all_close(gradients(chain, *inputs, call=call(chain)), want, terms=4096)
            assert not reversible or chain.drift < 1e-12  # type: ignore[operator]
    (found, logdet), (expected, own_logdet) = call(chain)(*inputs), alone(*inputs)
    for got, padded in zip(parts(found), expected, strict=True):
        assert_close(got, padded, terms=1000)
    assert_close(logdet, own_logdet, terms=1000, scale=10.0)


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
        return tuple(map(self._packed, z)) if isinstance(z, tuple) else self._packed(z), logdet

    def inverse(self, z: Tensor | tuple[Tensor, ...], *_: Tensor) -> tuple[Tensor, Tensor]:
        state = tuple(map(self._unpacked, parts(z)))
        x, logdet = inverse_of(self.chain, self.mask[: len(state[0])])(*state)
        return self._packed(x), logdet


@pytest.mark.skipif(KERNELS_ON_CPU, reason="many small samples, and the interpreter adds nothing")
@pytest.mark.parametrize("name", CHAINS)
def test_masks_with_holes_keep_the_contract_of_a_bijection(name: str) -> None:
    pairs = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool).repeat_interleave(2, 1)
    check_bijection(Packed(ReversibleChain(CHAINS[name](), masked=True), pairs[:, None]), (2, 4, 4))


@compiles
def test_stored_chains_compile_whole() -> None:
    torch.compiler.reset()
    layers = [FlowStep(4, **LINE), SplineCoupling(4, bins=3, **LINE)]
    chain = perturbed(ReversibleChain(layers, masked=True, reversible=False)).double()
    x, mask = batch()
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
    mask[0, :, :2], mask[1, :, :, 2:] = True, True
    x = normal(2, 4, 4, 4)
    torch.manual_seed(0)
    layers = [Squeeze(), FlowStep(16, width=4), Unsqueeze(), FlowStep(4, width=4)]
    plain = perturbed(ReversibleChain(layers))
    chain = ReversibleChain(copy.deepcopy(layers), masked=True)
    z, logdet = chain(x, mask)
    assert_close(chain.inverse(z, mask)[0], x * mask, terms=1000)
    upper, right = plain(x[:1, :, :2]), plain(x[1:, :, :, 2:])
    assert_close(z[:1, :, :2], upper[0], terms=1000)
    assert_close(z[1:, :, :, 2:], right[0], terms=1000)
    assert_close(logdet, torch.cat([upper[1], right[1]]), terms=1000, scale=10.0)


@pytest.mark.parametrize("layers", [[ActNorm(4)], [FlowStep(4, **LINE)]], ids=["actnorm", "step"])
def test_initialization_counts_valid_frames(layers: list[nn.Module]) -> None:
    x, mask = batch()
    plain = copy.deepcopy(layers[0]).double()
    frames = x.movedim(1, -1)[mask[:, 0]].T[None]
    plain.initialize(frames)  # type: ignore[operator]
    chain = ReversibleChain(layers, masked=True).double()
    chain.initialize(x, mask)
    for name, value in plain.state_dict().items():
        assert_close(chain.layers[0].state_dict()[name].double(), value.double(), terms=14)


def test_density_and_samples_have_no_padding() -> None:
    plain = chain_of("step", input_shape=(4, 8))
    chain = chain_of("step", input_shape=(4, 8), masked=True)
    x, mask = batch(slice(8), slice(8), slice(5))
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
