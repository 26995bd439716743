"""The layers that a chain accepts: those of users, and errors for the others."""

from collections.abc import Callable

import pytest
import torch
from cases import perturbed
from torch import Tensor, nn

from layers.chains import assert_all_close, both_gradients
from mflow_kernels import ActNorm, FlowStep, InvertibleConv1x1, ReversibleChain, Split, Squeeze
from mflow_kernels.layers.chain_layer import ChainLayer
from mflow_kernels.layers.folding import ActNormConv
from mflow_kernels.reversible.program import SpaceToDepth, SplitOff
from mflow_kernels.testing import assert_close


class LinearStep(ChainLayer):
    """A user's layer: actnorm and 1x1 convolution without a coupling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.actnorm, self.conv = ActNorm(channels), InvertibleConv1x1(channels)

    @property
    def channels(self) -> int:
        return len(self.actnorm.bias)

    def instructions(self) -> list[ActNormConv]:
        return [ActNormConv(self.actnorm, self.conv)]

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = self.actnorm(x)
        z, added = self.conv(y)
        return z, logdet + added


def test_a_layer_of_the_user_in_a_chain() -> None:
    """A `ChainLayer` runs at the start, in the middle and at the end, and has gradients."""
    linear = [LinearStep(c) for c in (4, 4, 16, 8)]
    layers = [linear[0], FlowStep(4, width=4), linear[1], Squeeze()]
    layers += [linear[2], Split(16, width=4), linear[3]]
    stored = perturbed(ReversibleChain(layers, reversible=False)).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert_close(linear[0](x)[0], ReversibleChain(linear[:1])(x)[0], terms=16)
    got, want = both_gradients(stored, x)
    assert len(got) == 2 + len(list(stored.parameters()))
    assert_all_close(got, want, terms=2 * 7 * 32)
    z, _ = stored(x)
    assert_close(stored.inverse(z)[0], x, terms=2 * 7 * 16)
    with pytest.raises(
        ValueError, match=r"layers\[1\]: expected a layer of 4 channels, got one of"
    ):
        ReversibleChain([linear[0], LinearStep(5)])


class Cut(ChainLayer):
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


class Unsqueeze(ChainLayer):
    """A user's layer that a chain does not support."""

    def instructions(self) -> list[SpaceToDepth]:
        return [SpaceToDepth(inverse=True)]


def test_a_layer_that_undoes_a_squeeze_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SpaceToDepth\(inverse=False\), got inverse=True"):
        ReversibleChain([Squeeze(), Unsqueeze()])(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ReversibleChain([]), ValueError, "layers: expected at least one"),
        (lambda: ReversibleChain([nn.ReLU()]), TypeError, r"layers\[0\].*got ReLU"),  # type: ignore[list-item]
        (lambda: ReversibleChain([Squeeze()], checkpoint_every=0), ValueError, "got 0"),
        (lambda: ReversibleChain([Split(4)]).inverse((torch.zeros(1, 2, 2, 2),)), ValueError,
         "expected 2 latents, got 1"),
        (lambda: ReversibleChain([Squeeze()], checkpoint_every=1.5), TypeError,
         "checkpoint_every: expected a whole number, got float"),
        (lambda: ReversibleChain([FlowStep(4), Split(4), FlowStep(4)]), ValueError,
         r"layers\[2\]: expected a layer of 2 channels, got one of 4"),
        (lambda: ReversibleChain([Squeeze(), FlowStep(6)]), ValueError,
         r"layers\[1\]: expected a multiple of 4 channels, got one of 6"),
    ],
)  # fmt: skip
def test_bad_input(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
