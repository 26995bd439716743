"""Accelerated networks of FrEIA, built as in its README, tutorial and examples."""

import copy
import weakref
from typing import ClassVar

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import pytest
import torch
from torch import nn

from interop import peers
from mflow_kernels.interop import accelerate, decelerate
from mflow_kernels.interop.freia.adapter import ADAPTER
from mflow_kernels.interop.freia.layers import is_pending

pytestmark = pytest.mark.filterwarnings("ignore:ActNorm of FrEIA")


def fully_connected(c_in, c_out):
    return nn.Sequential(nn.Linear(c_in, 16), nn.ReLU(), nn.Linear(16, c_out))


def convolutional(c_in, c_out):
    return nn.Sequential(
        nn.Conv2d(c_in, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, c_out, 3, padding=1)
    )


SUB = {"subnet_constructor": fully_connected}
CONVOLUTIONS = {"subnet_constructor": convolutional}


def sequence(dims, *modules):
    """A network of modules, each with its options."""
    inn = Ff.SequenceINN(*dims)
    for module, options in modules:
        inn.append(module, **options)
    return inn


def blocks(dims, count, net=fully_connected, **options):
    """README: a sequence of AllInOneBlocks."""
    block = Fm.AllInOneBlock, {"subnet_constructor": net, **options}
    return sequence(dims, *[block] * count)


def conditional():
    """The tutorial's cINN: couplings with a condition, permutations in between."""
    condition = {"cond_shape": (3,), "clamp": 1.2, **SUB}
    return sequence(
        (4,),
        (Fm.GLOWCouplingBlock, {"cond": 0, **condition}),
        (Fm.PermuteRandom, {"seed": 0}),
        (Fm.RNVPCouplingBlock, {"cond": 1, **condition}),
        (Fm.PermuteRandom, {"seed": 1}),
        (Fm.ActNorm, {}),
        (Fm.NICECouplingBlock, SUB),
        (Fm.FixedLinearTransform, {"M": torch.randn(4, 4), "b": torch.randn(4)}),
        (Fm.AffineCouplingOneSided, {"clamp_activation": "SIGMOID", **SUB}),
        (Fm.HouseholderPerm, {"n_reflections": 3}),
        (Fm.GLOWCouplingBlock, {"clamp_activation": "TANH", **SUB}),
    )


def image_graph():
    """The tutorial's image network: downsampling, couplings with fixed 1x1 convolutions, a split
    with one part as an output, and a condition."""
    nodes = [Ff.InputNode(3, 8, 8, name="input")]
    condition = Ff.ConditionNode(2, 4, 4, name="condition")

    def add(module, name, conditions=None, **args):
        nodes.append(Ff.Node(nodes[-1], module, args, conditions=conditions, name=name))

    add(Fm.HaarDownsampling, "haar", order_by_wavelet=True, rebalance=0.5)
    for k in range(2):
        add(Fm.ActNorm, f"actnorm {k}")
        add(
            Fm.GLOWCouplingBlock,
            f"coupling {k}",
            conditions=condition if k else None,
            subnet_constructor=convolutional,
        )
        q = np.linalg.qr(np.random.default_rng(k).normal(size=(12, 12)))[0]
        add(Fm.Fixed1x1Conv, f"conv {k}", M=torch.tensor(q, dtype=torch.float32))
    split = Ff.Node(nodes[-1], Fm.Split, {"section_sizes": (4, 8)}, name="split")
    out = Ff.OutputNode(split.out0, name="left early")
    nodes.append(split)
    nodes.append(Ff.Node(split.out1, Fm.IRevNetDownsampling, {}, name="checkerboard"))
    for k in range(2):
        add(Fm.AllInOneBlock, f"block {k}", subnet_constructor=convolutional, permute_soft=True)
    add(Fm.Flatten, "flat")
    nodes.append(Ff.OutputNode(nodes[-1], name="output"))
    return Ff.GraphINN([*nodes, out, condition])


