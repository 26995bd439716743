"""Accelerated flows of nflows, built as in its README, tests and image examples."""

import copy
import inspect
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from nflows import transforms as nt
from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow
from nflows.flows.realnvp import SimpleRealNVP
from nflows.nn.nets import ConvResidualNet, ResidualNet

from interop import peers
from mflow_kernels.interop import accelerate
from mflow_kernels.interop.nflows.adapter import ADAPTER

pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")


def vector_net(context=None):
    def make(c_in, c_out):
        return ResidualNet(c_in, c_out, hidden_features=8, num_blocks=1, context_features=context)

    return make


def image_net(c_in, c_out):
    return ConvResidualNet(c_in, c_out, hidden_channels=6, num_blocks=1)


def halves(n, turned=False):
    mask = torch.ones(n)
    mask[n // 2 :] = -1
    return mask if turned else -mask


def real_nvp(features=4, **rest):
    """nflows.flows.SimpleRealNVP."""
    return SimpleRealNVP(features, hidden_features=8, num_layers=4, num_blocks_per_layer=1, **rest)


class Couplings(nt.CompositeTransform):
    """A subclass that keeps the methods of a composite, which therefore runs as one."""


def of_masks(*masks):
    """Couplings that change the features where a mask is 1."""
    couplings = [nt.AffineCouplingTransform(torch.tensor(m), vector_net()) for m in masks]
    return Flow(Couplings(couplings), StandardNormal([len(masks[0])]))


def conditional(features=4):
    """The README's flow with a context: alternating linear transforms and couplings."""
    layers = []
    for k, linear in enumerate(
        (nt.LULinear(features, identity_init=False), nt.NaiveLinear(features))
    ):
        layers += [
            nt.ActNorm(features),
            nt.RandomPermutation(features),
            linear,
            nt.AffineCouplingTransform(halves(features, bool(k)), vector_net(3)),
            nt.ReversePermutation(features),
        ]
    return Flow(nt.CompositeTransform(layers), StandardNormal([features]))


def splines(features=5, tails="linear", bound=1.5, own=True):
    """A chain like those of sbi: a z-score, then splines with linear maps between.

    The masks of couplings keep the smaller or the larger part.
    """
    layers = [nt.PointwiseAffineTransform(torch.linspace(-0.1, 0.1, features), torch.tensor(0.9))]
    options = {"tails": tails, "tail_bound": bound}
    for k in range(4):
        layers += [
            nt.PiecewiseRationalQuadraticCouplingTransform(
                torch.arange(k, k + features) % 2,
                vector_net(3),
                num_bins=3 + k,
                apply_unconditional_transform=own and k < 2,
                **options,
            ),
            nt.LULinear(features, identity_init=False)
            if tails
            else nt.ReversePermutation(features),
        ]
    layers += [
        nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features, 8, context_features=3, num_blocks=1, **options
        ),
        nt.RandomPermutation(features),
    ]
    return Flow(nt.CompositeTransform(layers), StandardNormal([features]))


def autoregressive(features=5, spline=False, **options):
    """A masked autoregressive flow, as sbi builds it: with permutations between."""
    options = {"context_features": 3, **options}
    if spline:
        cls = nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        options |= {"num_bins": 4, "tails": "linear", "tail_bound": 1.5}
    else:
        cls = nt.MaskedAffineAutoregressiveTransform
    layers = []
    for _ in range(3):
        layers += [cls(features, 8, **options), nt.RandomPermutation(features)]
    return Flow(nt.CompositeTransform(layers), StandardNormal([features]))


SPLINES = partial(nt.PiecewiseRationalQuadraticCouplingTransform, tails="linear")


def images(channels=1, size=8, steps=2, coupling=nt.AffineCouplingTransform):
    """The multi-scale image flow of nflows' experiments, with nested composites."""
    transform = nt.MultiscaleCompositeTransform(num_transforms=2)
    c, h = channels, size
    for _ in range(2):
        squeeze = nt.SqueezeTransform()
        c, h, _ = squeeze.get_output_shape(c, h, h)
        blocks = [
            nt.CompositeTransform(
                [nt.ActNorm(c), nt.OneByOneConvolution(c), coupling(halves(c), image_net)]
            )
            for _ in range(steps)
        ]
        hidden = transform.add_transform(nt.CompositeTransform([squeeze, *blocks]), (c, h, h))
        c = hidden[0] if hidden else c
    return Flow(transform, StandardNormal([channels * size * size]))


