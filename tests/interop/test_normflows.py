"""Accelerated models of normflows, built as in its README, examples and tests."""

import copy
from typing import ClassVar

import normflows as nf
import pytest
import torch

from interop import peers
from mflow_kernels.interop import accelerate, decelerate
from mflow_kernels.interop.normflows.adapter import ADAPTER
from mflow_kernels.interop.subclasses import implementation_of, is_accelerated
from mflow_kernels.interop.two_way import FusedRun

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.lu is deprecated", "ignore:ActNorm of normflows"
)


def glow(levels=2, steps=2, shape=(3, 8, 8), classes=3, **block):
    """The multi-scale Glow of examples/glow.ipynb and of core_test.py."""
    c, h, w = shape
    base, merges, flows = [], [], []
    for i in range(levels):
        blocks = [nf.flows.GlowBlock(c * 2 ** (levels + 1 - i), 8, **block) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
        down = levels - i if i else levels
        channels = c * 2 ** (levels - i) if i else c * 2 ** (levels + 1)
        base.append(
            nf.distributions.ClassCondDiagGaussian((channels, h // 2**down, w // 2**down), classes)
        )
    return nf.MultiscaleFlow(base, flows, merges)


def couplings(layers=4, **block):
    """README: couplings of two numbers, swapped in between."""
    flows = []
    for _ in range(layers):
        net = nf.nets.MLP([1, 16, 16, 2 if block.get("scale", True) else 1], init_zeros=True)
        flows.append(nf.flows.AffineCouplingBlock(net, **block))
        flows.append(nf.flows.Permute(2, mode="swap"))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)


def couplings_of_3():
    """Return couplings of three channels, in both directions."""
    flows = [
        nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 2])),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 8, 4]), split_mode="channel_inv"),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 1]), scale=False),
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(3), flows)


def real_nvp(layers=4, size=2):
    """examples/real_nvp.ipynb: masked couplings, each followed by an actnorm."""
    mask = torch.tensor([1.0 if i % 2 == 0 else 0.0 for i in range(size)])
    flows = []
    for i in range(layers):
        s = nf.nets.MLP([size, 2 * size, size], init_zeros=True)
        t = nf.nets.MLP([size, 2 * size, size], init_zeros=True)
        flows.append(nf.flows.MaskedAffineFlow(mask if i % 2 == 0 else 1 - mask, t, s))
        flows.append(nf.flows.ActNorm(size))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(size, trainable=False), flows)


def mixed(size=4):
    """Couplings, each followed by another of normflows' linear layers."""
    flows = []
    for mix in (
        nf.flows.LULinearPermute(size, identity_init=False),
        nf.flows.InvertibleAffine(size, use_lu=True),
        nf.flows.InvertibleAffine(size, use_lu=False),
        nf.flows.Permute(size, mode="shuffle"),
    ):
        net = nf.nets.MLP([size // 2, 8, size], init_zeros=False)
        flows += [nf.flows.AffineCouplingBlock(net, scale_map="sigmoid"), mix]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(size), flows)


def splines(size=5, layers=3, **options):
    """Splines of both kinds, and linear maps."""
    flows = []
    for k in range(layers):
        bins = {"num_bins": 3 + k, "tail_bound": 1.5, "reverse_mask": bool(k)}
        flows += [
            nf.flows.CoupledRationalQuadraticSpline(size, 1, 8, **bins, **options),
            nf.flows.LULinearPermute(size),
        ]
    flows.append(
        nf.flows.AutoregressiveRationalQuadraticSpline(size, 1, 8, init_identity=False, **options)
    )
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(size), flows)


def autoregressive(size=4, **options):
    """Masked autoregressive flows, whose `forward` samples in one pass."""
    flows = []
    for _ in range(3):
        flows += [
            nf.flows.MaskedAffineAutoregressive(size, 8, **options),
            nf.flows.Permute(size, mode="swap"),
        ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(size), flows)


def circular(size=5, layers=3):
    """Splines of angles and other features, as in FAB's flow of alanine dipeptide."""
    bound = torch.full((size,), 9.0)
    bound[[1, 3]] = 6.0
    one = nf.flows.CircularAutoregressiveRationalQuadraticSpline
    flows = [one(size, 1, 8, [1, 3], num_bins=4, tail_bound=bound) for _ in range(layers)]
    flows.append(one(size, 1, 8, [0], num_bins=4, tail_bound=9.0, activation=torch.nn.Tanh))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(size), flows)


def vectors(size, n=64, seed=3):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def images(n=4, c=3, s=8, seed=3):
    return torch.rand(n, c, s, s, generator=torch.Generator().manual_seed(seed))