def other_splits():
    """Couplings of an odd number of channels, and of parts that are no halves."""
    return sequence(
        (5,),
        (Fm.AllInOneBlock, SUB),
        (Fm.GLOWCouplingBlock, SUB),
        (Fm.RNVPCouplingBlock, {"split_len": 0.25, **SUB}),
        (Fm.NICECouplingBlock, {"split_len": 0.75, **SUB}),
        (Fm.AffineCouplingOneSided, {"split_len": 1, **SUB}),
    )


def up_and_down():
    block = Fm.AllInOneBlock, CONVOLUTIONS
    resizings = (Fm.IRevNetUpsampling, {}), (Fm.IRevNetDownsampling, {})
    return sequence((8, 4, 4), block, resizings[0], block, resizings[1], block)


def permuted():
    """Actnorms and permutations of more channels than one matrix has."""
    orders = [(Fm.PermuteRandom, {"seed": seed}) for seed in range(3)]
    actnorm = Fm.ActNorm, {}
    return sequence((40,), *orders[:2], actnorm, orders[2], actnorm, (Fm.GLOWCouplingBlock, SUB))


MODELS = {
    "permuted": permuted,
    "wide rotations": lambda: blocks((66,), 2, permute_soft=True),
    "readme": lambda: blocks((2,), 3, permute_soft=True),
    "all in one, exp": lambda: blocks((2,), 6, global_affine_type="EXP", affine_clamping=1.0),
    "all in one, sigmoid": lambda: blocks((2,), 4, global_affine_type="SIGMOID"),
    "all in one, householder": lambda: blocks(
        (2,), 4, learned_householder_permutation=2, reverse_permutation=True, permute_soft=True
    ),
    "conditional": conditional,
    "other splits": other_splits,
    "up and down": up_and_down,
    "graph": image_graph,
}


class TestFreia(peers.LayerTests):
    adapter = ADAPTER
    models = MODELS
    trained: ClassVar = {"readme": False, "graph": True}
    copied, pickles = "graph", False  # the activation of a scale is a lambda

    def inputs(self, model, n=8, seed=3):
        if isinstance(model, Ff.GraphINN):
            shapes = [node.output_dims[0] for node in (*model.in_nodes, *model.condition_nodes)]
        else:
            shapes = [model.shapes[0], *(m.dims_c[0] for m in model.module_list if m.dims_c)]
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(n, *shape, generator=generator) for shape in shapes)

    def encode(self, model, x, *c):
        return model(x, c or None)

    def decode(self, model, z, *c):
        return model(z, c or None, rev=True)

    def log_prob(self, model, x, *c):
        z, log_det = model(x, c or None)
        latents = z if isinstance(z, tuple) else (z,)
        return log_det - sum(u.flatten(1).square().sum(1) for u in latents) / 2

    def layers(self):
        x, image = torch.randn(5, 4), torch.randn(3, 4, 8, 8)
        yield Fm.ActNorm([(4,)]), x
        yield Fm.ActNorm([(4, 8, 8)]), image
        yield Fm.Fixed1x1Conv([(4, 8, 8)], M=torch.randn(4, 4)), image
        yield Fm.FixedLinearTransform([(4,)], M=torch.randn(4, 4)), x
        yield Fm.HouseholderPerm([(4,)], n_reflections=2), x
        yield Fm.NICECouplingBlock([(4,)], **SUB), x
        yield Fm.AllInOneBlock([(4,)], **SUB), x
        yield Fm.GLOWCouplingBlock([(4,)], dims_c=[(3,)], **SUB), x, torch.randn(5, 3)

    def both_ways(self, layer, x, *c):
        named = {"c": c} if c else {}
        ways = [layer([x], rev=rev, **named) for rev in (False, True)]
        return [value for (y,), log_det in ways for value in (y, log_det)]

    def actnorm(self):
        return Fm.ActNorm([(4,)])

    def left(self):
        for module, options, why in (
            (Fm.GINCouplingBlock, SUB, "no such layer"),
            (Fm.AllInOneBlock, {"gin_block": True, **SUB}, "centred"),
            (Fm.InvAutoAct, {}, "no such layer"),
            (Fm.GLOWCouplingBlock, {"clamp_activation": torch.erf, **SUB}, "a custom function"),
        ):
            yield sequence((4,), (module, options)), why
        wide = sequence((33, 4, 4), (Fm.HaarDownsampling, {}))
        yield wide, "in reverse it overwrites its input"


