"""Presets and exports, by their commands."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import refused

from mflow_kernels import HierarchicalFlow
from mflow_kernels.runs.card import model_card
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.folder import load_run, read_config
from mflow_kernels.runs.presets import PRESETS, preset_options, preset_text
from mflow_kernels.training.cli import _parsers, main


class TestPresets:
    def test_each_is_valid(self):
        for name in PRESETS:
            TrainConfig(**preset_options(name)).check()

    @pytest.mark.parametrize(
        "name",
        [
            name if name.startswith("digits") else pytest.param(name, marks=pytest.mark.long)
            for name in PRESETS
        ],
    )
    def test_each_is_planned_for_80_gb(self, name, capsys):
        assert main(["plan", "--preset", name, "--gpu-memory", "80GB"]) == 0
        out = capsys.readouterr().out
        options = yaml.safe_load(preset_text(name))
        assert f"Batches of {options['batch_size']:,} images" in out
        assert "\nFits in 80.0 GB." in out
        largest = out.split("Largest batch in 80.0 GB: ")[1].split()[0]
        assert int(largest.replace(",", "")) >= options["batch_size"]

    def test_they_are_listed_and_printed(self, capsys):
        assert main(["presets"]) == 0
        assert capsys.readouterr().out.split("\n") == [*PRESETS, ""]
        assert main(["presets", "celeba256"]) == 0
        assert capsys.readouterr().out.rstrip() == preset_text("celeba256").rstrip()
        found = (files("mflow_kernels.runs") / "presets").iterdir()
        assert sorted(file.name for file in found) == sorted(f"{name}.yaml" for name in PRESETS)
        assert TrainConfig(**preset_options("digits")) == TrainConfig()

    def test_options_on_the_command_line_override_them(self, command, tmp_path, capsys):
        own = tmp_path / "own.yaml"
        own.write_text("levels: 1\nsteps: 1\nwidth: 4\nrho: l1\nepochs: 9\nstages: []\n")
        command += ["--preset", str(own)]
        assert main(command) == 0
        config = read_config(tmp_path / "run")
        assert (config.rho, config.epochs) == ("l1", 9)
        assert (config.width, config.stages) == (8, [])
        # A resumed run keeps its options, so a preset would be ignored.
        line = refused([*command, "--resume"], tmp_path, capsys)
        assert "--preset: expected none with --resume" in line

    def test_an_unknown_preset_is_refused(self, tmp_path, capsys):
        line = refused(["train", "--preset", "own.yaml"], tmp_path, capsys)
        assert "--preset: expected digits, digits_nested, celeba64" in line


@pytest.fixture
def exported(trained, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert main(["export", str(trained), "--out", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    return folder


class TestExport:
    def test_it_reads_back_to_the_bit(self, exported, trained):
        whole = load_run(str(trained), "cpu").model
        model = HierarchicalFlow.from_pretrained(exported)
        assert not model.training
        x = torch.rand(3, 1, 8, 8) - 0.5
        with torch.no_grad():
            assert torch.equal(model.log_prob(x), whole.log_prob(x))
            assert torch.equal(model.project(x), whole.project(x))
            assert torch.equal(model.stages[0].encode(x), whole.stages[0].encode(x))
        assert all(p.requires_grad for p in model.parameters())
        files = {"model.safetensors", "model.json", "README.md", "samples.png"}
        assert {f.name for f in exported.iterdir()} == files
        weights, description = (exported / name for name in ("model.safetensors", "model.json"))
        assert weights.stat().st_mode == description.stat().st_mode  # both as the umask allows

    def test_reading_needs_neither_lightning_nor_the_command_line(self, exported):
        code = f"""
import sys
from mflow_kernels import HierarchicalFlow
HierarchicalFlow.from_pretrained({str(exported)!r})
assert not [m for m in sys.modules if m in ("lightning", "jsonargparse", "yaml", "torchvision")]
rooms = ("mflow_kernels.training", "mflow_kernels.runs")
assert not [m for m in sys.modules if m.startswith(rooms)]
"""
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_it_overwrites_nothing(self, exported, trained, capsys):
        line = refused(["export", str(trained), "--out", str(exported)], exported, capsys)
        assert "--out: expected a new folder, but" in line

    def test_the_card_has_data_figures_and_a_command_that_trains_the_model(
        self, exported, trained, tmp_path, monkeypatch
    ):
        card = (exported / "README.md").read_text()
        evaluation = json.loads((trained / "evaluation.json").read_text())
        config = read_config(trained)
        bits = evaluation["stages"][-1]["bits_per_dim"]
        assert f"| bits per dimension | {bits:.3f} |" in card
        assert f"On {evaluation['images']} held-out image" in card
        assert "![Samples](samples.png)" in card
        assert f"of {config.data_name}: 8x8, grey, 8 bits" in card
        assert str(Path(config.data).parent) not in card  # a path of this machine
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        monkeypatch.chdir(tmp_path)
        exec(code.replace("this-folder", str(exported)), {})
        assert (tmp_path / "sample.png").exists()
        (line,) = re.findall(r"^    (mflow train .*)$", card, re.MULTILINE)
        parsed = vars(_parsers()[0].parse_args(shlex.split(line)[1:]).train)
        for option in fields(TrainConfig):
            want = getattr(config, option.name)
            assert parsed[option.name] == (Path(want).name if option.name == "data" else want)

    def test_a_card_without_figures(self, trained, tmp_path):
        damaged = tmp_path / "evaluation.json"
        damaged.write_text('{"stages": []}')
        config = read_config(trained)
        for path in (tmp_path / "absent", damaged):
            card = model_card(config, 7, None, path, samples=False)
            assert "None yet: `mflow evaluate` computes them." in card
            assert "](samples.png)" not in card