MODELS = {
    "real nvp": real_nvp,
    "real nvp, only shifts": lambda: real_nvp(use_volume_preserving=True),
    "real nvp, batch norm between": lambda: real_nvp(batch_norm_between_layers=True),
    "real nvp of 5": lambda: real_nvp(5),
    "one of 4": lambda: of_masks([1, -1, -1, -1], [-1, -1, 1, -1]),
    "conditional": conditional,
    "splines": splines,
    "splines of an interval": lambda: splines(4, None),
    "autoregressive": partial(autoregressive, use_residual_blocks=False, activation=torch.tanh),
    "autoregressive, residual": partial(autoregressive, activation=torch.nn.SiLU()),
    "autoregressive, batch norm": partial(autoregressive, use_batch_norm=True, activation=F.elu),
    "autoregressive splines": partial(autoregressive, spline=True, dropout_probability=0.2),
    "autoregressive, random masks": partial(
        autoregressive, use_residual_blocks=False, random_mask=True, activation=F.leaky_relu
    ),
    "autoregressive, own activation": partial(autoregressive, spline=True, activation=torch.sin),
    "autoregressive, one feature": partial(autoregressive, 1, context_features=None),
    "images": images,
    "images, splines": lambda: images(coupling=SPLINES),
}


# The development branch's NaiveLinear has an inverse. Release 0.14's calls torch.solve, which torch
# has removed.
SOLVES = "torch.solve" in inspect.getsource(nt.NaiveLinear)
# A lambda is the default of the development branch's scale activation, which cannot be pickled.
PICKLES = not hasattr(nt.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION")


class TestNflows(peers.LayerTests):
    adapter = ADAPTER
    models = MODELS
    trained: ClassVar = {"conditional": False, "images": True, "autoregressive": False}
    copied, pickles = "images", PICKLES

    def inputs(self, model, n=8, seed=3):
        generator = torch.Generator().manual_seed(seed)
        if isinstance(model._transform, nt.MultiscaleCompositeTransform):
            return (torch.rand(n, 1, 8, 8, generator=generator),)
        features = model._distribution._shape[0]
        x, c = (torch.randn(n, size, generator=generator) for size in (features, 3))
        if any(getattr(m, "tails", "linear") is None for m in model.modules()):
            x = 0.2 + 0.5 * x.sigmoid()
        names = ("context_features", "context_layer")
        takes = any(getattr(m, name, None) for m in model.modules() for name in names)
        return (x, c) if takes else (x,)

    def encode(self, model, x, *c):
        return model._transform(x, *c)

    def decode(self, model, z, *c):
        solves = SOLVES and any(isinstance(m, nt.NaiveLinear) for m in model.modules())
        return None if solves else model._transform.inverse(z, *c)

    def log_prob(self, model, x, *c):
        return model.log_prob(x, *c)

    def layers(self):
        x, image = torch.randn(5, 4), torch.randn(3, 4, 8, 8)
        yield nt.ActNorm(4), x
        yield nt.ActNorm(4), image
        yield nt.LULinear(4, identity_init=False), x
        yield nt.OneByOneConvolution(4), image
        yield nt.AffineCouplingTransform(halves(4), vector_net(3)), x, torch.randn(5, 3)
        yield nt.MaskedAffineAutoregressiveTransform(4, 8), x

    def both_ways(self, layer, x, *c):
        return [*layer(x, *c), *layer.inverse(x, *c)]

    def actnorm(self):
        return nt.ActNorm(4)

    def left(self):
        def more(features):
            return nt.QRLinear(features, 2)

        mask = halves(4)
        yield nt.AffineCouplingTransform(mask, vector_net(), unconditional_transform=more), "alone"
        yield nt.CompositeTransform([nt.SqueezeTransform(3)]), "by 3, not by 2"
        own = nt.MaskedAffineAutoregressiveTransform(4, 8, activation=torch.sin)
        yield own, "activation is a custom function, so"
        hooked = nt.MaskedAffineAutoregressiveTransform(4, 8)
        hooked.autoregressive_net.blocks[0].register_forward_hook(lambda *_: None)
        yield hooked, "its network has hooks, so"
        yield nt.QRLinear(4, 2), "no such layer"
        yield nt.Permutation(torch.arange(3), dim=2), "axis 2"


TESTS = TestNflows()


def test_infers_shapes_on_the_meta_device():
    model = TESTS.initialized(images)
    accelerate(model)
    log_prob = model.to("meta").log_prob(torch.empty(3, 1, 8, 8, device="meta"))
    assert log_prob.shape == (3,)


def test_report():
    report = accelerate(images())
    assert [r.name for r in report.replaced] == [f"_transform._transforms.{i}" for i in range(2)]
    assert (
        "CompositeTransform -> squeeze, 2 actnorms, 2 permutations, 2 1x1 convolutions, "
        "2 affine sigmoid couplings" in str(report)
    )
    assert not report.left
    (replaced,) = accelerate(splines()).replaced
    assert replaced.by == (
        "scale and shift, 11 permutations, 4 spline couplings, 2 elementwise splines, "
        "4 1x1 convolutions, autoregressive spline"
    )
    assert len(accelerate(MODELS["one of 4"]()).replaced) == 1
    (replaced,) = accelerate(MODELS["autoregressive"]()).replaced
    assert replaced.by == "3 autoregressive affine maps, 3 permutations"
    report = accelerate(MODELS["autoregressive, own activation"]())
    assert "pass for each feature, as its activation is a custom function" in str(report)
    report = accelerate(real_nvp(batch_norm_between_layers=True))
    assert {left.layer for left in report.left} == {"BatchNorm"}
    assert len(report.replaced) == 4


@pytest.mark.parametrize(
    "layer", [nt.AffineCouplingTransform, nt.PiecewiseRationalQuadraticCouplingTransform]
)
def test_a_checkpoint_may_bring_another_mask(layer):
    torch.manual_seed(0)
    options = {} if layer is nt.AffineCouplingTransform else {"tails": "linear"}
    fast, other = (layer(halves(4, turned), vector_net(), **options) for turned in (False, True))
    x = torch.randn(5, 4)
    assert accelerate(fast).replaced
    fast(x)
    fast.load_state_dict(other.state_dict())
    for got, want in zip(fast(x), other(x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["batch norm", "splines"])
def test_batch_norm_and_dropout_train_as_in_nflows(name):
    """In training mode the library's network runs, and draws what it would draw."""
    make = MODELS[f"autoregressive, {name}" if name == "batch norm" else f"autoregressive {name}"]
    model = TESTS.initialized(make).train()
    fast = copy.deepcopy(model)
    assert accelerate(fast).replaced
    x, c = TESTS.inputs(model)
    found = []
    for m in (fast, model):
        torch.manual_seed(0)
        found.append([*m._transform(x, c), *m._transform.inverse(x, c), *m.buffers()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_checkpoints_bring_other_masks_and_activations_in_place_are_left():
    options = {"use_residual_blocks": False, "random_mask": True}
    fast, other = (nt.MaskedAffineAutoregressiveTransform(6, 16, **options) for _ in range(2))
    assert accelerate(fast).replaced
    x = torch.randn(5, 6)
    fast.inverse(x)
    fast.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast.inverse(x), other.inverse(x))
    in_place = nt.MaskedAffineAutoregressiveTransform(4, 8, activation=torch.nn.ReLU(inplace=True))
    assert "in place" in str(accelerate(in_place))


def test_actnorm_is_set_as_in_nflows():
    x = torch.randn(50, 4)
    plain, fast = nt.ActNorm(4), nt.ActNorm(4)
    accelerate(fast)
    for layer in (plain, fast):
        layer.eval()
        layer(x)
        layer.train()
        layer.inverse(x)
        assert not layer.initialized
        layer(x)
        assert layer.initialized
    torch.testing.assert_close(fast.log_scale, plain.log_scale)
    torch.testing.assert_close(fast.shift, plain.shift)


@pytest.mark.skipif(not SOLVES, reason="nflows' own has an inverse")
def test_naive_linear_has_an_inverse():
    model = TESTS.initialized(conditional)
    x, c = TESTS.inputs(model)
    z, log_det = model._transform(x, c)
    with pytest.raises(RuntimeError, match="removed"):
        model._transform.inverse(z, c)
    assert "torch.solve" in str(accelerate(model))
    back, log_det_back = model._transform.inverse(z, c)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_det, -log_det_back, atol=1e-3, rtol=1e-4)
    assert model.sample(2, c).isfinite().all()
