"""Likelihood of images under a model, and out-of-distribution scores of sets of images."""

import io
import math
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from torch import nn

from mflow_kernels import local_dimension
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.splits import ImageSet, load_evaluation_set
from mflow_kernels.evaluation import likelihood as evaluation
from mflow_kernels.evaluation import ood
from mflow_kernels.evaluation.likelihood import evaluate_model, importance_weighted_bits
from mflow_kernels.evaluation.ood import (
    SCORES,
    TrainingScores,
    auroc,
    compare_sets,
    density_images,
    density_method,
    made_up_sets,
    png_bits,
    score_images,
    training_scores,
)
from mflow_kernels.runs.folder import load_run


@pytest.fixture(scope="module")
def loaded(trained):
    return load_run(str(trained), "cpu")


@pytest.fixture(scope="module")
def faces(images):
    return load_evaluation_set(str(images), 8)[0]


class Box(nn.Module):
    """The density p(x) = 12 x_0^2 on [-0.5, 0.5)^2, for images of two pixels."""

    input_shape = (1, 1, 2)
    class_names = ()

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(12.0))

    def log_prob(self, x, context=None):
        return (self.scale * x.flatten(1)[:, 0].square()).log()


def test_progress_is_reported(loaded, faces, monkeypatch):
    reported = []

    @contextmanager
    def progress_bar(what, total):
        yield lambda count: reported.append((what, count, total))

    monkeypatch.setattr(evaluation, "progress_bar", progress_bar)
    monkeypatch.setattr(evaluation, "evaluation_batch_size", lambda shape: len(faces) - 1)
    evaluate_model(loaded.model, faces, 8, data="faces")
    importance_weighted_bits(loaded.model, faces, 8, 2)
    counts = len(faces) - 1, len(faces)
    names = "evaluating", "importance weights"
    assert reported == [(name, count, len(faces)) for name in names for count in counts]


class TestImportanceWeighting:
    def test_one_draw_is_the_plain_bound(self, loaded, faces):
        plain = evaluate_model(loaded.model, faces, 8, data="faces")
        once = importance_weighted_bits(loaded.model, faces, 8, 1)
        assert once == pytest.approx(plain.stages[-1].bits_per_dim, rel=1e-6)

    def test_many_draws_approach_the_probability_of_the_image(self):
        images = ImageSet(torch.zeros(2000, 1, 1, 2, dtype=torch.uint8))
        once, few, many = (
            importance_weighted_bits(Box(), images, 1, draws) for draws in (1, 4, 200)
        )
        nats = 1 / (2 * math.log(2))  # in bits per dimension
        # E log p = log 3 - 2, with standard deviation 2.
        assert once == pytest.approx(1 + (2 - math.log(3)) * nats, abs=4 * 2 / 2000**0.5 * nats)
        assert once > few > many
        # E p = 1 and var p = 0.8, so that log-mean-exp is 0.8 / (2 * 200) below 0 on average.
        error = 4 * (0.8 / 200 / 2000) ** 0.5 + 1e-4
        assert many == pytest.approx(1 + 0.8 / 400 * nats, abs=error * nats)


