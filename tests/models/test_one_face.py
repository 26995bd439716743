"""The methods of all models take the same arguments, with the same meaning."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import normal, perturbed
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, TransformedDistribution
from torch.distributions.transforms import SigmoidTransform

from benchmarks.manifold.peers import Autoencoder
from mflow_kernels import (
    FlowStep,
    Glow,
    HierarchicalFlow,
    ManifoldFlow,
    ReversibleChain,
    VectorFlow,
)
from mflow_kernels.layers.flow import Flow
from mflow_kernels.models.chart import Chart
from mflow_kernels.testing import assert_close

K = 2  # context channels


def glow():
    return Glow((1, 4, 4), 2, 1, 4, context_channels=K)


def vectors(dim=3):
    return VectorFlow(dim, 2, 4, context_channels=K)


def chain():
    steps = [FlowStep(3, width=4, spatial_dims=0, context_channels=K) for _ in range(2)]
    return ReversibleChain(steps, input_shape=(3,))


MODELS = {
    "Glow": glow,
    "VectorFlow": vectors,
    "ReversibleChain": chain,
    "ManifoldFlow": lambda: ManifoldFlow(glow(), 5),
    "ManifoldFlow of a chain": lambda: ManifoldFlow(chain(), 2),
    "HierarchicalFlow": lambda: HierarchicalFlow(
        [ManifoldFlow(glow(), 5), ManifoldFlow(vectors(5), 3)]
    ),
}


@pytest.fixture(params=MODELS)
def model(request) -> Flow | Chart:
    torch.manual_seed(0)
    return perturbed(MODELS[request.param]()).double().eval()


@pytest.fixture
def x(model) -> Tensor:
    return normal(4, *model.input_shape, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(context: Tensor) -> Tensor:
    return F.one_hot(context, K).double()


def staged(model: nn.Module) -> dict[str, int]:
    return {"stage": 1} if isinstance(model, HierarchicalFlow) else {}


# `flow(x, context)`, its inverse and `initialize` pass further arguments on, as every bijection.
BY_POSITION = {"forward", "inverse", "initialize"}
BY_KEYWORD = {"context": None, "temperature": 1.0, "generator": None, "stages": None}


@pytest.mark.parametrize(
    "kind", [ReversibleChain, Glow, VectorFlow, Chart, ManifoldFlow, HierarchicalFlow, Autoencoder]
)
def test_arguments_have_one_place_and_one_default(kind):
    found = 0
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name.startswith("_") or (issubclass(kind, Flow) and name in BY_POSITION):
            continue
        for parameter in inspect.signature(method).parameters.values():
            if parameter.name in (*BY_KEYWORD, "stage") and (name, parameter.name) != (
                "distribution",
                "context",
            ):
                found += 1
                assert parameter.kind is parameter.KEYWORD_ONLY, (name, parameter.name)
                default = BY_KEYWORD.get(parameter.name, parameter.empty)
                assert parameter.default == default, (name, parameter.name)
    assert found > 5


ONE_FOR_ALL = {
    "int": 1,
    "name": "square",
    "no axes": torch.tensor(1),
    "length 1": torch.tensor([1]),
    "vector": vector(torch.tensor([1])),
}


def test_one_context_serves_all_samples(model, x):
    model.class_names = ("circle", "square")
    each = torch.ones(4, dtype=torch.int64)
    calls = {
        "log_prob": lambda c: model.log_prob(x, context=c),
        "sample": lambda c: model.sample(4, context=c, generator=seeded()),
        "sample_and_log_prob": lambda c: model.sample_and_log_prob(
            4, context=c, generator=seeded()
        )[1],
    }
    if isinstance(model, Chart):
        u = normal(4, model.manifold_dim, dtype=torch.float64)
        calls |= {
            "encode": lambda c: model.encode(x, context=c),
            "decode": lambda c: model.decode(u, context=c),
            "density": lambda c: model.manifold_log_prob(x, context=c).value,
            "interpolate": lambda c: model.interpolate(x, x.flip(0), 3, context=c),
            "initialize": lambda c: model.initialize(x, context=c, **staged(model))[1],
        }
    elif not isinstance(model, ReversibleChain):
        z = tuple(part.detach() for part in model(x, each)[0])
        calls |= {
            "forward": lambda c: model(x, c)[1],
            "inverse": lambda c: model.inverse(z, c)[0],
            "initialize": lambda c: model.initialize(x, c)[1],
        }
    forms = ONE_FOR_ALL | {"names": ["square"] * 4, "integers": F.one_hot(each, K)}
    for name, call in calls.items():
        want = call(each)
        for form, context in forms.items():
            assert torch.equal(call(context), want), (name, form)
        if name != "interpolate":
            assert not torch.allclose(want, call(1 - each)), name


def noting(seen: list[str], name: str, run: Callable[..., object]) -> Callable[..., object]:
    def noted(*args: object) -> object:
        seen.append(name)
        return run(*args)

    return noted


def passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every later pass through a flow of the model adds its direction."""
    seen: list[str] = []
    charts = [m for m in model.modules() if isinstance(m, ManifoldFlow)]
    for flow in [chart.flow for chart in charts] or [model]:
        monkeypatch.setattr(flow, "forward", noting(seen, "forward", flow.forward))
        monkeypatch.setattr(flow, "inverse", noting(seen, "inverse", flow.inverse))
    return seen


