"""The known densities of the manifold benchmark, and a small part of the benchmark itself."""

import math

import pytest
import torch

from benchmarks.manifold import methods, points
from benchmarks.manifold.__main__ import main
from benchmarks.manifold.factors import elbow
from benchmarks.manifold.mixture_flow import MixtureFlow
from benchmarks.manifold.output import markdown
from benchmarks.manifold.points import NOISE, OURS_HIERARCHY, Task, build, divergence
from benchmarks.manifold.targets import TARGETS
from mflow_kernels.testing import check_bijection

targets = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, dtype=torch.float64)


@targets
def test_samples_lie_on_the_manifold_and_nearest_points_are_nearest(target):
    on = target.sample(20_000, torch.Generator().manual_seed(0))
    assert target.distance(on).max() < 1e-12
    off = on[:200] + normal(200, 3, scale=0.3)
    # No sample is nearer than the nearest point, and the nearest point lies on the manifold.
    assert (torch.cdist(off, on).min(1).values >= target.distance(off) - 1e-9).all()
    assert target.distance(target.nearest(off)).max() < 1e-9


@targets
def test_densities_integrate_to_one_and_agree_with_samples(target):
    """E_q[p / q] = 1 and E_q[p / q x] = E_p[x], where q is uniform over the coordinates."""
    n = 200_000
    if target.name == "circle":
        angle = 2 * math.pi * torch.rand(n, dtype=torch.float64)
        x = torch.stack([angle.cos(), angle.sin()], 1) @ target.axes[:2]
        area = torch.full((n,), 2 * math.pi, dtype=torch.float64)
    elif target.name == "sphere":
        x = torch.nn.functional.normalize(normal(n, 3))
        area = torch.full((n,), 4 * math.pi, dtype=torch.float64)
    else:
        flat = 6 * torch.rand(n, 2, dtype=torch.float64) - 3
        x = torch.cat([flat, flat.square().sum(1, keepdim=True) / 2], 1)
        area = 36 * (1 + flat.square().sum(1)).sqrt()
    weight = (target.log_density(x).exp() * area)[:, None]
    samples = target.sample(n, torch.Generator().manual_seed(1))
    for values, expected in ((weight, torch.ones(1)), (weight * x, samples.mean(0))):
        error = values.std(0) / math.sqrt(n) + samples.std(0).max() / math.sqrt(n)
        assert ((values.mean(0) - expected).abs() < 5 * error).all()


def test_the_divergence_of_true_samples_is_small_and_of_others_is_not():
    target = TARGETS["sphere"]
    true = target.sample(points.SAMPLES, torch.Generator().manual_seed(2))
    assert divergence(target, true) < 0.02  # (CELLS - 1) / (2 SAMPLES) = 0.005 is expected
    assert divergence(target, torch.nn.functional.normalize(normal(points.SAMPLES, 3))) > 0.3


def test_the_mixture_flow_is_a_bijection():
    flow = MixtureFlow()
    x = torch.cat([normal(200, 1), normal(200, 1, scale=0.3) + 3])
    flow.initialize(x)
    check_bijection(flow, (4, 1))
    (z,), _ = flow(x)
    assert z.std().item() == pytest.approx(1.0, abs=0.2)


def test_a_circle_is_recovered():
    """Distances are in units of the radius (the noise is 0.05), densities in nats.

    The worst of the benchmark's three seeds reaches 0.027, 0.013, 0.014, 0.25 and 0.07 after 600
    steps. The bounds are about twice that, because rounding differs between machines and training
    amplifies it. Samples of a plain flow are 0.1 away.
    """
    target = TARGETS["circle"]
    generator = torch.Generator().manual_seed(0)
    method = build(Task("circle", NOISE, OURS_HIERARCHY, 0, 0), target, generator)
    methods.train(method, points.batches(target, NOISE, generator), 600, points.RATE)
    figures = points.measure(method, target, NOISE, ambient=False)
    assert figures["sample_distance"] < NOISE
    assert figures["projection_distance"] < NOISE / 2
    assert figures["reconstruction"] < NOISE / 2
    assert figures["density_error"] < 0.4
    assert figures["divergence"] < 0.15


def test_pie_is_the_penalized_likelihood_in_the_latent_domain():
    flow = points.VectorFlow(3, 2, 8)
    x = normal(16, 3).float()
    flow.initialize(x)
    pie = methods.pie(flow, 2, deviation=0.1).phases[0].loss(x)
    latents, logdet = flow(x)
    v, u = latents[0][:, :1], latents[0][:, 1:]
    by_hand = 100 * v.square().sum(1) / 2 + (u.square() / 2).sum(1) + math.log(2 * math.pi) - logdet
    torch.testing.assert_close(pie, by_hand)


def test_each_phase_trains_only_its_stage():
    flow, further = points.VectorFlow(3, 2, 8), points.VectorFlow(2, 2, 8)
    method = methods.two_phases(flow, 2, further)
    target = TARGETS["paraboloid"]
    data = points.batches(target, 0.0, torch.Generator().manual_seed(0))
    manifold, density = method.phases
    manifold.initialize(next(data))
    method.model.stages[1].initialize(method.model.stages[0].encode(next(data)).detach())
    density.loss(next(data)).mean().backward()
    assert all(p.grad is None for p in flow.parameters())
    assert all(p.grad is not None for p in further.parameters())


def test_elbow():
    assert elbow({1: 1.0, 2: 0.1, 3: 0.01, 4: 0.009, 5: 0.008}) == 3
    assert elbow({1: 1.0, 2: 0.5, 3: 0.26, 4: 0.14, 5: 0.08}) is None


def test_tables_show_a_dash_for_missing_values():
    rows = [{"m": "a", "x": 1.0}, {"m": "a", "x": 3.0}, {"m": "b", "x": None}]
    lines = markdown(rows, {"m": "method"}, {"x": ("x", ".1f")}).splitlines()
    assert lines[2:] == ["| a | 2.0 ± 1.4 |", "| b | - |"]


def test_unknown_parts_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nothing", "--out", str(tmp_path)])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
