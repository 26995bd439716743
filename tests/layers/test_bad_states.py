"""A wrong state raises an error that names it before anything is computed."""

import pytest
import torch
from torch import nn

from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    FlowStep,
    InvertibleConv1x1,
    ReversibleChain,
    Split,
    Squeeze,
)


def levels() -> ReversibleChain:
    """A chain from (N, 1, H, W) to latents (N, 2, H/2, W/2) and (N, 8, H/4, W/4)."""
    layers = [Squeeze(), FlowStep(4, width=4), Split(4, width=4)]
    return ReversibleChain([*layers, FlowStep(2, width=4), Squeeze()])


COUPLED = {
    "coupling": lambda: AffineCoupling(4, width=4),
    "step": lambda: FlowStep(4, width=4),
    "chain": lambda: ReversibleChain([FlowStep(4, width=4) for _ in range(2)]),
    "split": lambda: Split(4, width=4),
}
PLAIN = {"actnorm": lambda: ActNorm(4), "conv1x1": lambda: InvertibleConv1x1(4)}
image = torch.zeros(2, 4, 4, 4)

WRONG = [
    (torch.zeros(2, 6, 4, 4), ValueError, r"expected shape \(N, 4, {axes}\), got \(2, 6, 4, 4\)"),
    (torch.zeros(4), ValueError, r"expected shape \(N, C, \*spatial\), got \(4,\)"),
    (torch.zeros(2, 4, 0, 4), ValueError, "expected no empty channel or spatial axis"),
    (image.long(), TypeError, "expected dtype float32, .*, got int64"),
    (image.to("meta"), ValueError, "expected device cpu, got meta"),
    ([1.0], TypeError, "expected a torch.Tensor, got list"),
]
WRONG_FOR_NETWORKS = [
    (
        torch.zeros(2, 4),
        ValueError,
        r"expected shape \(N, 4, H, W\), got \(2, 4\); spatial_dims=0 makes",
    ),
    (
        torch.zeros(2, 4, 4),
        ValueError,
        r"expected shape \(N, 4, H, W\), got \(2, 4, 4\); spatial_dims=1",
    ),
    (image.double(), TypeError, "expected the network's dtype float32, got float64"),
    (image.half(), TypeError, "expected the network's dtype float32, got float16"),
]
CASES = [(make, *case) for make in (PLAIN | COUPLED).values() for case in WRONG]
CASES += [(make, *case) for make in COUPLED.values() for case in WRONG_FOR_NETWORKS]
CALLS = [(*case, call) for case in CASES for call in ("forward", "inverse", "initialize")]


@pytest.mark.parametrize(
    ("make", "state", "error", "words", "call"),
    [case for case in CALLS if case[0] is not COUPLED["split"] or case[-1] != "inverse"],
)
def test_layers(make, state, error, words, call):
    layer = make()
    axes = r"\*spatial" if isinstance(layer, ActNorm | InvertibleConv1x1) else "H, W"
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_: pytest.fail("a network ran"))
    name = "z" if call == "inverse" else "x"
    with pytest.raises(error, match=f"^{name}: " + words.format(axes=axes)):
        getattr(layer, call)(state)
    assert not any(m.initialized for m in layer.modules() if isinstance(m, ActNorm))


def test_custom_networks_and_autocast_accept_other_dtypes():
    """The dtype is checked only for networks that start with a layer of torch, outside autocast."""

    class Half(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.half()).float()

    x = torch.zeros(2, 4, 4, 4)
    z, _ = FlowStep(4, Half(2, 4, 1).half())(x)
    assert z.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = FlowStep(4, width=4)(x.bfloat16())
        with pytest.raises(TypeError, match=r"x: .*dtype float32, got float64"):
            FlowStep(4, width=4)(x.double())  # which autocast does not cast
    assert z.dtype == torch.bfloat16


@pytest.mark.parametrize("elsewhere", [0, 2])
def test_a_step_on_another_device(elsewhere):
    """Without the check, the CPU's loops would read invalid addresses."""

    class Twice(nn.Module):
        def forward(self, x):
            return torch.cat([x, x], 1)

    chain = ReversibleChain([FlowStep(4, Twice()), Split(4, Twice()), FlowStep(2, Twice())])
    chain.layers[elsewhere].to("meta")
    with pytest.raises(ValueError, match="weight: expected device cpu, got meta"):
        chain(torch.zeros(2, 4, 4, 4))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 8, 8), r"x: expected shape \(N, 1, H, W\), got \(2, 4, 8, 8\)"),
        ((2, 1, 8, 6), r"x: expected shape \(N, C, H, W\) with H and W divisible by 4, got"),
        ((2, 64), r"x: expected shape \(N, C, H, W\) with H and W divisible by 4, got"),
    ],
)
def test_chain_of_levels(shape, message):
    for call in (levels(), levels().initialize):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, b: b, TypeError, "z: expected a tuple of 2 latents, got Tensor"),
        (lambda a, b: (a, a), ValueError, r"z\[1\]: expected shape \(N, 8, H, W\), got"),
        (lambda a, b: (a, b[0]), ValueError, r"z\[1\]: expected shape \(N, C, H, W\), got"),
        (lambda a, b: (b, b), ValueError, r"z\[0\]: expected shape \(2, 2, 4, 4\), got"),
        (lambda a, b: (a[:1], b), ValueError, r"z\[0\]: expected shape \(2, 2, 4, 4\), got"),
        (lambda a, b: (a.double(), b), TypeError, r"z\[0\]: expected dtype float32, got float64"),
        (lambda a, b: (None, b), TypeError, r"z\[0\]: expected a torch.Tensor, got NoneType"),
    ],
)
def test_latents_of_a_chain(change, error, message):
    chain = levels()
    z, _ = chain(torch.randn(2, 1, 8, 8))
    chain.inverse(z)
    with pytest.raises(error, match=message):
        chain.inverse(change(*z))


def test_halves_of_a_split():
    half = torch.zeros(2, 2, 4, 4)
    split = Split(4, width=4)
    split.inverse((half, half))
    with pytest.raises(ValueError, match=r"z\[0\]: expected shape \(N, 2, H, W\), got \(2, 1, 4"):
        split.inverse((half[:, :1], half))
    with pytest.raises(
        TypeError, match=r"z\[0\]: expected the network's dtype float32, got float64"
    ):
        split.inverse((half.double(), half.double()))
    with pytest.raises(TypeError, match=r"z: expected a tuple \(kept, latent\), got Tensor"):
        split.inverse(half)
    with pytest.raises(TypeError, match=r"z: expected a tuple \(kept, latent\), got 1 of them"):
        split.inverse((half,))
    with pytest.raises(ValueError, match=r"z\[1\]: expected shape \(2, 2, 4, 4\), got"):
        split.inverse((half, half[:, :1]))


@pytest.mark.parametrize("layer", [ActNorm, InvertibleConv1x1, AffineCoupling, Split, FlowStep])
def test_channels_are_counted(layer):
    least = 1 if layer in (ActNorm, InvertibleConv1x1) else 2
    with pytest.raises(ValueError, match=f"channels: expected at least {least}, got {least - 1}"):
        layer(least - 1)
    with pytest.raises(TypeError, match="channels: expected a whole number, got float"):
        layer(4.0)