def test_samples_with_their_density(model, monkeypatch):
    context = vector(torch.tensor([0, 1, 1, 0, 1]))
    off = {"off_manifold": True} if isinstance(model, Chart) else {}
    for temperature in (1.0, 0.5):
        how = {"context": context, "temperature": temperature}
        x, log_prob = model.sample_and_log_prob(5, **how, generator=seeded())
        assert torch.equal(x, model.sample(5, **how, generator=seeded(), **off))
        assert_close(log_prob, model.log_prob(x, context=context), terms=10_000)
    seen = passes(model, monkeypatch)
    model.sample_and_log_prob(5, context=context)
    assert seen == ["inverse"] * (2 if isinstance(model, HierarchicalFlow) else 1)


def test_gradients_of_samples_and_their_density(model):
    """They are those of the two passes that `sample_and_log_prob` saves."""
    parameters = list(model.parameters())
    context = vector(torch.tensor([0, 1])).requires_grad_()
    x, log_prob = model.sample_and_log_prob(2, context=context, generator=seeded())
    loss = log_prob.sum() + x.sin().sum()
    got = torch.autograd.grad(loss, [*parameters, context], retain_graph=True)
    again = model.log_prob(x, context=context).sum() + x.sin().sum()
    want = torch.autograd.grad(again, [*parameters, context])
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, terms=10_000, scale=max(1.0, b.abs().max().item()))
    assert got[-1].any()
    assert not model.sample(2, context=context).requires_grad


def test_initialize_returns_the_latents_of_the_batch(model, x):
    """In every model: (z, logdet), as every layer does."""
    context = vector(torch.tensor([0, 1, 0, 1]))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "initialized"):
                module.initialized.zero_()
    if isinstance(model, Flow):
        (z, logdet), (want, want_logdet) = model.initialize(x, context), model(x, context)
    else:
        z, logdet = model.initialize(x, context=context, **staged(model))
        stage, state = model, x
        if isinstance(model, HierarchicalFlow):
            stage, state = model.stages[1], model.encode(x, stages=1, context=context)
        want, want_logdet = stage.latents(state, context=context)
    torch.testing.assert_close((z, logdet), (want, want_logdet), rtol=0, atol=0)


def test_the_temperature_scales_every_draw(model):
    context = vector(torch.tensor([1]))
    for draw in (model.sample, lambda *a, **k: model.sample_and_log_prob(*a, **k)[0]):
        cold = draw(3, context=context, temperature=0.0)
        assert_close(cold, cold[:1].expand_as(cold), terms=100)
        with pytest.raises(ValueError, match="temperature: expected a finite number >= 0, got -1"):
            draw(1, context=context, temperature=-1.0)


