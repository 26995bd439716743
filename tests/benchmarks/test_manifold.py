"""The comparison of manifold flows: its methods, figures, sweep, tables and pictures."""

import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn

from benchmarks.manifold import figures, pictures, tables, training, uses
from benchmarks.manifold.__main__ import main
from benchmarks.manifold.comparison import BATCH, Comparison, Settings, about_runs, finals
from benchmarks.manifold.gaussians import gaussians
from benchmarks.manifold.judge import Judge, judge
from benchmarks.manifold.methods import NORMAL, RECIPES
from benchmarks.manifold.networks import SHAPE
from benchmarks.manifold.output import Store, fill_in, markdown
from benchmarks.manifold.peers import VariationalAutoencoder
from benchmarks.manifold.principal_components import PrincipalComponents
from benchmarks.manifold.sets import SETS, Images, Part
from benchmarks.manifold.tarflow import TarFlow, VectorTarFlow
from mflow_kernels import ManifoldFlow, ManifoldObjective, WeightSchedule
from mflow_kernels.testing import assert_close, check_bijection


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, dtype=torch.float64)


def test_the_most_probable_image_of_a_gaussian():
    """-log p(y) + |y - x|^2 / (2 s^2) of a standard normal p has its minimum at x / (1 + s^2)."""

    class Gaussian(nn.Module):
        def log_prob(self, y):
            return -y.square().flatten(1).sum(1) / 2

    x, known = torch.randn(3, 1, 4, 4) / 4, torch.arange(16).view(4, 4) % 3 > 0
    method = training.Method(Gaussian(), [], density=True, ambient=True)
    found = uses.most_probable_image(method, x, known, 0.5)
    assert (found - torch.where(known, x / 1.25, 0.0)).abs().max() < 1e-3


def test_the_table_of_uses_has_the_methods_in_order(tmp_path):
    store = Store(tmp_path)
    images = torch.zeros(12, 1, 16, 16).int().tolist()
    for name in reversed(uses.METHODS):
        figures = dict.fromkeys(uses.METRICS, 0.25) | {"method": name, "seed": 0}
        picture = {"picture": {"digits": images, "half": images, "half filled": images}}
        store.row(f"uses-{name}-seed0", lambda row=figures | picture: row)
    lines = uses.report(store)["digits-uses"].splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == [*uses.METHODS]
    assert (tmp_path / "uses_digits.png").exists()


def test_tarflow_is_a_bijection():
    image = TarFlow((1, 4, 4), patch=2, blocks=3, layers=2, width=8, heads=2)
    vector = VectorTarFlow(8, channels=2, blocks=3, layers=1, width=8, heads=2)
    for flow, tokens in ((image, image), (vector, vector.tokens)):
        for block in tokens.blocks:
            for parameter in block.out[1].parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        check_bijection(flow, (3, *flow.input_shape))


def test_the_bound_of_a_linear_vae_is_its_likelihood():
    """x = a u + s e has a Gaussian posterior. If q is it, every importance weight is p(x)."""
    a, s = torch.tensor([1.0, 2.0]), 0.5
    precision = 1 + a @ a / s**2

    class Posterior(nn.Module):
        def forward(self, x):
            mean = (x @ a)[:, None] / s**2 / precision
            return torch.cat([mean, (-precision.log() / 2).expand_as(mean)], 1)

    class Likelihood(nn.Module):
        def forward(self, u):
            return torch.cat([u * a, torch.full((len(u), 2), math.log(s))], 1)

    model = VariationalAutoencoder(Posterior(), Likelihood(), (2,), 1, samples=3)
    x = torch.randn(5, 2)
    expected = torch.distributions.MultivariateNormal(
        torch.zeros(2, dtype=torch.float64), (a[:, None] * a + s**2 * torch.eye(2)).double()
    ).log_prob(x.double())
    assert_close(model.log_prob(x), expected, terms=20)
    assert_close(-model.loss(x), expected, terms=20)
    u = torch.randn(4, 1)
    drawn, log_p = model.lift(u, temperature=0.0)
    assert_close(drawn, (u * a).double(), terms=2)
    assert_close(log_p, torch.full((4,), -math.log(2 * math.pi * s**2)).double(), terms=4)


