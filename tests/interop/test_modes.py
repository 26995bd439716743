"""Accelerated models under autocast, torch.func, inference mode, compilers and export.

All libraries share the code that this tests, so the models are those of normflows.
"""

import copy

import normflows as nf
import pytest
import torch

from interop import peers
from interop.test_normflows import TESTS, couplings, glow, images, splines, vectors
from mflow_kernels.interop import accelerate, linear
from mflow_kernels.interop.plain import _Method

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")


def test_autocast():
    """Networks compute in bfloat16 on float32 states.

    The original also rounds every state that a 1x1 convolution returns, so the accelerated model is
    closer to float64. With four seeds its error was 3.4 to 12 times smaller; the factor falls as
    networks add more to a state. The test requires 2.
    """
    model = TESTS.initialized(glow)
    fast = copy.deepcopy(model)
    accelerate(fast)
    x, errors = images(), []
    with peers.default_dtype(torch.float64):
        exact, log_exact = copy.deepcopy(model).double().inverse_and_log_det(x.double())
    for m in (fast, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = m.inverse_and_log_det(x)
        pairs = [*zip(z, exact, strict=True), (log_det, log_exact)]
        errors.append([(a - b).square().mean().sqrt().item() for a, b in pairs])
        if m is fast:
            assert all(part.dtype == torch.float32 for part in (*z, log_det))
    assert all(0 < 2 * fast_error < error for fast_error, error in zip(*errors, strict=True))


@pytest.mark.parametrize("reversible", [False, True], ids=["stored", "reversible"])
def test_gradients_of_gradients(reversible, monkeypatch):
    # Start without cached constants, because those that a transform makes must not be kept.
    monkeypatch.setattr(linear, "_constants", {})
    model = TESTS.initialized(couplings).double()
    fast = copy.deepcopy(model)
    accelerate(fast, reversible=reversible)
    x = vectors(2, n=3).double()
    got, want = (torch.func.hessian(lambda x, m=m: m.log_prob(x).sum())(x) for m in (fast, model))
    peers.assert_close(got, want, terms=64, scale=1.0)
    penalties = []
    for m in (fast, model):
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(m.log_prob(x).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), [x, *m.parameters()]))
    for got, want in zip(*penalties, strict=True):
        peers.assert_close(got, want, terms=1024, scale=want.abs().max().item())


def test_inference_mode(monkeypatch):
    """A model is built and computes there, and trains afterwards."""
    monkeypatch.setattr(linear, "_constants", {})
    y = torch.arange(4) % 3
    with torch.inference_mode():
        model = TESTS.initialized(glow)
        fast = copy.deepcopy(model)
        accelerate(fast)
        torch.testing.assert_close(fast.log_prob(images(), y), model.log_prob(images(), y))
    fast = TESTS.initialized(glow)
    accelerate(fast)
    fast.log_prob(images(), y).sum().backward()
    assert all(p.grad is not None for p in fast.q0[0].parameters())


@pytest.mark.parametrize(
    "make", [lambda: couplings(layers=2), lambda: splines(layers=1)], ids=["affine", "splines"]
)
def test_compiles_whole(make):
    torch.compiler.reset()
    model = TESTS.initialized(make)
    fast = copy.deepcopy(model)
    accelerate(fast)
    compiled = torch.compile(fast.log_prob, backend="aot_eager", fullgraph=True)
    gradients = []
    for log_prob, m in ((compiled, fast), (model.log_prob, model)):
        x = TESTS.inputs(model)[0].requires_grad_()
        value = log_prob(x)
        gradients.append([value, *torch.autograd.grad(value.sum(), [x, *m.parameters()])])
    for got, want in zip(*gradients, strict=True):
        peers.assert_close(got, want, terms=64 * 64, scale=1.0)


def test_sets_actnorm_where_it_is_compiled():
    """The graph breaks at the initialization, as that of the original does."""
    torch.compiler.reset()
    torch.manual_seed(0)
    block = nf.flows.GlowBlock(4, 8)
    fast = copy.deepcopy(block)
    accelerate(fast)
    z, log_det = torch.compile(fast.inverse, backend="eager")(images(c=4))
    want, log_want = block.inverse(images(c=4))
    torch.testing.assert_close(z, want)
    torch.testing.assert_close(log_det, log_want)
    assert fast.flows[2].s.any()


def assert_exports(model, method, *inputs):
    """torch.export exports a method of a model, and the program equals it."""
    with torch.no_grad():
        program = torch.export.export(_Method(model, method), inputs)
        torch.testing.assert_close(program.module()(*inputs), getattr(model, method)(*inputs))


def test_exports(monkeypatch):
    """The original does not export, since it branches on whether its actnorms are initialized."""
    # Start without cached constants, because those that an export makes must not be kept.
    monkeypatch.setattr(linear, "_constants", {})
    model = TESTS.initialized(glow)
    accelerate(model)
    assert_exports(model, "inverse_and_log_det", images())
    z, _ = model.inverse_and_log_det(images())
    assert_exports(model, "forward_and_log_det", [latent.detach() for latent in z])
    model = TESTS.initialized(lambda: splines(layers=1))
    accelerate(model)
    assert_exports(model, "inverse_and_log_det", *TESTS.inputs(model))
