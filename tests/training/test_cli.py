"""The commands of `mflow`, run from end to end in this process."""

import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import (
    assert_same_run,
    change_losses,
    checkpoint,
    exit_code,
    listing,
    metrics,
    refused,
    start,
    train_until,
    weights,
    write_images,
)

import mflow_kernels
from mflow_kernels import HierarchicalFlow
from mflow_kernels.layers import AffineCoupling, SplineCoupling
from mflow_kernels.runs.folder import load_run
from mflow_kernels.training import cli
from mflow_kernels.training.cli import main
from mflow_kernels.training.coupling_networks import parameter_groups
from mflow_kernels.training.module import FlowTraining

PICTURES = ("curves.png", "samples.png", "projections.png", "hierarchy.png")


class TestTrain:
    def test_the_run_folder_is_complete(self, trained):
        assert set(PICTURES) < set(listing(trained))
        assert yaml.safe_load((trained / "config.yaml").read_text())["channels"] == 1
        assert [p for p in trained.glob("tensorboard/events*")]
        assert (trained / "evaluation.json").is_file()
        assert not [name for name in listing(trained.parent) if ".tmp" in name or ".old" in name]
        for name in PICTURES:
            with Image.open(trained / name) as image:
                image.load()
                assert image.width >= 600

    def test_metrics_have_a_row_for_each_step(self, trained):
        """Each stage takes 3 steps at 0.002, after one step of warm-up, on a cosine to a 50th."""
        rows = metrics(trained, "loss_bits_per_dim")
        assert [(int(row["step"]), float(row["stage"])) for row in rows] == [
            (step, step // 3) for step in range(6)
        ]
        rates = [0.002 * (0.02 + 0.49 * (1 + math.cos(math.pi * done / 3))) for done in range(3)]
        found = [float(row["learning_rate"]) for row in rows]
        assert found == pytest.approx(rates + rates, rel=1e-6)
        assert all(float(row["images_per_second"]) > 0 for row in rows)
        names = ("on_manifold", "off_manifold", "logdet")
        parts = sum(float(rows[0][f"{name}_bits_per_dim"]) for name in names)
        # Stage 1 has as many dimensions as the image, so both are per dimension of the image.
        assert float(rows[0]["bits_per_dim"]) == pytest.approx(8 - parts, rel=1e-5)

    def test_the_output_names_the_pictures(self, command, tmp_path, monkeypatch, capsys):
        """Without --run-dir, the folder is named after the options."""
        monkeypatch.chdir(tmp_path)
        assert main([*command[:-2], "--stages", "[]"]) == 0
        out, err = capsys.readouterr()
        assert "bits per dimension" in out
        assert str(Path("runs/faces-8px-d6-seed0/samples.png")) in out
        assert "hierarchy.png" not in out  # drawn only if there are several stages
        assert "Lightning" not in err
        assert "GPU available" not in err

    def test_another_seed_gives_other_bits(self, trained, command, tmp_path):
        assert main([*command, "--seed", "1"]) == 0
        first, other = weights(trained), weights(tmp_path / "run")
        assert not all(torch.equal(first[name], other[name]) for name in first)

    def test_a_diverging_loss_is_reported_and_keeps_the_checkpoint(
        self, command, tmp_path, monkeypatch, capsys
    ):
        change_losses(monkeypatch, lambda step, loss: loss * (math.nan if step >= 4 else 1))
        assert main([*command, "--max-skipped", "2"]) == 1
        error = capsys.readouterr().err
        assert "2 steps in a row were skipped, the last of them with a loss of nan" in error
        assert "at step 5 (stage 2)" in error
        assert checkpoint(tmp_path / "run")["global_step"] == 4

    def test_unexpected_errors_are_not_swallowed(self, command, monkeypatch):
        def broken(self, batch, batch_idx):
            raise ValueError("a bug")

        monkeypatch.setattr(FlowTraining, "training_step", broken)
        with pytest.raises(ValueError, match="a bug"):
            main(command)


@pytest.mark.pictures
class TestSample:
    def test_options_matter_and_name_the_picture(self, run, capsys):
        options = {
            "--seed 1": "T1-seed1",
            "--seed 2": "T1-seed2",
            "--seed 1 --stages 1": "T1-seed1-stages1",
            "--seed 1 --ambient": "T1-seed1-ambient",
            "--seed 1 --temperature 0.5": "T0.5-seed1",
        }
        pictures = []
        for words, name in [*options.items(), ("--seed 1", "T1-seed1")]:
            assert main(["sample", str(run), "--number", "5", *words.split()]) == 0
            path = run / f"samples-{name}.png"
            assert capsys.readouterr().out.split() == [str(path)]
            with Image.open(path) as image:
                pictures.append(image.tobytes())
        assert pictures[0] == pictures[-1]
        assert len(set(pictures)) == len(options)


class TestReconstructAndEvaluate:
    @pytest.mark.parametrize("missing", ["half", "centre", "pixels"])
    def test_missing_pixels_are_filled_in(self, missing, run, images, monkeypatch, capsys):
        masks = []

        def inpaint(self, x, known, deviation, *, context=None):
            masks.append(known)
            return x

        monkeypatch.setattr(HierarchicalFlow, "inpaint", inpaint)
        assert main(["reconstruct", str(run), "--missing", missing]) == 0
        path = run / f"reconstructions-faces-missing-{missing}.png"
        assert capsys.readouterr().out.strip() == str(path)
        (known,) = masks
        expected = {"half": 0.5, "centre": 0.25, "pixels": 0.75}[missing]
        assert (~known).float().mean().item() == pytest.approx(expected, abs=0.1)

    def test_evaluate_repeats_what_train_wrote(self, run, capsys):
        before = (run / "evaluation.json").read_text()
        (run / "evaluation.json").unlink()
        assert main(["evaluate", str(run)]) == 0
        assert (run / "evaluation.json").read_text() == before
        table = capsys.readouterr().out
        last = json.loads(before)["stages"][-1]
        assert f"{last['bits_per_dim']:.4f}" in table
        assert f"{last['psnr']:.2f}" in table

    def test_images_of_the_same_name_have_results_of_their_own(self, run, tmp_path, capsys):
        found = {}
        for seed in (5, 6, 5):
            other = write_images(tmp_path / str(seed) / "other", count=4, seed=seed)
            (other / "notes.txt").write_text("no image")
            options = ["--data", str(other)]
            assert main(["reconstruct", str(run), *options]) == 0
            assert main(["evaluate", str(run), "--quick", *options]) == 0
            out, err = capsys.readouterr()
            assert err.count("skipped 1 file that cannot be read: notes.txt") == 2
            written = [line for line in out.splitlines() if line.startswith(str(run))]
            assert found.setdefault(seed, written) == written
        assert [os.path.basename(path) for path in found[5]] == [
            *("reconstructions-other.png", "evaluation-other.json", "report.html")
        ]
        assert not set(found[5]) & set(found[6])
        figures = [json.loads(Path(found[seed][1]).read_text()) for seed in (5, 6)]
        assert [(f["data"], f["images"]) for f in figures] == [("other", 4)] * 2
        assert figures[0]["stages"] != figures[1]["stages"]

    def test_other_images_do_not_replace_those_that_they_are_compared_with(self, run, tmp_path):
        other = write_images(tmp_path / "held out", count=4, seed=5)
        assert main(["evaluate", str(run), "--quick", "--ood", str(other)]) == 0
        scores = json.loads((run / "report" / "figures.json").read_text())["scores"]
        assert [(row["name"], row["images"]) for row in scores][::3] == [
            *(("held out", 2), ("held out (--ood)", 4))
        ]


class TestExports:
    """A folder of mflow export in place of a run."""

    @pytest.fixture
    def export(self, run, tmp_path):
        assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
        return tmp_path / "export"

    def test_figures_are_those_of_the_run(self, run, export, tmp_path, capsys):
        other = str(write_images(tmp_path / "other", count=4, seed=5))
        figures = []
        for folder in (run, export):
            assert main(["reconstruct", str(folder), "--data", other]) == 0
            assert main(["evaluate", str(folder), "--data", other]) == 0
            figures.append(json.loads((folder / "evaluation-other.json").read_text()))
            assert (folder / "reconstructions-other.png").is_file()
        assert figures[0] == figures[1]
        page = (export / "report-other" / "report.html").read_text()
        assert "an export does not say which images the model was trained on" in page
        assert "the model may have been trained on these images" in page

    def test_bad_input(self, export, tmp_path, capsys):
        for command in ("evaluate", "reconstruct"):
            line = refused([command, str(export)], tmp_path, capsys)
            assert "--data: expected images, because" in line
        (export / "model.json").write_text("{}")
        line = refused(["sample", str(export)], tmp_path, capsys)
        assert "run: expected an architecture of mflow export" in line


SPLINES = "--coupling spline --bins 3 --stage-coupling spline --stage-bins 4"
SPLINES += " --release --error-bound 0.001"
JET = "--optimizer muon --flow jet --patch 2 --couplings 3 --depth 1 --heads 2 --width 4"


@pytest.mark.parametrize("options", [SPLINES, JET], ids=["splines", "jet"])
def test_other_flows_train_resume_sample_and_export(options, command, tmp_path, monkeypatch):
    """The run stops in the first step of its second stage."""
    command += options.split()
    run = tmp_path / "run"
    assert main(command) == 0
    whole = run.rename(tmp_path / "whole")
    train_until(4, [*command, "--save-steps", "1"], monkeypatch)
    assert main([*command, "--resume"]) == 0
    assert_same_run(run, whole)
    assert main(["sample", str(run), "--number", "2"]) == 0
    assert main(["evaluate", str(run), "--quick"]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    model = HierarchicalFlow.from_pretrained(tmp_path / "export")
    if options == SPLINES:
        found = [(s.flow.coupling, s.flow.bins) for s in model.stages]
        assert found == [("spline", 3), ("spline", 4)]
    else:
        jet = model.stages[0].flow
        assert (jet.patch, jet.couplings, jet.depth, jet.heads, jet.width) == (2, 3, 1, 2, 4)
    x = torch.rand(3, 1, 8, 8) - 0.5
    with torch.no_grad():
        assert torch.equal(model.log_prob(x), load_run(str(run), "cpu").model.log_prob(x))
    networks = [m.net for m in model.modules() if isinstance(m, SplineCoupling | AffineCoupling)]
    decayed = {p for stage in model.stages for p in parameter_groups(stage)[0]}
    layers = [m for net in networks for m in net.modules()]
    assert decayed == {m.weight for m in layers if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}


def test_a_terminal_that_cannot_show_a_name(run, tmp_path, monkeypatch):
    folder, shown = run.rename(tmp_path / "\xe9"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    monkeypatch.setattr(sys, "argv", ["mflow", "sample", str(folder), "--number", "1"])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.run_process() == 0
    finally:
        signal.signal(signal.SIGINT, before)
    sys.stdout.flush()
    assert shown.getvalue().decode("ascii").strip().endswith(r"\xe9/samples-T1-seed0.png")


def test_a_file_that_may_not_grow_is_no_bad_input(run, tmp_path):
    """The limit is that of `ulimit -f`. The picture that was there stays."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"before")
    reader, writer = os.pipe()

    def limit():
        os.dup2(writer, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    child = start(["sample", str(run), "--output", str(picture)], limit)
    os.close(writer)
    with os.fdopen(reader) as shown:
        message = shown.read()
    assert exit_code(child) == 1
    assert "could not write" in message
    assert "Traceback" not in message
    assert picture.read_bytes() == b"before"
    assert not list(tmp_path.glob(".*"))


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda n: None if n == "lightning" else find_spec(n)
    )
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "mflow: error: lightning missing: pip install 'mflow_kernels[train]'\n"
    )


def test_help_is_there_without_docstrings_and_torch():
    """Python removes docstrings under PYTHONOPTIMIZE=2."""
    code = """
import os, sys
from mflow_kernels.training.cli import main
try:
    main(["train", "--help"])
finally:
    if "torch" in sys.modules:
        os._exit(1)
"""
    texts = []
    for level in ("0", "2"):
        optimized = os.environ | {"PYTHONOPTIMIZE": level}
        done = subprocess.run(
            [sys.executable, "-c", code], env=optimized, capture_output=True, check=True, text=True
        )
        texts.append(done.stdout)
    assert "Mirror each image left to right" in texts[1]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("command", ["", "train", "sample", "reconstruct", "evaluate", "plan"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([*command.split(), "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "usage: mflow" in text
    assert not re.findall(r"--\w*_", text)


def test_the_version_needs_no_other_package(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mflow_kernels {mflow_kernels.__version__}\n"


def test_a_terminal_shows_that_packages_are_loading(capsys, monkeypatch):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True)
    assert main(["sample", "no-run"]) == 2
    line, error = capsys.readouterr().err.split("\r\x1b[K")
    assert line == "mflow: loading ..."
    assert error.startswith("mflow: error: run: expected")