@pytest.fixture
def few_images(monkeypatch):
    """Let the comparison have few images, with one set beside them."""
    parts = [
        Part(part.images[:count], torch.arange(count) % 10)
        for part, count in zip(vars(SETS["digits"]()).values(), (200, 20, 20), strict=True)
    ]
    few = Images(*parts)
    monkeypatch.setitem(SETS, "few", lambda: few)
    noise = torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8)
    monkeypatch.setattr(figures, "beside_digits", lambda test, count: {"noise": noise})
    monkeypatch.setattr(figures, "MEASURED", 1)
    yield
    judge.cache_clear()


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_trains_and_is_measured(name, few_images):
    """After two steps of each phase, every figure is finite."""
    compared = Comparison("few", "few", 1.0, (1e-3,), (10.0,), 0)
    before, batches = compared._start(name, Settings(1e-3, 10.0), 0)
    steps = [2] * len(before.phases)
    method, _ = compared.fit(name, Settings(1e-3, 10.0), 0, steps)
    pairs = zip(before.model.parameters(), method.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs) == bool(steps)
    assert next(batches).shape == (BATCH, *SHAPE)
    found = figures.validate("few", method) | figures.measure("few", method)
    rows = [found | {"auroc_error": found["auroc"]["noise"]["error"]}]
    measured = ["score", "squared_error", "frechet_projections", "frechet_on", "auroc_error"]
    measured += ["bits", "frechet_off"] if method.density else []
    assert all(math.isfinite(rows[0][key]) for key in measured)
    for off in {False, method.density}:
        assert method.model.sample(4, off_manifold=off).shape == (4, *SHAPE)


def test_principal_components_are_the_gaussian_of_probabilistic_pca():
    """Its smallest variances are replaced by their mean (Tipping and Bishop 1999)."""
    torch.manual_seed(0)
    x = torch.randn(400, 5) * torch.tensor([3.0, 0.1, 1.0, 0.2, 2.0]) @ torch.randn(5, 5) + 1
    model = ManifoldFlow(PrincipalComponents(x, 2), 2, objective=NORMAL)
    exact = x.double().numpy()
    reference = PCA(2).fit(exact)
    # The whitened x is a sum of five products, and the log-density one of five squares.
    assert_close(model.log_prob(x), torch.from_numpy(reference.score_samples(exact)), terms=25)
    projected = torch.from_numpy(reference.inverse_transform(reference.transform(exact)))
    torch.testing.assert_close(model.project(x).double(), projected, atol=1e-4, rtol=1e-4)
    # With v drawn, samples have the covariance of the data, here within five standard errors.
    drawn = model.sample(100_000, off_manifold=True).double()
    covariance = torch.from_numpy(reference.get_covariance())
    assert ((drawn.T.cov() - covariance).abs() < 5 * 20 / 300).all()


def test_gaussians_without_training():
    """One has the covariance of the data, the other its diagonal and its largest components."""
    x = normal(500, 5) @ normal(5, 5) + 1
    covariance = x.T.cov()
    full, components = gaussians(x, 2).values()
    torch.testing.assert_close(full.covariance_matrix, covariance)
    rest = components.covariance_matrix - components.cov_factor @ components.cov_factor.T
    torch.testing.assert_close(rest, rest.diagonal().diag())
    torch.testing.assert_close(components.variance, covariance.diagonal())
    variances = torch.linalg.eigvalsh(covariance)[-2:]
    torch.testing.assert_close(torch.linalg.svdvals(components.cov_factor) ** 2, variances.flip(0))
    for density in (full, components):
        torch.testing.assert_close(density.mean, x.mean(0))


