"""Fixtures of tests that train: tiny images, a finished tiny run, a cache of prepared images."""

import shutil

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tiny_runs import TINY, write_images


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache of prepared images for the tests only."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MFLOW_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Save pictures of one pixel, because drawing takes two thirds of the time of a tiny run.

    Tests with the mark `pictures` draw, and so does the fixture `trained`, which is set up earlier.
    """
    if "pictures" not in request.keywords:
        blank = Image.new("L", (1, 1))
        monkeypatch.setattr(Figure, "savefig", lambda _, to, format: blank.save(to, format))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "faces")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, images):
    """A finished tiny run. Tests must not change it; `run` is a copy for those that do."""
    from mflow_kernels.training.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *TINY, "--data", str(images), "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def command(images, tmp_path):
    """The arguments that train a tiny run in `tmp_path / "run"`."""
    return ["train", *TINY, "--data", str(images), "--run-dir", str(tmp_path / "run")]
