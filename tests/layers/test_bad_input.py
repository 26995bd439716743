"""Wrong arguments, states, masks and contexts raise an error that names them, before any network
runs."""

from collections.abc import Callable

import pytest
import torch
from cases import normal
from torch import Tensor, nn

from layers.bijections import LeakyReLU
from layers.chains import levels
from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    FlowStep,
    Glow,
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
    VectorFlow,
)

IMAGE, HALF, FRAMES = torch.zeros(2, 4, 4, 4), torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 8)
MASK, ODD = torch.ones(2, 1, 8, dtype=torch.bool), torch.arange(8) < 3
LINE = {"width": 4, "spatial_dims": 1}

COUPLED = {
    "coupling": lambda: AffineCoupling(4, width=4),
    "step": lambda: FlowStep(4, width=4),
    "chain": lambda: ReversibleChain([FlowStep(4, width=4) for _ in range(2)]),
    "split": lambda: Split(4, width=4),
}
PLAIN = {"actnorm": lambda: ActNorm(4), "conv1x1": lambda: InvertibleConv1x1(4)}
STATES = [
    (torch.zeros(2, 6, 4, 4), ValueError, r"shape \(N, 4, .*, got \(2, 6, 4, 4\)"),
    (torch.zeros(4), ValueError, r"shape \(N, C, \*spatial\), got \(4,\)"),
    (torch.zeros(2, 4, 0, 4), ValueError, "no empty channel or spatial axis"),
    (IMAGE.long(), TypeError, "dtype float32, .*, got int64"),
    (IMAGE.to("meta"), ValueError, "device cpu, got meta"),
    ([1.0], TypeError, "a torch.Tensor, got list"),
]
STATES_OF_NETWORKS = [
    (torch.zeros(2, 4), ValueError, r"\(N, 4, H, W\), got \(2, 4\); spatial_dims=0 makes"),
    (torch.zeros(2, 4, 4), ValueError, r"\(N, 4, H, W\), got \(2, 4, 4\); spatial_dims=1"),
    (IMAGE.double(), TypeError, "the network's dtype float32, got float64"),
    (IMAGE.half(), TypeError, "the network's dtype float32, got float16"),
]


@pytest.mark.parametrize("call", ["forward", "inverse", "initialize"])
@pytest.mark.parametrize("name", [*PLAIN, *COUPLED])
def test_states(name: str, call: str) -> None:
    if (name, call) == ("split", "inverse"):
        pytest.skip("it takes a tuple")
    argument = "z" if call == "inverse" else "x"
    for state, error, words in [*STATES, *(STATES_OF_NETWORKS if name in COUPLED else [])]:
        layer = (PLAIN | COUPLED)[name]()
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda *_: pytest.fail("a network ran"))
        with pytest.raises(error, match=f"^{argument}: .*{words}"):
            getattr(layer, call)(state)
        assert not any(m.initialized for m in layer.modules() if isinstance(m, ActNorm))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ((), TypeError, r"a tensor \(N, 1, \*spatial\) after the state, got none"),
        ((None,), TypeError, "a torch.Tensor, got NoneType"),
        ((MASK.long(),), TypeError, "got int64"),
        ((MASK[:, 0],), ValueError, r"shape \(2, 1, 8\) .*, got \(2, 8\)"),
        ((MASK[:1],), ValueError, r"shape \(2, 1, 8\) .*, got \(1, 1, 8\)"),
        ((MASK.expand(2, 4, 8),), ValueError, r"shape \(2, 1, 8\) .*, got \(2, 4, 8\)"),
        ((MASK[:, :, :7],), ValueError, r"shape \(2, 1, 8\) .*, got \(2, 1, 7\)"),
        ((MASK / 2,), ValueError, "only 0 and 1"),
        ((MASK.to("meta"),), ValueError, "device cpu, got meta"),
    ],
)
def test_masks(mask: tuple[Tensor, ...], error: type[Exception], words: str) -> None:
    for layer in (
        *(ActNorm(4), InvertibleConv1x1(4), AffineCoupling(4, **LINE), FlowStep(4, **LINE)),
        SplineCoupling(4, bins=3, **LINE),
    ):
        chain = ReversibleChain([layer], masked=True)
        for module in (chain, layer):
            for call in (module, module.inverse, module.initialize):
                with pytest.raises(error, match=f"mask: expected .*{words}"):
                    call(FRAMES, *mask)