@pytest.mark.parametrize("best", [(2e-3, 10.0), (1.6e-2, 2.5), (2.5e-4, 80.0)])
def test_the_sweep_extends_its_grids_until_the_best_setting_is_inside(best, tmp_path, monkeypatch):
    """Trainings are replaced by a score with a known minimum. One rate has no finite score."""
    compared = Comparison("some", "digits", 1.0, (1e-3, 2e-3, 4e-3), (5.0, 10.0, 20.0), 3)

    def score(self, name, settings, seed, steps):
        if settings.rate > 0.03:
            return {"failed": "loss nan"}
        rate = settings.rate / RECIPES[name].slower
        pairs = zip((rate, settings.weight), best, strict=True)
        found = sum(abs(math.log(a / b)) for a, b in pairs)
        key = "bits" if RECIPES[name].by_likelihood else "score"
        return {"validation": {key: found}}

    monkeypatch.setattr(Comparison, "_train", score)
    monkeypatch.setattr(training, "step_seconds", lambda method, *_: [0.01] * len(method.phases))
    store = Store(tmp_path)
    chosen = compared.choose(store, [*RECIPES])
    untrained = "principal components, Gaussian"
    assert chosen[untrained] == (0.0, 1.0)
    rows = store.rows("some-run-")
    assert chosen["plain likelihood"] == (best[0], 10.0)  # it has no weight
    assert chosen["rectangular flow"] == best
    for name in RECIPES.keys() - {untrained}:
        swept = RECIPES[name].weighted and RECIPES[name].weight is None
        for key in ("rate", "weight") if swept else ("rate",):
            tried = {row[key] for row in rows if row["method"] == name}
            assert min(tried) < getattr(chosen[name], key) < max(tried)
            assert len(tried) <= 6
    # One second, at 0.01 s a step, in the shares of the phases.
    steps = {row["method"]: row["steps"] for row in rows}
    assert steps["plain likelihood"] == [100]
    assert steps["M-flow"] == [85, 15]
    assert {row["method"] for row in finals(store, "some")} == {*RECIPES} - {untrained}
    # A longer training starts at the rate found here and the next smaller one.
    longer = dataclasses.replace(compared, name="longer")
    assert longer.choose(store, ["M-flow"], chosen)["M-flow"] == chosen["M-flow"]
    tried = {row["rate"] for row in store.rows("longer-run-")}
    assert {chosen["M-flow"].rate, chosen["M-flow"].rate / 2} <= tried


def test_the_machine_of_a_run_is_the_one_that_recorded_it():
    """Not the machine that writes the tables; rows of earlier versions recorded none."""
    made = {"commit": "c", "date": "2026-11-27", "torch": "2"}
    recorded = {**made, "cpu": "4096 CPU cores (z80)"}
    text = "\nRuns: seeds 0; commits c; dates 2026-11-27; torch 2"
    assert about_runs([{"seed": 0, "made": made}]) == f"{text}.\n"
    rows = [{"seed": 0, "made": made}, {"seed": 0, "made": recorded}]
    assert about_runs(rows) == f"{text}; on 4096 CPU cores (z80).\n"


def test_finished_runs_are_not_repeated(tmp_path):
    made = []
    for _ in range(2):
        row = Store(tmp_path).row("a, b-rate0.1", lambda: made.append(1) or {"seed": 0, "x": 1.5})
        assert row["x"] == 1.5
        assert row["made"]["torch"] == torch.__version__
        assert row["made"]["cpu"].startswith(f"{os.cpu_count()} CPU cores (")
    assert len(made) == 1

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).row("c", stopped)
    assert not Store(tmp_path).has("c")
    assert len(list(tmp_path.iterdir())) == 1


def test_documents_take_the_tables_between_their_marks(tmp_path):
    folder, document = tmp_path / "runs", tmp_path / "docs" / "page.md"
    folder.mkdir()
    document.parent.mkdir()
    (folder / "digits.md").write_text("| new |\n")
    (folder / "frontier.png").write_bytes(b"picture")
    text = "a\n<!-- begin {0} -->\n{1}<!-- end {0} -->\n"
    picture = "![frontier](pictures/frontier.png)\n"
    document.write_text(
        text.format("digits", "| old |\n") + text.format("other", "kept\n") + picture
    )
    for _ in range(2):
        fill_in(document, folder)
        expected = text.format("digits", "| new |\n") + text.format("other", "kept\n") + picture
        assert document.read_text() == expected
    assert (document.parent / "pictures" / "frontier.png").read_bytes() == b"picture"