class TestDistribution:
    def test_it_is_the_density_of_the_model(self, model, x):
        context = vector(torch.tensor([0, 1, 1, 0]))
        p = model.distribution(context, generator=seeded())
        assert isinstance(p, Distribution)
        assert (p.batch_shape, p.event_shape) == ((4,), model.input_shape)
        assert torch.equal(p.log_prob(x), model.log_prob(x, context=context))
        drawn, _ = model.sample_and_log_prob(4, context=context, generator=seeded())
        assert torch.equal(p.sample(), drawn)
        assert p.sample((2, 3)).shape == (2, 3, 4, *model.input_shape)
        assert not p.sample().requires_grad
        assert p.has_rsample
        assert p.rsample().requires_grad

    def test_one_density_has_no_batch_axis(self):
        flow, x = perturbed(vectors()).double(), normal(2, 4, 3, dtype=torch.float64)
        for one in (1, torch.tensor(1)):
            p = flow.distribution(one)
            assert (p.batch_shape, p.sample((5,)).shape) == ((), (5, 3))
            assert torch.equal(p.log_prob(x)[0], flow.log_prob(x[0], context=1))
            assert p.log_prob(x[0, 0]).shape == ()
            assert p.expand((4,)).sample((5,)).shape == (5, 4, 3)

    def test_leading_axes_broadcast(self, model):
        context = vector(torch.tensor([0, 1]))
        p = model.distribution(context)
        x = normal(3, 1, *model.input_shape, dtype=torch.float64)
        got = p.log_prob(x)
        assert got.shape == (3, 2)
        for i in range(2):
            assert_close(got[:, i], model.log_prob(x[:, 0], context=context[i : i + 1]), terms=100)
        wide = p.expand((3, 2))
        assert wide.sample().shape == (3, 2, *model.input_shape)
        assert torch.equal(wide.log_prob(x), got)
        for shape in ((), (3, *model.input_shape), (2, 7)):
            with pytest.raises(ValueError, match="value: expected leading axes that broadcast"):
                p.log_prob(torch.zeros(shape, dtype=torch.float64))

    def test_it_enters_other_distributions(self, model):
        context = vector(torch.tensor([0, 1]))
        p = model.distribution(context)
        both = Independent(p, 1)
        x = both.sample((3,))
        assert_close(both.log_prob(x), p.log_prob(x).sum(1), terms=10)
        squashed = TransformedDistribution(p, [SigmoidTransform()])
        y = squashed.sample((3,))
        back = (y / (1 - y)).log()
        slope = (y * (1 - y)).log().flatten(2).sum(2)
        assert_close(squashed.log_prob(y), p.log_prob(back) - slope, terms=10_000)

    def test_a_chain_without_a_shape_has_none(self):
        step = FlowStep(3, width=4, spatial_dims=0)
        with pytest.raises(ValueError, match=r"input_shape: .* give it to the constructor"):
            ReversibleChain([step]).distribution()


def test_names_of_classes(model, x):
    for expected, call in (
        ("no name without class_names, got 'circle'", lambda: model.sample(1, context="circle")),
        ("no name without class_names, got 'circle'", lambda: model.distribution("circle")),
    ):
        with pytest.raises(ValueError, match=f"context: expected {expected}"):
            call()
    model.class_names = ["circle", "square"]
    for context in ("cube", ["circle", "cube", "circle", "circle"]):
        with pytest.raises(ValueError, match="context: expected one of circle, square, got 'cube'"):
            model.log_prob(x, context=context)
    with pytest.raises(ValueError, match="context: expected "):
        model.log_prob(x, context=["circle", "square"])  # for four samples
    p = model.distribution(["circle", "square", "square", "circle"])
    assert p.batch_shape == (4,)
    assert torch.equal(p.log_prob(x), model.log_prob(x, context=torch.tensor([0, 1, 1, 0])))
    assert torch.equal(model.distribution("square").log_prob(x), model.log_prob(x, context=1))


class Net(nn.Module):
    """A network of the caller that requires a context."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.x, self.c = nn.Linear(in_channels, out_channels), nn.Linear(5, out_channels)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.x(x) + self.c(label)


def own_networks(kind: str) -> Flow | Chart:
    flow: Flow = VectorFlow(3, 1, network=Net)
    if kind == "ReversibleChain":
        flow = ReversibleChain([FlowStep(3, Net(1, 4))], input_shape=(3,))
    return ManifoldFlow(flow, 2) if kind == "ManifoldFlow" else flow


@pytest.mark.parametrize("kind", ["VectorFlow", "ReversibleChain", "ManifoldFlow"])
def test_a_context_that_a_network_misses_is_named(kind):
    model, x = own_networks(kind), normal(4, 3)
    calls = [
        lambda **c: model.log_prob(x, **c),
        lambda **c: model.sample(4, **c),
        lambda **c: model.sample_and_log_prob(4, **c),
        lambda **c: model.distribution(**c).log_prob(x),
    ]
    if kind == "VectorFlow":
        calls += [lambda **c: model(x, **c), lambda **c: model.initialize(x, **c)]
    for call in calls:
        with pytest.raises(TypeError, match="context: expected the argument 'label' of Net, got n"):
            call()
        call(context=normal(1, 5))


def test_points_store_their_activations():
    assert not VectorFlow(2, 1, 4).chain.reversible
    assert VectorFlow(2, 1, 4, reversible=True).chain.reversible
    assert Glow((1, 4, 4), 1, 1, 4).chain.reversible