def glow(**options: object) -> Glow:
    return Glow((1, 4, 4), 1, 1, 4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("channels", "context", "error", "words"),
    [
        (0, torch.ones(2, 3), TypeError, "none, .* no context_channels"),
        (0, torch.tensor([0, 1]), TypeError, "none, .* no context_channels"),
        (3, None, TypeError, r"classes, vectors \(N, 3\) or maps, got none"),
        (3, torch.ones(2, 4), ValueError, r"shape \(2, 3\) or .*, got \(2, 4\)"),
        (3, torch.ones(1, 4), ValueError, r"shape \(2, 3\) or .*, got \(2, 4\)"),
        (3, torch.ones(2, 3, 3, 4), ValueError, r".*multiples of the sides \(2, 2\), got \(2, 3,"),
        (3, torch.tensor([0, 3]), ValueError, "classes from 0 to 2, got 0 to 3"),
        (3, torch.tensor([1, 1, 1]), ValueError, r"one class .*got \(3,\)"),
        (3, 3, ValueError, "classes from 0 to 2, got 3 to 3"),
        (3, [0, 1], TypeError, "a torch.Tensor, got list"),
    ],
)
def test_contexts(channels: int, context: object, error: type[Exception], words: str) -> None:
    flow, x = glow(context_channels=channels), normal(2, 1, 4, 4)
    for call in (flow, flow.initialize, flow.log_prob):
        with pytest.raises(error, match=f"context: expected {words}"):
            call(x, context=context)
    with pytest.raises(error, match=f"context: expected {words}"):
        flow.inverse((normal(2, 4, 2, 2),), context=context)


class Twice(nn.Module):
    """A network that doubles the channels, and returns what `kind` makes of the result."""

    def __init__(self, kind: Callable[[Tensor], object] = Tensor.clone) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, *context: Tensor) -> object:
        return self.kind(torch.cat([x, x], 1))


def test_outputs_of_networks() -> None:
    flow = glow(network=lambda i, o: nn.Conv2d(i, o + 1, 1))
    for call in (flow, FlowStep(4, nn.Conv2d(2, 5, 1)), flow.chain.layers[1].coupling):
        x = normal(2, 1, 4, 4) if call is flow else normal(2, 4, 2, 2)
        with pytest.raises(ValueError, match=r"net's output: .*\(2, 4, 2, 2\), got \(2, 5, 2, 2\)"):
            call(x)
    for output in (list, tuple):
        words = f"net's output: expected a torch.Tensor, got {output.__name__}"
        for reversible in (True, False):
            listed = ReversibleChain([FlowStep(4, Twice(output))], reversible=reversible)
            with pytest.raises(TypeError, match=words):
                listed(normal(2, 4, 2, 2))
    frames = AffineCoupling(4, nn.Conv1d(2, 4, 1), scale=None)
    with pytest.raises(ValueError, match=r"net's output: .*\(2, 2, 8\), got \(2, 4, 8\)"):
        frames(FRAMES)


@pytest.mark.parametrize("elsewhere", [0, 2])
def test_a_step_on_another_device(elsewhere: int) -> None:
    """Without the check, the CPU's loops would read invalid addresses."""
    chain = ReversibleChain([FlowStep(4, Twice()), Split(4, Twice()), FlowStep(2, Twice())])
    chain.layers[elsewhere].to("meta")
    with pytest.raises(ValueError, match="weight: expected device cpu, got meta"):
        chain(IMAGE)


def fine_and_coarse() -> ReversibleChain:
    """A chain from (N, 1, H, W) to latents (N, 2, H/2, W/2) and (N, 8, H/4, W/4)."""
    layers = [Squeeze(), FlowStep(4, width=4), Split(4, width=4)]
    return ReversibleChain([*layers, FlowStep(2, width=4), Squeeze()])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a, b: b, TypeError, "z: expected a tuple of 2 latents, got Tensor"),
        (lambda a, b: (a, a), ValueError, r"z\[1\]: expected shape \(N, 8, H, W\), got"),
        (lambda a, b: (a, b[0]), ValueError, r"z\[1\]: expected shape \(N, C, H, W\), got"),
        (lambda a, b: (b, b), ValueError, r"z\[0\]: expected shape \(2, 2, 4, 4\), got"),
        (lambda a, b: (a[:1], b), ValueError, r"z\[0\]: expected shape \(2, 2, 4, 4\), got"),
        (lambda a, b: (a.double(), b), TypeError, r"z\[0\]: .*float32, got float64"),
        (lambda a, b: (None, b), TypeError, r"z\[0\]: expected a torch.Tensor, got NoneType"),
    ],
)
def test_latents(
    change: Callable[[Tensor, Tensor], object], error: type[Exception], words: str
) -> None:
    chain = fine_and_coarse()
    z, _ = chain(torch.randn(2, 1, 8, 8))
    chain.inverse(z)
    with pytest.raises(error, match=words):
        chain.inverse(change(*z))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x: x, r"\(z, logdet\), got Tensor"),
        (lambda x: ((x, x), x), "a state of 2 samples, got tuple"),
        (lambda x: (x, x), r"a logdet of shape \(2,\), got \(2, 4\)"),
    ],
)
def test_what_a_layer_must_return(
    reversible: bool, result: Callable[[Tensor], object], words: str
) -> None:
    chain = ReversibleChain([LeakyReLU(), LeakyReLU()], reversible=reversible)
    chain.layers[1].forward = result
    with pytest.raises(TypeError, match=rf"layers.1 \(LeakyReLU\): expected {words}"):
        chain(torch.randn(2, 4))


