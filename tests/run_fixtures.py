"""Fixtures of tests that train: tiny images, a finished tiny run, a cache of their own."""

import shutil

import pytest
import torch
from tiny_runs import TINY, write_images


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors so small are slower on several threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache of prepared images of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MFLOW_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "faces")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, images):
    """A finished tiny run; tests that change it work on a copy."""
    from mflow_kernels.training.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *TINY, "--data", str(images), "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")