TESTS = TestFreia()


def test_report():
    torch.manual_seed(0)
    report = accelerate(image_graph())
    assert [r.name for r in report.replaced] == ["module_list.0", "module_list.8"]
    assert report.replaced[0].layer.startswith("HaarDownsampling, 2 ActNorm, 2 GLOWCouplingBlock")
    assert {left.layer for left in report.left} == {"Split", "Flatten"}
    assert "4 permutations, 4 affine atan couplings, 2 1x1 convolutions" in str(report)
    for note in (
        "The direction that runs first",
        "constant",
        "its input alone",
        "releases a node's output",
    ):
        assert note in str(report)


def test_fixed_stays_fixed():
    model = TESTS.initialized(image_graph)
    accelerate(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name in trained if name.endswith((".M", ".haar_weights", ".w_perm"))]
    TESTS.log_prob(model, *TESTS.inputs(model)).sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_graph_checks_and_intermediate_outputs():
    model = TESTS.initialized(image_graph)
    x, c = TESTS.inputs(model)
    want, _ = model(x, c, intermediate_outputs=True)
    accelerate(model)
    outs, jacobians = model(x, c, intermediate_outputs=True)
    assert outs.keys() == want.keys()
    assert len(jacobians) == len(model.module_list)
    torch.testing.assert_close(list(outs.values()), list(want.values()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Got 0 conditions, but expected 1"):
        model(x)
    with pytest.raises(RuntimeError, match="haar"):
        model(x[:, :2], c)


def test_haar_leaves_its_input_alone():
    model = sequence((4, 4, 4), (Fm.HaarDownsampling, {}))
    z = torch.randn(2, 16, 2, 2)
    before = z.clone()
    assert not torch.equal(model(z.clone(), rev=True)[0], z)
    assert "-> itself, which in reverse leaves its input alone" in str(accelerate(model))
    want = copy.deepcopy(model)(z, rev=True)[0]
    assert torch.equal(z, before)
    decelerate(model)
    torch.testing.assert_close(model(z.clone(), rev=True)[0], want)


@pytest.mark.parametrize("count", [2, 1], ids=["a run", "a layer alone"])
def test_graph_releases_outputs_after_their_last_use(count):
    """Without gradients, a state in a graph is released as soon as the next one exists."""
    alive = []

    class AddOne(Fm.InvertibleModule):
        def forward(self, x, rev=False, jac=True):
            y = x[0] + 1
            alive[:] = [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(y))
            return (y,), torch.zeros(len(y))

        def output_dims(self, dims):
            return dims

    nodes = [Ff.InputNode(4)]
    for _ in range(6):
        nodes.append(Ff.Node(nodes[-1], AddOne, {}))
    for _ in range(count):
        nodes.append(Ff.Node(nodes[-1], Fm.AllInOneBlock, SUB))
    model = Ff.GraphINN([*nodes, Ff.OutputNode(nodes[-1])])
    model(torch.zeros(2, 4))
    assert len(alive) == 6
    alive.clear()
    assert "releases a node's output" in str(accelerate(model))
    with torch.no_grad():
        model(torch.zeros(2, 4))
    assert len(alive) <= 2


def test_samples_do_not_initialize_actnorm_in_eval_mode():
    model = sequence((4,), (Fm.ActNorm, {})).eval()
    accelerate(model)
    with pytest.warns(RuntimeWarning, match="waits for the first batch"):
        model(torch.randn(5, 4), rev=True)
    assert is_pending(model[0])