def steps(**options: object) -> ReversibleChain:
    return ReversibleChain([FlowStep(3, width=4, spatial_dims=0)], **options)  # type: ignore[arg-type]


def chain(*layers: nn.Module, **options: object) -> Callable[[], ReversibleChain]:
    return lambda: ReversibleChain(layers, **options)  # type: ignore[arg-type]


def not_finite() -> InvertibleConv1x1:
    layer = InvertibleConv1x1(3)
    layer.upper.data[0, 1] = float("nan")
    return layer


CHANNELS = {ActNorm: 1, InvertibleConv1x1: 1, AffineCoupling: 2, Split: 2, FlowStep: 2}
SQUEEZED, DOUBLE = r"x: expected \(N, C, H, W\) with even H and W", HALF.double()
BACK = r"z: expected \(N, 4C, H, W\), got \(N, "
PAIR = r"z: expected a tuple \(kept, latent\), got"
ORDER = r"layers\[0\]: expected a layer that keeps the order of frames, got"
EPS = ScaleFunction("sigmoid", eps=1.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        # chains
        (chain(), ValueError, "layers: expected at least one"),
        (chain(nn.ReLU()), TypeError, r"layers\[0\]: expected a Bijection .*, got ReLU"),
        (chain(Squeeze(), checkpoint_every=0), ValueError, "checkpoint_every: .*got 0"),
        (chain(Squeeze(), checkpoint_every=1.5), TypeError, "checkpoint_every: .*got float"),
        (lambda: ReversibleChain([Split(4)]).inverse((HALF,)), ValueError, "2 latents, got 1"),
        (chain(FlowStep(4), Split(4), FlowStep(4)), ValueError, r"layers\[2\]: .* of 2 .* of 4"),
        (chain(Squeeze(), FlowStep(6)), ValueError, r"layers\[1\]: .*multiple of 4 .* of 6"),
        (chain(FlowStep(6), Unsqueeze()), ValueError, r"layers\[1\]: cannot take 6 channels"),
        (chain(Permutation([1, 0]), FlowStep(3)), ValueError, r"layers\[1\]: .* of 2 .* of 3"),
        *((lambda call=call, shape=shape: getattr(fine_and_coarse(), call)(torch.zeros(shape)),
           ValueError, f"x: expected .*{words}")
          for call in ("forward", "initialize")
          for shape, words in (((2, 4, 8, 8), r"shape \(N, 1, H, W\), got \(2, 4, 8, 8\)"),
                               ((2, 1, 8, 6), "with H and W divisible by 4, got"),
                               ((2, 64), r"\(N, C, H, W\) with H and W divisible by 4, got"))),
        # numbers of channels
        *((lambda make=make: make(4.0), TypeError, "channels: expected a whole number, got float")
          for make in CHANNELS),
        *((lambda make=make, least=least: make(least - 1), ValueError,
           f"channels: expected at least {least}, got {least - 1}")
          for make, least in CHANNELS.items()),
        # masked chains
        (chain(ReversibleChain([ActNorm(2)], masked=True)), ValueError,
         r"layers\[0\]: it is masked, so the chain needs masked=True"),
        (chain(PixelPairs("halves"), masked=True), ValueError, f"{ORDER} PixelPairs"),
        (chain(Permutation([1, 0], "pixels"), masked=True), ValueError, f"{ORDER} Permutation"),
        (lambda: chain(PixelPairs("neighbours"), ActNorm(8), masked=True)()(FRAMES, MASK & ODD),
         ValueError, "mask: expected blocks of 2 frames that are all valid or all padding"),
        (lambda: ManifoldFlow(chain(ActNorm(2), masked=True, input_shape=(2, 4))(), 3),
         ValueError, "flow: expected a flow without a mask, got one with masked=True"),
        (lambda: chain(AffineCoupling(4, Twice(), scale=EPS), masked=True)()(FRAMES, MASK),
         ValueError, "scale.eps: expected less than 1 for a mask, got 1.0"),
        # input_shape
        *((lambda s=shape: steps(input_shape=s), ValueError, rf"input_shape: .*{words}")
          for shape, words in (((4,), r"\(3, \*spatial\), got \(4,\)"), ((), r"got \(\)"),
                               ((0,), "at least 1, got 0"))),
        *((lambda s=shape: levels(input_shape=s), ValueError, r"input_shape: .* \(1, H, W\) .*by 2")
          for shape in ((1, 3, 4), (1, 4))),
        (lambda: steps().sample(2), ValueError, "input_shape: .* give it to the constructor"),
        (lambda: ManifoldFlow(steps(), 2), TypeError, "flow: .*without an input_shape"),
        (lambda: steps(input_shape=(3,)).log_prob(normal(2, 4)), ValueError,
         r"x: expected shape \(N, 3\), got \(2, 4\)"),
        (lambda: VectorFlow(3, 1, 4).sample(0), ValueError, "n: expected at least 1, got 0"),
        # rearrangements
        *((lambda s=shape: Squeeze()(torch.zeros(s)), ValueError, SQUEEZED)
          for shape in ((2, 3, 5, 4), (2, 3, 4, 5), (2, 3, 4), (2, 3))),
        *((lambda s=shape: Squeeze().inverse(torch.zeros(s)), ValueError, BACK)
          for shape in ((2, 6, 2, 2), (2, 4, 2))),
        (lambda: Permutation([0, 0, 1]), ValueError, "index: expected each of 0 to n - 1 once"),
        (lambda: Permutation([0], axis="rows"), ValueError, "axis: expected one of"),
        (lambda: Permutation([1, 0], axis="pixels")(FRAMES), ValueError, "x: expected 2 pixels"),
        (lambda: PixelPairs("rows"), ValueError, "by: expected one of checkerboard, halves, n"),
        (lambda: PixelPairs("halves")(FRAMES[..., 1:]), ValueError, "an even last axis"),
        # 1x1 convolutions
        *((lambda s=shape: InvertibleConv1x1(3).factor_(torch.ones(s)), ValueError,
           r"weight: expected shape \(3, 3\), got ") for shape in ((1, 1), (2, 3), (3,))),
        *((lambda limit=limit: InvertibleConv1x1(3).bound_condition_(limit), ValueError,
           "limit: expected at least 1, got") for limit in (0.5, float("nan"))),
        (lambda: not_finite().bound_condition_(2.0), ValueError, "weight: .*a finite matrix"),
        (lambda: InvertibleConv1x1(4, n_split=3), ValueError, "n_split: .*divisor of 4.*got 3"),
        (lambda: InvertibleConv1x1(6, n_split=4), ValueError, "n_split: .*got 4"),
        (lambda: InvertibleConv1x1(6, n_split=0), ValueError, "n_split: expected 2 to 6, got 0"),
        # couplings and splits
        *((lambda make=make: make(4, width=0), ValueError, "width: expected at least 1, got 0")
          for make in (AffineCoupling, Split)),
        *((lambda make=make: make(4, spatial_dims=4), ValueError, "spatial_dims: .*0 to 3, got 4")
          for make in (AffineCoupling, Split)),
        *((lambda make=make: make(4, scale="relu"), ValueError, "scale: .*got 'relu'")
          for make in (AffineCoupling, Split)),
        (lambda: AffineCoupling(4, 3), TypeError, r"net: expected a torch\.nn\.Module, got int"),
        (lambda: glow(network=lambda i, o: 3), TypeError, r"net: expected a torch.*, got int"),
        (lambda: glow(context_channels=2, network=nn.Linear), ValueError,
         "context_channels: expected 0 with `network`.* got 2"),
        (lambda: glow(context_channels=-1), ValueError, "context_channels: .*at least 0, got -1"),
        (lambda: FlowStep(4, coupling="cubic"), ValueError, "coupling: expected one of affine, "),
        (lambda: Split(4, kept=4), ValueError, "kept: expected 1 to 3, got 4"),
        (lambda: Split(4).inverse(HALF), TypeError, f"{PAIR} Tensor"),
        (lambda: Split(4).inverse((HALF,)), TypeError, f"{PAIR} 1 of them"),
        (lambda: Split(4).inverse((HALF[:, :1], HALF)), ValueError, r"z\[0\]: .*got \(2, 1, 4"),
        (lambda: Split(4).inverse((DOUBLE, DOUBLE)), TypeError, r"z\[0\]: .*float32, got float64"),
        (lambda: Split(4).inverse((HALF, HALF[:, :1])), ValueError, r"z\[1\]: .*\(2, 2, 4, 4\)"),
    ],
)  # fmt: skip
def test_arguments(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