def conditional():
    """examples/conditional_flow.ipynb, with splines."""
    flows = []
    for cls in (
        nf.flows.CoupledRationalQuadraticSpline,
        nf.flows.AutoregressiveRationalQuadraticSpline,
    ):
        flows += [cls(3, 1, 8, num_context_channels=2), nf.flows.LULinearPermute(3)]
    flows.append(nf.flows.MaskedAffineAutoregressive(3, 8, context_features=2))
    base = nf.distributions.base.ConditionalDiagGaussian(3, nf.nets.MLP([2, 8, 6]))
    return nf.ConditionalNormalizingFlow(base, flows)


MODELS = {
    "glow": lambda: glow(),
    "glow, other half": lambda: glow(split_mode="channel_inv"),
    "glow, plain W, exp": lambda: glow(use_lu=False, scale_map="exp"),
    "glow, multiplied when sampling": lambda: glow(scale_map="sigmoid_inv", leaky=0.1),
    "glow, only shifts": lambda: glow(scale=False, net_actnorm=True),
    "couplings": couplings,
    "couplings, other half": lambda: couplings(split_mode="channel_inv"),
    "couplings, only shifts": lambda: couplings(scale=False),
    "real nvp": real_nvp,
    "real nvp of 4": lambda: real_nvp(size=4),
    "real nvp of 3": lambda: real_nvp(size=3),
    "couplings of 3": couplings_of_3,
    "mixed": mixed,
    "splines": splines,
    "autoregressive": autoregressive,
    "autoregressive, no blocks": lambda: autoregressive(
        use_residual_blocks=False, activation=torch.nn.Tanh()
    ),
    "circular": circular,
}
if hasattr(nf, "ConditionalNormalizingFlow"):  # from 1.7.2 on
    MODELS["conditional"] = conditional


class TestNormflows(peers.LayerTests):
    adapter = ADAPTER
    models = MODELS
    trained: ClassVar = {"glow": True, "real nvp": False}
    copied, terms = "glow", 64

    def inputs(self, model, n=8, seed=3):
        if isinstance(model, nf.MultiscaleFlow):
            return images(n, seed=seed), torch.arange(n) % 3
        if isinstance(model.q0, nf.distributions.base.ConditionalDiagGaussian):
            return vectors(3, n, seed), vectors(2, n, seed + 1)
        return (vectors(model.q0.d if hasattr(model.q0, "d") else model.q0.shape[0], n, seed),)

    def encode(self, model, x, *c):
        return model.inverse_and_log_det(x, *_context(model, c))

    def decode(self, model, z, *c):
        return model.forward_and_log_det(z, *_context(model, c))

    def log_prob(self, model, x, *c):
        return model.log_prob(x, *c)

    def others(self, model, x, z, *c):
        return {"kld": model.forward_kld(x, *c)}

    def layers(self):
        yield nf.flows.Invertible1x1Conv(4, use_lu=True), images(c=4)
        yield nf.flows.Invertible1x1Conv(4, use_lu=False), images(c=4)
        yield nf.flows.ActNorm((4, 1, 1)), images(c=4)
        yield nf.flows.ActNorm(4), vectors(4)
        yield nf.flows.InvertibleAffine(4), vectors(4)
        yield nf.flows.LULinearPermute(4), vectors(4)
        yield nf.flows.GlowBlock(4, 8), images(c=4)

    def both_ways(self, layer, x):
        return [*layer.inverse(x), *layer(x)]

    def actnorm(self):
        return nf.flows.ActNorm(4)

    def left(self):
        spline = nf.flows.CircularCoupledRationalQuadraticSpline(3, 1, 8, [0])
        yield nf.NormalizingFlow(nf.distributions.DiagGaussian(3), [spline]), "no such layer"
        yield nf.flows.GlowBlock(4, 8, split_mode="checkerboard").flows[0], "checkerboard"


def _context(model, given):
    """Classes of a multi-scale flow change its base only."""
    return () if isinstance(model, nf.MultiscaleFlow) else given


TESTS = TestNormflows()


def test_samples_have_their_densities():
    """core_test.py checks a multi-scale flow in this way; its first call samples."""
    torch.manual_seed(0)
    model = glow(levels=3, shape=(1, 16, 16), classes=5)
    accelerate(model)
    y = torch.randint(5, (5,))
    x, log_q = model.sample(5, y)
    assert x.shape == (5, 1, 16, 16)
    torch.testing.assert_close(log_q, model.log_prob(x, y))
    torch.testing.assert_close(model.forward(x, y).mean(), model.forward_kld(x, y))


def test_models_of_no_library():
    model = torch.nn.Linear(2, 2)
    report = accelerate(model)
    assert type(model) is torch.nn.Linear
    assert "no layer of normflows, nflows, glasflow, FrEIA or zuko" in str(report)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        accelerate([model])


def test_unsupported_channels_use_the_original_code():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(3), [nf.flows.AffineCouplingBlock(net) for _ in range(2)]
    )
    fast = copy.deepcopy(model)
    assert accelerate(fast).replaced
    torch.testing.assert_close(fast.log_prob(vectors(3)), model.log_prob(vectors(3)))
    torch.testing.assert_close(fast.forward(vectors(3)), model.forward(vectors(3)))


