"""What is particular to MaskedAutoregressive: orders, contexts, networks, and flows of it."""

import pytest
import torch
from cases import compiles, normal, not_about_kernels, perturbed

from mflow_kernels import MaskedAutoregressive, ReversibleChain, VectorFlow
from mflow_kernels.testing import assert_close, check_bijection


@pytest.mark.parametrize("transform", ["affine", "spline"])
@pytest.mark.parametrize("order", [None, [3, 1, 0, 2]])
def test_a_variable_depends_on_those_before_it(transform, order):
    layer = perturbed(MaskedAutoregressive(4, transform, width=9, order=order)).double()
    x = normal(4).double() / 2
    jacobian = torch.func.jacrev(lambda x: layer(x[None])[0][0])(x)
    place = torch.tensor(order or [0, 1, 2, 3]).argsort()
    before = place[:, None] > place
    assert jacobian[before].abs().min() > 0
    assert not jacobian[~(before | torch.eye(4, dtype=torch.bool))].any()


@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_it_starts_as_the_identity(transform):
    layer, x = MaskedAutoregressive(5, transform, width=7, context_channels=2), normal(6, 5)
    for call in (layer, layer.inverse):
        y, logdet = call(x, normal(6, 2))
        assert_close(y, x.double(), terms=25, scale=4.0)
        assert_close(logdet, torch.zeros(6).double(), terms=50, scale=1.0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_networks(residual, depth):
    how = {"width": 6, "depth": depth, "residual": residual, "activation": "elu"}
    check_bijection(MaskedAutoregressive(3, **how), (4, 3))
    hidden = [m for m in MaskedAutoregressive(3, **how).modules() if type(m) is torch.nn.Linear]
    assert len(hidden) == 2 + (2 * depth if residual else depth - 1)


@pytest.mark.parametrize("residual", [False, True])
def test_a_context_has_gradients_both_ways(residual):
    layer = MaskedAutoregressive(
        3, width=6, residual=residual, activation="tanh", context_channels=2
    )
    layer = perturbed(layer).double()
    x, context = normal(5, 3).double(), normal(5, 2).double().requires_grad_()
    z, logdet = layer(x, context)
    back, minus = layer.inverse(z, context)
    assert_close(back, x, terms=64, scale=4.0)
    assert_close(minus, -logdet, terms=64, scale=4.0)
    # x does not depend on the context if z follows it.
    weights = normal(5, 3).double()
    (grad,) = torch.autograd.grad((back * weights).sum(), context)
    assert_close(grad, torch.zeros_like(grad), terms=1024, scale=4.0)
    (own,) = torch.autograd.grad((layer(x, context)[0] * weights).sum(), context)
    assert own.abs().max() > 0


@not_about_kernels
def test_one_node_of_autograd_each_way():
    """The gradient of the inverse is no graph of D passes."""
    layer = perturbed(MaskedAutoregressive(20, width=8))
    for call in (layer, layer.inverse):
        y, _ = call(normal(3, 20))
        names, nodes = set(), [y.grad_fn]
        while nodes:
            node = nodes.pop()
            names.add(node.name())
            nodes += [before for before, _ in node.next_functions if before is not None]
        assert names == {"_MapBackward", "torch::autograd::AccumulateGrad"}


@not_about_kernels
def test_a_flow_learns_and_samples():
    """A flow of two layers fits a strong dependence, in both directions of time."""
    torch.manual_seed(0)
    flow = VectorFlow(2, 2, 16, autoregressive=True, scale="softplus")
    assert [layer.order for layer in flow.chain.layers] == [(0, 1), (1, 0)]
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> torch.Tensor:
        u = torch.randn(n, 2, generator=generator)
        return torch.stack([u[:, 0], u[:, 0].square() / 2 + u[:, 1] / 4], 1)

    for _ in range(200):
        optimizer.zero_grad()
        (-flow.log_prob(draw(256)).mean()).backward()
        optimizer.step()
    x = flow.sample(4000, generator=torch.Generator().manual_seed(2))
    rest = x[:, 1] - x[:, 0].square() / 2
    assert abs(rest.std().item() - 0.25) < 0.1
    assert abs(rest.mean().item()) < 0.1


def test_classes_reach_the_networks_of_a_flow():
    flow = perturbed(VectorFlow(3, 2, 4, autoregressive=True, context_channels=2))
    x = normal(4, 3)
    one_hot = torch.eye(2)[[0, 1, 1, 0]]
    got = flow.log_prob(x, context=torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(got, flow.log_prob(x, context=one_hot), rtol=0, atol=0)
    chain = ReversibleChain(list(flow.chain.layers), reversible=True)
    torch.testing.assert_close(chain(x, one_hot)[1], flow(x, one_hot)[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"features": 0}, ValueError, "features: expected at least 1, got 0"),
        ({"transform": "cubic"}, ValueError, "transform: expected one of affine, spline"),
        ({"order": [0, 0, 1]}, ValueError, r"order: expected the numbers 0 to 2, got \(0, 0, 1\)"),
        ({"activation": "sine"}, ValueError, "activation: expected one of relu"),
        ({"width": 0}, ValueError, "width: expected at least 1, got 0"),
        ({"tails": None}, TypeError, "tails: expected only with transform='spline'"),
        ({"transform": "spline", "bins": 1}, ValueError, "bins: expected 2 to 64, got 1"),
        ({"context_channels": -1}, ValueError, "context_channels: expected at least 0"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        MaskedAutoregressive(**({"features": 3} | options))


@pytest.mark.parametrize("call", ["forward", "inverse"])
def test_bad_states_and_contexts(call):
    plain, conditional = (
        getattr(MaskedAutoregressive(3, width=4, context_channels=k), call) for k in (0, 2)
    )
    x, context = torch.zeros(4, 3), torch.zeros(4, 2)
    name = "x" if call == "forward" else "z"
    for error, words, run in (
        (ValueError, f"{name}: expected shape .N, 3.", lambda: plain(torch.zeros(4, 2))),
        (ValueError, f"{name}: expected shape .N, 3.", lambda: plain(torch.zeros(4, 3, 2))),
        (TypeError, f"{name}: expected the network's dtype float32", lambda: plain(x.double())),
        (TypeError, "context: expected none", lambda: plain(x, context)),
        (TypeError, r"context: expected vectors \(N, 2\), got none", lambda: conditional(x)),
        (ValueError, r"context: expected shape \(4, 2\), got \(4, 3\)", lambda: conditional(x, x)),
    ):
        with pytest.raises(error, match=words):
            run()


@compiles
def test_both_directions_compile_whole():
    torch.compiler.reset()
    layer, x = perturbed(MaskedAutoregressive(4, width=5)), normal(3, 4)
    z, logdet = layer(x)
    back, minus = layer.inverse(z)  # finds the degrees, which compilers cannot read from masks
    for call, given, want in ((layer, x, (z, logdet)), (layer.inverse, z, (back, minus))):
        got = torch.compile(call, backend="aot_eager", fullgraph=True)(given)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b.double(), terms=64, scale=4.0)


def test_a_flow_with_networks_of_its_own_is_refused():
    with pytest.raises(ValueError, match="network: expected None with autoregressive"):
        VectorFlow(3, 1, autoregressive=True, network=lambda *_: torch.nn.Identity())
