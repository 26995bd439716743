"""Fixtures for tests that train: tiny images, a finished tiny run, and a separate cache."""

import shutil

import pytest
from tiny_runs import TINY, write_images


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache of prepared images that only the tests use."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MFLOW_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "faces")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, images):
    """A finished tiny run. Tests that change it must copy it first."""
    from mflow_kernels.training.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *TINY, "--data", str(images), "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")