def test_hooks_and_subclasses_are_left_alone():
    class Own(nf.flows.GlowBlock):
        pass

    model = nf.NormalizingFlow(None, [Own(4, 8), nf.flows.GlowBlock(4, 8), nf.flows.Squeeze()])
    model.flows[1].flows[2].register_forward_hook(lambda *_: None)
    report = accelerate(model)
    assert type(model.flows[0]) is Own
    assert type(model.flows[1]) is nf.flows.GlowBlock
    assert "it has hooks" in str(report)


def test_exchanged_layers_are_used():
    model = couplings()
    accelerate(model)
    model.flows[0] = nf.flows.Permute(2, mode="swap")
    plain = copy.deepcopy(model)
    decelerate(plain)
    torch.testing.assert_close(model.log_prob(vectors(2)), plain.log_prob(vectors(2)))


def test_a_subclass_with_its_own_methods_keeps_them():
    class Own(nf.NormalizingFlow):
        def log_prob(self, x):
            return super().log_prob(x) + 1

    model = Own(nf.distributions.DiagGaussian(2), list(couplings().flows))
    want = model.log_prob(vectors(2))
    report = accelerate(model)
    assert "methods of its own" in str(report)
    torch.testing.assert_close(model.log_prob(vectors(2)), want)


def test_samples_initialize_actnorm_only_in_training_with_a_warning():
    model = glow()
    accelerate(model)
    model.eval()
    with pytest.warns(RuntimeWarning, match="waits for the first batch"), torch.no_grad():
        model.sample(3, torch.arange(3))
    actnorms = [m for m in model.modules() if isinstance(m, nf.flows.ActNorm)]
    assert not any(m.data_dep_init_done for m in actnorms)
    model.train()
    with pytest.warns(RuntimeWarning, match="set from samples"):
        model.sample(3, torch.arange(3))
    assert all(m.data_dep_init_done for m in actnorms)


def test_features_outside_of_the_bound_stay_beside_angles():
    layer = nf.flows.CircularAutoregressiveRationalQuadraticSpline(3, 1, 8, [0])
    x = 4 + vectors(3).abs()
    assert not layer.inverse(x)[0].any()
    assert "returns 0" in str(accelerate(layer))
    z, log_det = layer.inverse(x)
    assert torch.equal(z, x)
    assert not log_det.any()


def test_log_sigmoid_stays_finite():
    net = torch.nn.Linear(1, 2)
    torch.nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([0.0, -122.0]))
    layer = nf.flows.AffineCouplingBlock(net, scale_map="sigmoid")
    assert layer.inverse(vectors(2))[1].isinf().all()
    accelerate(layer)
    torch.testing.assert_close(layer.inverse(vectors(2))[1], torch.full((64,), -120.0))


def test_infinite_parameters_of_a_masked_coupling_become_nan():
    layer = real_nvp(layers=1).flows[0]
    with torch.no_grad():
        layer.t.net[-1].bias[1] = torch.inf
    assert layer.inverse(vectors(2))[0][:, 1].isnan().all()
    accelerate(layer)
    assert layer.inverse(vectors(2))[0][:, 1].isnan().all()


def test_actnorms_that_a_checkpoint_resets_are_set_again():
    model = real_nvp()
    accelerate(model)
    start = copy.deepcopy(model.state_dict())
    actnorms = [m for m in model.flows if isinstance(m, nf.flows.ActNorm)]
    for scale in (1.0, 3.0):
        model.inverse_and_log_det(scale * vectors(2))
        z, _ = model.inverse_and_log_det(scale * vectors(2))
        assert all(m.data_dep_init_done for m in actnorms)
        torch.testing.assert_close(z.std(0, correction=0), torch.ones(2), rtol=0.05, atol=0)
        model.load_state_dict(start)


def test_accelerating_again_and_reversibly():
    """Accelerating twice equals accelerating once; copies have their own sequences."""
    model = TESTS.initialized(glow)
    first = accelerate(model)
    assert accelerate(model) == first
    accelerate(model, reversible=True)
    for m in (model, copy.deepcopy(model)):
        fused = [f for f in implementation_of(m).view(m).flows.modules() if isinstance(f, FusedRun)]
        assert len(fused) == 2
        assert all(f.sequence.reversible for f in fused)
        assert {id(p) for f in fused for p in f.parameters()} == {
            id(p) for p in m.flows.parameters()
        }


def test_actnorms_inside_networks_are_accelerated_too():
    model = nf.flows.GlowBlock(4, 8, net_actnorm=True)
    accelerate(model)
    inside = [m for m in model.flows[0].modules() if isinstance(m, nf.flows.ActNorm)]
    assert len(inside) == 2
    assert all(map(is_accelerated, inside))
