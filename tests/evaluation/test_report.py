"""The report: it is complete and self-contained, and it names what was not computed."""

import base64
import io
import json
import math
import shutil
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from tiny_runs import listing, refused, spy, write_images
from torchvision.models import resnet18

from mflow_kernels import Glow
from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.data.splits import load_splits
from mflow_kernels.evaluation import report, report_pictures, sample_quality
from mflow_kernels.evaluation.features import feature_distance, load_feature_network
from mflow_kernels.evaluation.likelihood import (
    evaluate_model,
    held_out_images,
    importance_weighted_bits,
)
from mflow_kernels.evaluation.metrics import _finite
from mflow_kernels.evaluation.ood import SCORES, score_images
from mflow_kernels.evaluation.report import ReportOptions, describe_work
from mflow_kernels.models import volume
from mflow_kernels.runs.folder import load_run
from mflow_kernels.training.cli import main

NAMES = ", ".join(map(repr, NAMED_DATASETS))

PICTURES = {"interpolations.png", "projections.png", "samples.png", "scores.png", "spectrum.png"}


class Page(HTMLParser):
    """The open tags and the text of a page, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def figures_of(folder):
    return json.loads((folder / "figures.json").read_text())


def page_of(folder):
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def full(trained, tmp_path_factory):
    """A report with all optional parts."""
    folder = tmp_path_factory.mktemp("report")
    weights = folder / "resnet.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(resnet18().state_dict(), weights)
    other = write_images(folder / "others <b>", count=5, seed=7)
    command = ["evaluate", str(trained), "--out", str(folder / "report"), "--draws", "3"]
    command += ["--features", "resnet18", "--feature-weights", str(weights), "--ood", str(other)]
    assert main(command) == 0
    return folder / "report"


class TestFull:
    def test_the_page_needs_nothing_else(self, full):
        assert set(listing(full)) == PICTURES | {"figures.json", "report.html", ".lock"}
        page = page_of(full)
        assert not page.open
        assert not {"script", "link", "iframe", "object"} & set(page.tags)
        assert len(page.fetched) == len(PICTURES) + 1  # the curves of training
        embedded = []
        for source in page.fetched:
            kind, _, data = source.partition(",")
            assert kind == "data:image/png;base64"
            embedded.append(base64.b64decode(data))
            with Image.open(io.BytesIO(embedded[-1])) as image:
                image.load()
        assert all((full / name).read_bytes() in embedded for name in PICTURES)

    def test_the_page_shows_the_metrics(self, full, trained):
        metrics, page = figures_of(full), page_of(full)
        assert metrics["evaluation"] == json.loads((trained / "evaluation.json").read_text())
        shown = [f"{metrics['evaluation']['stages'][-1]['bits_per_dim']:.4f}"]
        shown.append(f"{metrics['importance_weighted_bits_per_dim']:.4f}")
        shown.append(f"{metrics['manifold_log_prob']:.1f}")
        shown += [f"{row['distance']['fid']:.2f}" for row in metrics["evaluation"]["samples"]]
        for row in metrics["scores"]:
            assert set(row["medians"]) == set(SCORES)
            shown.append(f"{row['medians']['ood_score']:.1f}")
            shown += [f"{value:.3f}" for value in row["aurocs"].values()]
        shown.append("others <b>")  # the name of a folder, not a tag
        assert all(text in page.text for text in shown)
        assert metrics["missing"] == []
        assert "Not computed" not in page.text

    def test_the_metrics_are_of_the_right_images(self, full, trained, images):
        metrics = figures_of(full)
        assert metrics["draws"] == 3
        plain = metrics["evaluation"]["stages"][-1]["bits_per_dim"]
        assert 0 < abs(metrics["importance_weighted_bits_per_dim"] - plain) < 1
        rows = metrics["evaluation"]["samples"]
        assert [row["temperature"] for row in rows] == [0.3, 0.5, 0.7, 0.85, 1.0]
        # A tenth of 12 is held out.
        assert {(row["network"], row["images"]) for row in rows} == {("resnet18", 2)}
        network = load_feature_network("resnet18", full.parent / "resnet.pth")
        model, held_out = load_run(str(trained), "cpu").model, load_splits(str(images), 8).test
        (samples,) = sample_quality._sample_batches(model, 2, 0.7, ambient=False)
        found = feature_distance(network(held_out.batch([0, 1])), network(samples))
        assert rows[2]["distance"] == asdict(found)
        names = [row["name"] for row in metrics["scores"]]
        assert names == ["held out", "negatives (255 - image)", "uniform noise", "others <b>"]
        assert [row["images"] for row in metrics["scores"]] == [2, 2, 2, 5]
        assert len(metrics["spectrum"]["spectrum"]) == 64

    def test_a_second_report_is_the_same(self, full, trained, tmp_path):
        assert main(["evaluate", str(trained), "--out", str(tmp_path / "new" / "report")]) == 0
        first, again = map(figures_of, (full, tmp_path / "new" / "report"))
        assert again["evaluation"].pop("samples") == []
        assert first["evaluation"].pop("samples")
        for name in ("evaluation", "deviation", "manifold_log_prob", "spectrum"):
            assert first[name] == again[name]
        assert [row["medians"] for row in first["scores"][:3]] == [
            row["medians"] for row in again["scores"]
        ]


class TestMissingParts:
    def test_it_is_listed(self, run, images, tmp_path, monkeypatch, capsys):
        # The training images are missing, and the spectrum and the densities are too expensive.
        config = (run / "config.yaml").read_text()
        gone = tmp_path / "gone"
        (run / "config.yaml").write_text(config.replace(str(images), str(gone)))
        monkeypatch.setattr(report, "_SPECTRUM_DIMENSIONS", 63)
        monkeypatch.setattr("mflow_kernels.evaluation.ood._DENSITY_WORK", 0)
        assert main(["evaluate", str(run), "--data", str(images)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(run / "report-faces" / "report.html")
        metrics, page = figures_of(run / "report-faces"), page_of(run / "report-faces")
        starts = ["FID, KID, precision and recall", "OOD score and local dimension"]
        starts += ["density on the manifold", "intrinsic dimension"]
        starts.append("typicality, latent score, OOD score and local dimension")
        assert [line.partition(":")[0] for line in metrics["missing"]] == starts
        assert str(gone) in metrics["missing"][-1]
        assert "--feature-weights FILE" in metrics["missing"][0]
        assert all(line in page.text for line in metrics["missing"])
        assert metrics["manifold_log_prob"] is metrics["spectrum"] is None
        assert {*metrics["scores"][0]["medians"]} == {"bits_per_dim", "corrected_bits", "distance"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--feature-weights none.pth", "--feature-weights: expected a file of weights of 'in"),
            ("--features resnet18", "--feature-weights: expected a file of weights of 'resnet18'"),
            ("--draws 0", "--draws: expected at least 1, got 0"),
            ("--feature-images 1", "--feature-images: expected at least 2, got 1"),
            ("--out RUN/config.yaml", "--out: expected a folder, but"),
            ("--ood none", f"--ood: expected {NAMES}, a folder or zip of images, or a file"),
            ("--ood COLOURED", "--ood: expected grey images, got 3 colour channels"),
        ],
    )
    def test_bad_input_ends_before_anything_is_written(
        self, options, message, trained, tmp_path, capsys
    ):
        coloured = write_images(tmp_path / "coloured", count=2, channels=3)
        options = options.replace("RUN", str(trained)).replace("COLOURED", str(coloured))
        line = refused(["evaluate", str(trained), *options.split()], trained, capsys)
        assert line.startswith(f"mflow: error: {message}")


def test_metrics_that_are_not_finite_are_null():
    assert _finite({"a": (math.inf, 1.0), "b": [math.nan]}) == {"a": [None, 1.0], "b": [None]}


class TestWork:
    """The work that `mflow evaluate` announces before its slow parts."""

    @pytest.fixture
    def passes(self, monkeypatch):
        """The number of images in each pass through the image flow so far."""
        seen = []
        for name in ("forward", "inverse"):
            spy(
                monkeypatch,
                Glow,
                name,
                lambda _, first, *__: seen.append(
                    len(first if torch.is_tensor(first) else first[0])
                ),
            )
        return seen

    def test_the_passes_are_counted(self, trained, passes):
        run = load_run(str(trained), "cpu")
        images = held_out_images(run, None).images
        text = describe_work(run, images, ReportOptions(draws=3))
        assert len(images) == 2
        evaluate_model(run.model, images, 8, data="")
        assert f"likelihood and reconstruction of 2 images: {sum(passes)} passes" in text
        passes.clear()
        importance_weighted_bits(run.model, images, 8, 3)
        assert f"3 dequantizations of each: {sum(passes)} passes" in text
        passes.clear()
        batch = images.batch(range(2))
        score_images(run.model, batch, 8, None)
        assert f"scores of 6 images of all sets: {3 * sum(passes)} passes" in text
        passes.clear()
        run.model.manifold_log_prob(batch / 255 - 0.5, method="exact")
        dim = run.model.manifold_dim
        # Two more passes find the coordinates and the density at them.
        assert 2 * dim <= sum(passes) <= 2 * dim + 4
        assert f"density on the manifold at 8 images (exact): {8 * dim} passes" in text
        assert f"local dimension at 70 images (exact): at most {70 * dim} passes" in text
        assert f"intrinsic dimension: {2 * 64} passes" in text

    def test_quick_computes_no_jacobian(self, trained, tmp_path, monkeypatch, capsys):
        def refuse(*_args, **_options):
            raise AssertionError("a Jacobian is computed")

        monkeypatch.setattr(volume, "push_forward", refuse)
        command = ["evaluate", str(trained), "--out", str(tmp_path / "report")]
        with pytest.raises(AssertionError, match="a Jacobian is computed"):
            main(command)
        capsys.readouterr()
        assert main([*command, "--quick"]) == 0
        text = capsys.readouterr().err
        assert text.startswith("evaluation, with the passes of an image through the image flow:\n")
        assert "left out by --quick: density on the manifold" in text
        figures = figures_of(tmp_path / "report")
        assert figures["manifold_log_prob"] is figures["spectrum"] is None
        assert figures["scores"][0]["medians"]["latent_score"]
        assert "left out by --quick" in page_of(tmp_path / "report").text


class TestImages:
    """Which images a report compares, and what it calls them."""

    def test_the_scores_compare_with_the_images_that_the_run_trained_on(
        self, run, images, tmp_path, monkeypatch, capsys
    ):
        """A file that is added later draws another split, whose training images differ."""
        seen = []
        monkeypatch.setattr(report, "training_scores", lambda model, batch, *_: seen.append(batch))
        data = tmp_path / "faces"
        shutil.copytree(images, data)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace(str(images), str(data)))
        before = load_splits(str(data), 8).train
        write_images(tmp_path / "more", count=1, seed=5).joinpath("000.png").rename(
            data / "aaa.png"
        )
        assert not torch.equal(
            load_splits(str(data), 8).train.batch(range(10)), before.batch(range(10))
        )
        assert main(["evaluate", str(run), "--quick", "--out", str(tmp_path / "report")]) == 0
        assert torch.equal(seen[0], before.batch(range(10)))

    def test_other_images_are_not_called_held_out(self, run, images, tmp_path, monkeypatch, capsys):
        """A copy of the run's own images, and images that it has never seen."""
        titles = []
        spy(monkeypatch, report_pictures, "draw_images", lambda _, title, *__: titles.append(title))
        shutil.copytree(images, tmp_path / "copy")
        other = write_images(tmp_path / "others", count=4, seed=7)
        pages = []
        for data in ([], ["--data", str(tmp_path / "copy")], ["--data", str(other)]):
            command = ["evaluate", str(run), "--quick", "--out", str(tmp_path / "report")]
            assert main([*command, *data]) == 0
            pages.append("\n".join([*titles, page_of(tmp_path / "report").text]))
            titles.clear()
        assert "images of faces (1x8x8) that it was not trained on." in pages[0]
        for words in ("between held-out images", "ends with one of the held-out images"):
            assert words in pages[0]
            assert words.replace("held-out images", "images of others") in pages[2]
        assert all("held out" not in page.lower().replace("-", " ") for page in pages[1:])
        assert "not trained on" not in pages[1]
        assert "Warning: the run was trained on 10 of the 12 images." in pages[1]
        assert "the run was trained on 10 of the 12 images" in capsys.readouterr().err