class TestScores:
    def test_scores_follow_the_formulas(self, loaded, faces):
        images = faces.batch(range(5))
        done = []
        # Without training images, the same noise gives the same distances.
        again = score_images(loaded.model, images, 8, None)
        assert set(again) == {"bits_per_dim", "corrected_bits", "distance"}
        middle = again["bits_per_dim"].median().item()  # some images have fewer, some more
        training = TrainingScores(0.1, middle, 0.5, 4.0, 0.25)
        found = score_images(loaded.model, images, 8, training, done.append)
        assert {name: values.shape for name, values in found.items()} == dict.fromkeys(SCORES, (5,))
        assert done == [5]
        assert torch.equal(found["distance"], again["distance"])
        assert torch.equal(found["typicality"], (found["bits_per_dim"] - middle).abs())
        off = 64 - loaded.model.manifold_dim
        far = score_images(loaded.model, images, 8, TrainingScores(0.2, middle), done.append)
        change = (0.2**-2 - 0.1**-2) / 2 * found["distance"].square() + off * math.log(2)
        for name in ("latent_score", "ood_score"):
            assert (far[name] - found[name]).tolist() == pytest.approx(change.tolist(), rel=1e-4)
        # The two differ by the volume term.
        x = dequantize(images, 8, stream_generator(0, Stream.OOD_NOISE))
        u = loaded.model.encode(x)
        log_prob = loaded.model.manifold_log_prob(x).value
        volume = loaded.model.coordinates_log_prob(u) - log_prob
        difference = (found["ood_score"] - found["latent_score"]).tolist()
        assert difference == pytest.approx(volume.tolist(), rel=1e-4, abs=1e-3)
        dimension = local_dimension(loaded.model, x, 0.1).value.double()
        scores = (found["bits_per_dim"] - middle) / 0.5, (4.0 - dimension) / 0.25
        assert torch.allclose(found["bits_or_dimension"], torch.maximum(*scores))
        cheap = loaded.model.ood_score(x, 0.1, volume=False)
        assert cheap.tolist() == pytest.approx(found["latent_score"].tolist(), rel=1e-5)

    def test_a_score_of_all_images_computes_no_jacobian(self, loaded, faces, monkeypatch):
        monkeypatch.setattr(type(loaded.model), "manifold_log_prob", None)
        monkeypatch.setattr(ood, "local_dimension", None)
        images = faces.batch(range(5))
        training = training_scores(loaded.model, images, 8)._replace(dimension=4.0)
        found = score_images(loaded.model, images, 8, training)
        assert set(found) == set(SCORES) - {"ood_score", "bits_or_dimension"}

    def test_png_bits_are_those_of_the_file(self, faces):
        images = faces.batch(range(3))
        file = io.BytesIO()
        Image.fromarray(images[1, 0].numpy()).save(file, "png", optimize=True)
        assert png_bits(images, 8)[1] == 8 * len(file.getvalue()) / 64
        assert png_bits(images // 32 * 32 + 7, 3)[1] <= png_bits(images, 8)[1]
        colour = images.expand(-1, 3, -1, -1)
        assert (png_bits(colour, 8) < png_bits(images, 8)).all()  # the same file, more values

    def test_training_scores_are_means(self, loaded, faces):
        images = faces.batch(range(5))
        found, scores = (
            training_scores(loaded.model, images, 8),
            score_images(loaded.model, images, 8, None),
        )
        assert found.bits_per_dim == scores["bits_per_dim"].mean().item()
        x = dequantize(images, 8, stream_generator(0, Stream.OOD_NOISE))
        assert found.deviation == pytest.approx(loaded.model.deviation(x), rel=1e-5)
        assert found.bits_spread == scores["bits_per_dim"].std(correction=0).item()
        assert found.dimension is None
        done: list[int] = []
        found = training_scores(loaded.model, images, 8, done.append)
        dimension = local_dimension(loaded.model, x, found.deviation).value.double()
        assert done == [5]
        assert found.dimension == pytest.approx(dimension.mean().item(), rel=1e-5)
        spread = dimension.std(correction=0).item()
        assert found.dimension_spread == pytest.approx(spread, rel=1e-4)

    def test_auroc_counts_pairs(self):
        inside, outside = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1e9, math.nan])
        # 2 beats 1, ties with 2 and loses to 3, so it scores 1.5 of 3. The others beat all three.
        assert auroc(inside, outside) == pytest.approx(7.5 / 9)
        assert auroc(inside, inside) == pytest.approx(0.5)
        # A sigmoid would make these numbers equal.
        assert auroc(inside + 1000, outside[:1] + 1001) == pytest.approx(2.5 / 3)

    def test_sets_are_compared_with_the_first(self):
        low, high = torch.arange(4.0), torch.arange(4.0) + 10
        first, second = compare_sets(
            {"in": {"bits_per_dim": low, "distance": high, "ood_score": low[:2]},
             "out": {"bits_per_dim": high, "distance": low, "ood_score": high[:2]}}
        )  # fmt: skip
        assert (first.name, first.images, first.aurocs) == ("in", 4, {})
        assert second.aurocs == {"bits_per_dim": 1.0, "distance": 0.0, "ood_score": 1.0}
        assert first.medians == {"bits_per_dim": 1.0, "distance": 11.0, "ood_score": 0.0}

    def test_made_up_sets(self, faces):
        images = faces.batch(range(3))
        negatives, noise = made_up_sets(images).values()
        assert torch.equal(negatives.int() + images.int(), torch.full_like(images, 255).int())
        assert noise.shape == images.shape
        assert torch.equal(noise, list(made_up_sets(images).values())[1])

    def test_the_density_is_limited_to_affordable_sizes(self, loaded):
        def of(shape, dim):
            model = nn.Module()
            model.input_shape, model.manifold_dim = shape, dim
            return density_images(model), density_method(model)

        assert of((1, 28, 28), 64) == (64, "exact")
        assert of((3, 64, 64), 512) == (64, "exact")
        assert of((3, 256, 256), 2048) == (5, "hutchinson")
        assert of((3, 1024, 1024), 8192)[0] == 0
