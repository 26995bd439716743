"""Tiny runs for tests that train: options, images, fixtures, and helpers that stop and read runs.

A folder of tests imports the fixtures that it needs in its conftest.
"""

import csv
import itertools
import os
import shutil
import socket
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mflow_kernels import HierarchicalFlow
from mflow_kernels.training.cli import main

# Options of mflow train: two stages of three steps on ten images of 8x8.
TINY = [
    *("--image-size", "8", "--levels", "1", "--steps", "1", "--width", "8"),
    *("--manifold-dim", "6", "--stage-dim", "4", "--stage-steps", "1", "--stage-width", "8"),
    *("--batch-size", "4", "--max-steps", "3", "--device", "cpu"),
    *("--learning-rate", "0.002", "--stage-learning-rate", "null", "--weight", "1000"),
]


def write_images(folder, count=12, size=(8, 8), channels=1, seed=0):
    """Write smooth random images as PNG files; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        coarse = random.integers(0, 256, (3, 3, channels), dtype=np.uint8)
        image = Image.fromarray(coarse if channels == 3 else coarse[..., 0])
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    return folder


def zip_up(folder, path):
    """Write every file below a folder to a zip without compression; return its path."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def listing(folder):
    """Return the relative paths of everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def checkpoint(folder, name="last.ckpt"):
    """Load a checkpoint of a run."""
    return torch.load(folder / name, weights_only=True)


def weights(folder):
    """Return all weights in the last checkpoint of a run, and their averages."""
    return checkpoint(folder)["state_dict"]


def metrics(folder, column=None):
    """Return the rows of a run's metrics.csv; with `column`, only those with a value in it."""
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if column is None or row[column]]


def logged(folder, name):
    """Return the values of a metric in all steps of a run that trained."""
    return [float(row[name]) for row in metrics(folder, "loss_bits_per_dim")]


def spy(monkeypatch, owner, name, note):
    """Call `note` with the arguments of each call of `owner.name`, before the call."""
    original = getattr(owner, name)

    def noted(*args, **kwargs):
        note(*args, **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)


def change_losses(monkeypatch, change):
    """Let a run train with the losses `change(step, losses)`."""
    original, steps = HierarchicalFlow.terms_and_log_prob, itertools.count()

    def terms_and_log_prob(*args, **options):
        terms, log_likelihood = original(*args, **options)
        return terms._replace(loss=change(next(steps), terms.loss)), log_likelihood

    monkeypatch.setattr(HierarchicalFlow, "terms_and_log_prob", terms_and_log_prob)


class PowerCut(Exception):
    """An error that nothing in the package catches, like the death of the process."""


def before_step(patch, step, act):
    """Call `act()` before this step of a run, counted from 0."""
    from mflow_kernels.training.module import FlowTraining

    def note(training, *args, **kwargs):
        if training.global_step == step:
            act()

    spy(patch, FlowTraining, "training_step", note)


def train_until(step, command, monkeypatch):
    """Run a command that a power cut ends before this step."""

    def cut():
        raise PowerCut

    with monkeypatch.context() as patch:
        before_step(patch, step, cut)
        with pytest.raises(PowerCut):
            main(command)


def run_as_child(command, prepare):
    """Run `mflow` after `prepare()` in this forked process, which then ends."""
    code = 1
    try:
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
        prepare()
        code = main(command)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        os._exit(code)


def start(command, prepare=lambda: None, log=os.devnull):
    """Run `mflow` in a forked process after `prepare()`, with output in `log`; return its id."""

    def redirected():
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        prepare()

    child = os.fork()
    if child == 0:
        run_as_child(command, redirected)
    return child


def exit_code(child):
    """Wait for a child process and return its exit code, or its signal's number, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_same_run(folder, whole):
    """Compare checkpoints, metrics and evaluations bit by bit, but not the speed."""
    one, other = checkpoint(folder), checkpoint(whole)
    for run in (one, other):
        for schedule in run["lr_schedulers"]:
            del schedule["_step_count"]  # of calls since the process started
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "progress"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    timed = {"images_per_second": ""}
    rows, expected = ([row | timed for row in metrics(run)] for run in (folder, whole))
    assert rows == expected
    evaluations = [(run / "evaluation.json").read_text() for run in (folder, whole)]
    assert evaluations[0] == evaluations[1]


def refused(arguments, folder, capsys, code=2):
    """Assert that a command fails with one line and writes nothing in a folder; return the line."""

    def times():
        return {name: (folder / name).lstat().st_mtime_ns for name in listing(folder)}

    before = times()
    capsys.readouterr()
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("mflow: error: ")
    assert times() == before
    return err


def torchrun(command, states):
    """Run `mflow` in two forked processes, as `torchrun --nproc-per-node 2` does.

    Each rank writes its output to `states/log<rank>` and its final weights to `states/<rank>.pt`.
    """
    from mflow_kernels.training import train

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def join(rank):
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
            **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
        }
        fit = train._fit

        def spied(run):
            averaged = fit(run)
            state = {**run.model.state_dict(), **averaged.state_dict(prefix="average.")}
            torch.save(state, states / f"{rank}.pt")
            return averaged

        train._fit = spied

    children = [start(command, partial(join, rank), states / f"log{rank}") for rank in range(2)]
    codes = list(map(exit_code, children))
    assert codes == [0, 0], (states / "log0").read_text()


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