def test_the_frontier_shows_every_method_in_its_colour(tmp_path):
    """Made-up runs of every method, a seed each. A file of few colours must not merge them."""
    runs = [
        {"method": name, "seed": 0, "weight": 1.0, "squared_error": 0.01 * (i + 1), "bits": 3.0 + i,
         "frechet_on": 5.0 + i, "frechet_off": None}
        for i, name in enumerate(RECIPES)
    ]  # fmt: skip
    weights = [
        run | {"weight": 2.0, "bits": 4.0} for run in runs if RECIPES[run["method"]].weighted
    ]
    rows, others = {"digits": runs, "patches": runs}, {"digits": weights, "patches": []}
    pictures.draw_frontier(tmp_path / "frontier.png", rows, others)
    with Image.open(tmp_path / "frontier.png") as image:
        drawn = torch.tensor(np.array(image.convert("RGB"))).view(-1, 3).unique(dim=0)
    for recipe in RECIPES.values():
        colour = 255 * torch.tensor(to_rgb(recipe.colour))
        assert (drawn - colour).abs().amax(1).min() <= 16, recipe.colour


@pytest.mark.parametrize("name", SETS)
def test_image_sets_have_three_parts_without_common_images(name):
    images = SETS[name]()
    parts = (images.train, images.validation, images.test)
    assert [len(part.images) for part in parts] == [3500, 500, 1000]
    assert all(part.images.shape[1:] == (1, 16, 16) for part in parts)
    seen = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not seen[0] & (seen[1] | seen[2])
    assert not seen[1] & seen[2]
    classes = set(images.train.labels.tolist())
    assert all(set(part.labels.tolist()) == classes for part in parts)


def test_the_frechet_distance_is_that_of_gaussians():
    of_pixels = object.__new__(Judge)
    of_pixels.features = torch.nn.Flatten()
    a, b = (torch.randint(0, 256, (4000, 1, 1, 2), dtype=torch.uint8) for _ in range(2))
    a = a // 2  # half the mean and the deviation
    scaled = [part.flatten(1).double() / 128 - 1 for part in (a, b)]
    (m1, m2), (s1, s2) = zip(*((x.mean(0), x.std(0)) for x in scaled), strict=True)
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()  # if pixels are independent
    found = of_pixels.frechet(a, Part(b, torch.zeros(len(b))))
    assert found == pytest.approx(expected.item(), rel=0.01)
    assert of_pixels.frechet(b, Part(b, torch.zeros(len(b)))) == pytest.approx(0, abs=1e-6)


def test_tables_show_missing_values_and_failed_runs():
    rows = [{"m": "a", "x": 1.0}, {"m": "a", "x": 3.0}, {"m": "b", "x": None}]
    rows += [{"m": "c", "x": 1.0}, {"m": "c", "failed": "loss nan"}]
    lines = markdown(rows, {"m": "method"}, {"x": ("x", ".1f")}).splitlines()
    assert lines[2:] == ["| a | 2.0 ± 1.4 |", "| b | - |", "| c (1 of 2 failed) | 1.0 |"]


def test_differences_are_taken_seed_by_seed():
    """Two differences of 1 and 3 have the mean 2 and the interval 12.706 / sqrt(2) sqrt(2)."""
    columns = {"reference": [10.0, 20.0], "other": [11.0, 23.0], "none": [None, None]}
    rows = [
        {"method": name, "seed": seed, "x": x}
        for name, values in columns.items()
        for seed, x in enumerate(values)
    ]
    table = tables.differences(rows, "reference", {"x": ("x", ".1f")}).splitlines()
    assert table[2:] == ["| other | +2.0 ± 12.7 |", "| none | - |"]
    assert tables.differences(rows[::2], "reference", {"x": ("x", ".1f")}) == ""


def test_the_falling_weight_is_that_of_a_schedule():
    """The loss equals that of `ManifoldObjective` with a `WeightSchedule` at the same step."""
    x = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0)) - 0.5
    method = RECIPES["falling weight, hierarchy"].build(x, 50.0, torch.Generator())
    first = method.model.stages[0]
    method.model.initialize(x, stage=0)
    objective = ManifoldObjective("data", "l2", weight=WeightSchedule(500.0, 50.0, 60))
    for step in range(100):
        expected = objective(first, x).loss
        if step in (0, 31, 99):
            assert_close(method.phases[0].loss(x, (step + 1) / 100), expected, terms=20)


def test_tables_of_no_runs_say_so(tmp_path, capsys):
    main(["--tables", "--only", "digits", "--out", str(tmp_path)])
    assert f"no runs of digits in {tmp_path / 'full'}\n" in capsys.readouterr().out
    assert not list((tmp_path / "full").iterdir())
