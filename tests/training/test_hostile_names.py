"""Names of folders and classes that are numbers, mathematics, no text or long, in every command."""

import json
import os

import pytest
from hostile_names import NAMES
from tiny_runs import TINY, listing, refused, write_images

from mflow_kernels import HierarchicalFlow
from mflow_kernels.data.files import shortened
from mflow_kernels.runs.folder import read_config
from mflow_kernels.training.cli import main

SMALL = [*TINY, "--stages", "[]", "--max-steps", "1"]
PATHS = ["nearly all of these", "a long name of wide characters", "a leading dash"]


def mflow(*arguments):
    assert main([os.fspath(argument) for argument in arguments]) == 0


def in_utf_8(name):
    """Leave out bytes that are not UTF-8, which TensorBoard and safetensors refuse in a path."""
    return name.encode(errors="ignore").decode()


@pytest.fixture(scope="module")
def small(images, tmp_path_factory):
    """A run of one stage that took one step. Each test writes results of other names in it."""
    folder = tmp_path_factory.mktemp("small") / "run"
    mflow("train", *SMALL, "--data", images, "--run-dir", folder)
    return folder


@pytest.mark.parametrize("kind", PATHS)
def test_a_run_and_its_images(kind, tmp_path):
    name = NAMES[kind]
    data, run = write_images(tmp_path / "images" / name, count=4), tmp_path / in_utf_8(name)
    command = ["train", *SMALL, "--data", data, "--run-dir", run]
    mflow(*command)
    assert read_config(run).data_name == name
    mflow(*command, "--resume", "--max-steps", "2")
    mflow("train", *SMALL, "--run-dir", tmp_path / "b", "--init-from", run, "--preset",
          run / "config.yaml")  # fmt: skip
    mflow("sample", run)
    mflow("reconstruct", run)
    mflow("evaluate", run, "--quick", "--data", data, "--out", tmp_path / "reports" / name)
    mflow("export", run, "--out", tmp_path / "exports" / run.name)
    mflow("sample", tmp_path / "exports" / run.name)
    assert f"reconstructions-{shortened(name)}.png" in listing(run)


def test_folders_that_other_libraries_cannot_open(command, run, tmp_path, capsys):
    folder = str(tmp_path / NAMES["bytes that are no UTF-8"])
    command[-1] = folder
    assert "--run-dir: expected a path in UTF-8" in refused(command, tmp_path, capsys)
    export = ["export", str(run), "--out", folder]
    assert "--out: expected a path in UTF-8" in refused(export, tmp_path, capsys)


@pytest.mark.pictures
@pytest.mark.parametrize("kind", PATHS)
def test_other_images(kind, small, tmp_path, recwarn):
    name = NAMES[kind]
    data = write_images(tmp_path / name, count=4, seed=3)
    mflow("evaluate", small, "--quick", "--data", data, "--ood", data)
    mflow("reconstruct", small, "--data", data, "--number", "2")
    mflow("plan", *SMALL, "--data", data)
    assert {f"evaluation-{shortened(name)}.json", f"report-{shortened(name)}/report.html"} <= {
        *listing(small)
    }
    figures = (small / f"report-{shortened(name)}" / "figures.json").read_text()
    assert [row["name"] for row in json.loads(figures)["scores"]][-1] == name
    assert not [w for w in recwarn if "constrained" in str(w.message)]


def test_prepared_files(images, tmp_path):
    """Names of 255 bytes leave no room for the journal: tests/data/test_hostile_sources.py."""
    prepared = tmp_path / NAMES["nearly all of these"]
    mflow("prepare", images, "--out", prepared, "--image-size", "8")
    mflow("plan", *SMALL, "--data", prepared)
    mflow("train", *SMALL, "--data", prepared, "--run-dir", tmp_path / "run")
    mflow("evaluate", tmp_path / "run", "--quick")


@pytest.mark.pictures
def test_classes(tmp_path):
    """Every name is a class of one model, unless it is that of a hidden folder."""
    names = sorted(name for name in [*NAMES.values(), "a"] if not name.startswith("."))
    for number, name in enumerate(names):
        write_images(tmp_path / "images" / name, count=2, seed=number)
    folder, export = tmp_path / "run", tmp_path / "export"
    command = ["train", *SMALL, "--data", tmp_path / "images", "--classes", "--run-dir", folder]
    mflow(*command)
    assert read_config(folder).class_names == names
    mflow(*command, "--resume", "--max-steps", "2")
    mflow("evaluate", folder, "--quick")
    mflow("export", folder, "--out", export)
    assert HierarchicalFlow.from_pretrained(export).class_names == tuple(names)
    for source in (folder, export):
        mflow("sample", source, "--number", "4")
        mflow("sample", source, f"--class={NAMES['nearly all of these']}", "--number", "1")
