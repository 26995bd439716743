"""The methods of all models take the same arguments, with the same meaning."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from cases import normal, perturbed
from tiny_runs import spy
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, TransformedDistribution
from torch.distributions.transforms import SigmoidTransform

from benchmarks.manifold.peers import Autoencoder
from mflow_kernels import (
    FlowStep,
    Glow,
    HierarchicalFlow,
    Jet,
    ManifoldFlow,
    ManifoldObjective,
    ReversibleChain,
    VectorFlow,
    local_dimension,
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
    "Jet": lambda: Jet((1, 4, 4), 2, 3, 1, 4, 2, context_channels=K),
    "VectorFlow": vectors,
    "ReversibleChain": chain,
    "ManifoldFlow": lambda: ManifoldFlow(glow(), 5),
    "ManifoldFlow of a chain": lambda: ManifoldFlow(chain(), 2),
    "HierarchicalFlow": lambda: HierarchicalFlow(
        [
            ManifoldFlow(glow(), 5, objective=ManifoldObjective("data", weight=10.0)),
            ManifoldFlow(vectors(5), 3),
        ]
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


def test_each_sample_has_its_own_context_and_one_serves_all(model, x):
    model.class_names = ("circle", "square")
    each, mixed = torch.ones(4, dtype=torch.int64), torch.tensor([0, 1, 1, 0])
    staged = {"stage": 1} if isinstance(model, HierarchicalFlow) else {}
    calls = {
        "log_prob": lambda c: model.log_prob(x, context=c),
        "sample": lambda c: model.sample(4, context=c, generator=seeded()),
        "sample_and_log_prob": lambda c: model.sample_and_log_prob(
            4, context=c, generator=seeded()
        )[1],
        "distribution": lambda c: model.distribution(c).log_prob(x),
        "dimension": lambda c: local_dimension(model, x, 0.5, context=c).value,
    }
    if isinstance(model, Chart):
        u = normal(4, model.manifold_dim, dtype=torch.float64)
        calls |= {
            "encode": lambda c: model.encode(x, context=c),
            "decode": lambda c: model.decode(u, context=c),
            "density": lambda c: model.manifold_log_prob(x, context=c).value,
            "interpolate": lambda c: model.interpolate(x, x.flip(1), 3, context=c).movedim(1, 0),
            "deviation": lambda c: torch.tensor(model.deviation(x, context=c)),
            "initialize": lambda c: model.initialize(x, context=c, **staged)[1],
            "terms": lambda c: model.terms(x, context=c, **staged).loss,
            "project": lambda c: model.project(x, context=c),
            "distance": lambda c: model.distance(x, context=c),
            "OOD score": lambda c: model.ood_score(x, 0.1, context=c),
        }
        if staged:
            calls["released"] = lambda c: model.terms(x, stage=1, release=True, context=c).loss
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
        other = call(1 - each)
        assert not torch.allclose(want, other, rtol=1e-4), name
        if want.dim():  # `deviation` is that of all samples
            joined = torch.where((mixed > 0).view(4, *[1] * (want.dim() - 1)), want, other)
            scale = joined.abs().max().item()
            assert_close(call(mixed), joined, terms=10_000, scale=scale, name=name)


def test_samples_with_their_density(model, monkeypatch):
    context = vector(torch.tensor([0, 1, 1, 0, 1]))
    off = {"off_manifold": True} if isinstance(model, Chart) else {}
    for temperature in (1.0, 0.5):
        how = {"context": context, "temperature": temperature}
        x, log_prob = model.sample_and_log_prob(5, **how, generator=seeded())
        assert torch.equal(x, model.sample(5, **how, generator=seeded(), **off))
        assert_close(log_prob, model.log_prob(x, context=context), terms=10_000)
    seen: list[str] = []
    charts = [m for m in model.modules() if isinstance(m, ManifoldFlow)]
    for flow in [chart.flow for chart in charts] or [model]:
        for name in ("forward", "inverse"):
            spy(monkeypatch, flow, name, lambda *_, name=name: seen.append(name))
    model.sample_and_log_prob(5, context=context)
    assert seen == ["inverse"] * max(1, len(charts))


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
        staged, stage, state = {}, model, x
        if isinstance(model, HierarchicalFlow):
            staged["stage"] = 1
            stage, state = model.stages[1], model.encode(x, stages=1, context=context)
        z, logdet = model.initialize(x, context=context, **staged)
        want, want_logdet = stage.latents(state, context=context)
    torch.testing.assert_close(z, want, rtol=0, atol=0)
    # With and without gradients, steps add their log-determinants in different orders.
    assert_close(logdet, want_logdet, terms=x[0].numel())


def coordinates(model: Flow | Chart, x: Tensor, context: Tensor) -> Tensor:
    """The numbers that a sample is drawn from: u, or all latents."""
    if isinstance(model, Chart):
        return model.encode(x, context=context)
    z, _ = model(x, context.expand(len(x), K))
    return torch.cat([part.flatten(1) for part in (z if isinstance(z, tuple) else (z,))], 1)


def test_draws_repeat_with_their_generator_and_scale_with_the_temperature(model):
    context = vector(torch.tensor([1]))
    for draw in (model.sample, lambda *a, **k: model.sample_and_log_prob(*a, **k)[0].detach()):

        def of(seed, temperature=1.0, draw=draw):
            how = {"context": context, "temperature": temperature}
            return draw(3, **how, generator=seeded(seed))

        x = of(1)
        assert (x.shape, x.dtype) == ((3, *model.input_shape), torch.float64)
        assert torch.equal(of(1), x)
        assert not torch.equal(of(2), x)
        cold = of(1, 0.0)
        assert_close(cold, cold[:1].expand_as(cold), terms=100)
        warm, cool = (coordinates(model, each, context) for each in (of(1), of(1, 0.5)))
        assert_close(cool, warm / 2, terms=10_000, scale=warm.abs().max().item())
        for temperature in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="temperature: expected a finite number >= 0, got"):
                of(1, temperature)
    assert not model.sample(2, context=context).requires_grad
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        model.sample(0, context=context)


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
