"""Class-conditional training from the command line, from classes in folders to samples by class."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import TINY, listing, write_images

from mflow_kernels import HierarchicalFlow
from mflow_kernels.data.splits import load_splits
from mflow_kernels.runs.folder import load_run
from mflow_kernels.training.cli import main


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Dark and bright images, in folders named after their classes."""
    folder = tmp_path_factory.mktemp("data") / "pets"
    for seed, name in enumerate(("cat", "dog")):
        write_images(folder / name, 12, seed=seed)
    return folder


@pytest.fixture(scope="module")
def trained(pets, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    command = ["train", "--data", str(pets), "--classes", *TINY, "--run-dir", str(run)]
    assert main(command) == 0
    return run


@pytest.fixture
def command(pets, tmp_path):
    return ["train", "--data", str(pets), "--classes", *TINY, "--run-dir", str(tmp_path / "run")]


def test_the_run_knows_its_classes(trained):
    loaded = load_run(str(trained), "cpu")
    assert loaded.config.classes == "labels"
    assert loaded.config.class_names == ["cat", "dog"]
    assert loaded.model.class_names == ("cat", "dog")
    assert loaded.model.n_bits == 8
    assert [stage.flow.context_channels for stage in loaded.model.stages] == [2, 2]
    x = torch.rand(2, 1, 8, 8) - 0.5
    one, other = (loaded.model.log_prob(x, context=torch.full((2,), c)) for c in range(2))
    assert one.isfinite().all()
    assert not torch.allclose(one, other)


def test_training_passes_the_class_of_each_image(pets, command, monkeypatch):
    """The context of each trained image is the class of its folder."""
    splits = load_splits(str(pets), 8, "labels")
    classes = splits.images.classes
    known = splits.images.batch(range(len(classes))).float()
    original, seen = HierarchicalFlow.terms_and_log_prob, []

    def terms_and_log_prob(self, x, *, stage, release=False, context=None):
        images = ((x + 0.5) * 256)[:, None]  # noise moves a pixel by less than 1
        distances = (images - known).flatten(2).abs().amax(2)
        assert (distances.amin(1) <= 1.001).all()
        seen.extend(zip(classes[distances.argmin(1)].tolist(), context.tolist(), strict=True))
        return original(self, x, stage=stage, release=release, context=context)

    monkeypatch.setattr(HierarchicalFlow, "terms_and_log_prob", terms_and_log_prob)
    assert main(command) == 0
    assert len(seen) == 4 * 6  # two stages of three steps
    assert all(expected == given for expected, given in seen)
    assert {c for c, _ in seen} == {0, 1}


def test_the_accuracy_of_the_posterior(trained, capsys):
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["class_accuracy"] in {i / 3 for i in range(4)}  # of three held-out images
    assert main(["evaluate", str(trained), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "The class of the highest posterior is right for" in printed
    assert "The class of the highest posterior" in (trained / "report" / "report.html").read_text()
    assert json.loads((trained / "evaluation.json").read_text()) == evaluation


@pytest.mark.pictures
def test_samples_by_class(trained, tmp_path, capsys):
    rows, one = tmp_path / "rows.png", tmp_path / "one.png"
    command = ["sample", str(trained), "--number", "6", "--device", "cpu", "--output"]
    assert main([*command, str(rows)]) == 0
    assert main([*command, str(one), "--class", "dog"]) == 0
    assert rows.read_bytes() != one.read_bytes()
    files = tmp_path / "files"
    command = ["sample", str(trained), "--number", "3", "--device", "cpu"]
    assert main([*command, "--class", "dog", "--files", str(files)]) == 0
    assert (trained / "samples-T1-seed0-dog.png").exists()
    assert listing(files) == [f"dog-000{i}.png" for i in range(3)]
    assert [Image.open(files / name).size for name in listing(files)] == [(8, 8)] * 3
    each = tmp_path / "each"
    assert main([*command, "--files", str(each)]) == 0
    assert listing(each) == ["cat-0000.png", "dog-0000.png"]
    assert main([*command, "--files", str(files)]) == 2
    assert "--files: expected a new folder, but" in capsys.readouterr().err
    command = [*command, "--output"]
    assert main([*command, str(one), "--class", "cow"]) == 2
    assert "--class: expected one of cat, dog, got cow" in capsys.readouterr().err


def test_it_resumes_and_exports(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    assert main(["train", "--resume", "--run-dir", str(run), "--max-steps", "4"]) == 0
    out = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(out)]) == 0
    model, expected = HierarchicalFlow.from_pretrained(out), load_run(str(run), "cpu").model
    assert (model.n_bits, model.crop, model.class_names) == (8, None, ("cat", "dog"))
    x, classes = torch.rand(2, 1, 8, 8) - 0.5, torch.tensor([0, 1])
    assert torch.equal(model.log_prob(x, context=classes), expected.log_prob(x, context=classes))
    assert "of the classes cat, dog." in (out / "README.md").read_text()


def test_weights_of_classes_with_other_names_are_copied_with_a_warning(trained, command, capsys):
    """Classes are matched by their numbers."""
    data = Path(command[2])
    other = data.with_name("birds")
    shutil.copytree(data, other)
    (other / "cat").rename(other / "crow")
    try:
        assert main([*command[:2], str(other), *command[3:], "--init-from", str(trained)]) == 0
    finally:
        shutil.rmtree(other)
    err = capsys.readouterr().err
    assert f"warning: --init-from: classes have other names in {trained}" in err
    assert "their weights are copied: cat -> crow\n" in err
