"""`mflow plan`: steps, disk, arithmetic of a step, and advice. test_memory.py tests its memory."""

import dataclasses
import re
import zipfile
from collections import Counter

import pytest
import torch
from tiny_runs import TINY, write_images, zip_up

from benchmarks.reports import step_counts
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.splits import count_training_images, load_splits
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.folder import build_model, read_config
from mflow_kernels.runs.options import StageOptions
from mflow_kernels.runs.presets import preset_options
from mflow_kernels.training.cards import CARDS
from mflow_kernels.training.cli import main
from mflow_kernels.training.memory import (
    checkpoint_bytes,
    choose_states,
    resolve_config,
    step_of,
    walk,
)
from mflow_kernels.training.plan import ROOFLINE_SHARE, describe_fit, parse_memory


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_kernels_of_a_walk_are_those_of_whole_steps(precision, reversible):
    """A walk on meta tensors counts what `whole_steps` counts of a step on real ones."""
    options = {"levels": 3, "steps": 2, "width": 128, "batch_size": 8, "manifold_dim": 64}
    options |= {"precision": precision, "domain": "latent", "reversible": reversible}
    config = resolve_config(TrainConfig(image_size=32, stages=[], **options), 3, gpu=True)
    model = build_model(config)
    images = torch.zeros(config.batch_size, *config.image_shape, dtype=torch.uint8)

    def run():
        dtype = getattr(torch, precision)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            terms, _ = model.terms_and_log_prob(dequantize(images, config.n_bits), stage=0)
        terms.loss.mean().backward()

    counted = Counter((k.name, k.flops, k.moved) for k in step_counts.count(run, model, images))
    *kernels, _, _, _, _ = step_of(config, 0).kernels  # the last ones are the optimizer's
    walked = Counter((k.name, k.flops, k.moved) for k in kernels)
    assert counted == walked


class TestTrainingStep:
    CONFIG = TrainConfig(
        manifold_dim=32, stages=[StageOptions(16)], domain="latent", width=128,
        precision="bfloat16",
    ).resolve((3, 32, 32))  # fmt: skip

    def flops(self, stage, **changed) -> int:
        config = dataclasses.replace(self.CONFIG, **changed)
        return sum(k.flops for k in step_of(config, stage).kernels)

    def test_a_later_stage_computes_its_data_by_the_earlier_ones(self):
        kept, released = self.flops(1), self.flops(1, release=True)
        # Kept, the first stage runs forward once. Released, it runs forward twice, and backward
        # with twice the products.
        assert 0.2 < kept / released < 0.4
        assert released > self.flops(0)

    def test_networks_by_torchs_layers_move_more(self, monkeypatch):
        fused = sum(k.moved for k in step_of(self.CONFIG, 0).kernels)
        monkeypatch.setenv("MFLOW_NETWORK", "torch")
        assert sum(k.moved for k in step_of(self.CONFIG, 0).kernels) > 1.5 * fused


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_has_the_predicted_size(optimizer, tmp_path):
    images, run = write_images(tmp_path / "images"), tmp_path / "run"
    # The networks are wide, so that tensors and not their names take most of the file.
    options = [*TINY, "--width", "256", "--stage-width", "256", "--optimizer", optimizer]
    assert main(["train", *options, "--data", str(images), "--run-dir", str(run)]) == 0
    size = (run / "last.ckpt").stat().st_size
    config = read_config(run, "run")
    assert checkpoint_bytes(walk(config)) == pytest.approx(size, rel=0.05)


class TestCommand:
    def plan(self, capsys, *options) -> str:
        assert main(["plan", *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    def test_nothing_is_allocated_or_read(self, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (step,) = walk(resolve_config(TrainConfig(stages=[]), 3, gpu=True))
        assert all(tensor.is_meta for tensor in step.model.state_dict().values())
        options = "--image-size 256 --levels 6 --steps 4 --width 512 --batch-size 16"
        out = self.plan(capsys, *options.split(), "--gpu-memory", "80GB")
        assert "16 images of 3x256x256" in out
        assert "\nFits in 80.0 GB. Largest batch in 80.0 GB: " in out
        assert "not verified on a GPU" in out
        assert not list(tmp_path.iterdir())

    def test_a_batch_that_does_not_fit_is_reported(self, capsys):
        out = self.plan(capsys, "--batch-size", "999999", "--gpu-memory", "8GB")
        assert "\nDoes not fit in 8.0 GB. Largest batch" in out
        assert "States rebuilt" in out
        assert "Largest batch in 1.0 MB: none fits" in self.plan(capsys, "--gpu-memory", "1MB")

    def test_on_a_cpu_the_rows_add_up_and_there_are_no_hours(self, capsys):
        out = self.plan(capsys, "--data", "digits", "--device", "cpu")
        assert "1x28x28" in out
        assert not re.search("GPU|H100", out)
        units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
        rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
        sizes = [float(row[-2]) * units[row[-1]] for row in rows]
        assert sum(sizes[:-1]) == pytest.approx(sizes[-1], rel=0.01)

    def test_it_takes_the_options_of_train(self, capsys, tmp_path):
        unread = tmp_path / "not read.zip"
        with zipfile.ZipFile(unread, "w") as archive:
            archive.writestr("image.png", "no image")
        rebuilt = ["--data", str(unread), "--checkpoint-every", "null"]
        for options, words in (
            (rebuilt, "States rebuilt; networks"),
            (["--no-reversible"], "States stored"),
            (["--checkpoint-every", "2"], "States rebuilt, one in 2 kept"),
        ):
            assert words in self.plan(capsys, *TINY, *options)

    def test_preset(self, capsys):
        preset = ["--preset", "celeba64", "--steps", "1"]
        out = self.plan(capsys, *preset, "--gpu-memory", "80GB", "--images", "162770")
        options = {**preset_options("celeba64"), "steps": 1, "reversible": False}
        config = resolve_config(TrainConfig(**options), None, gpu=True)
        steps = 60 * (162770 // 128)
        step = step_of(config, 0)
        seconds = CARDS["H100"].lower_bound(step.kernels)
        hours = steps * seconds / ROOFLINE_SHARE / 3600
        row = next(line for line in out.splitlines() if line.startswith("stage 1 "))
        assert row.split()[2:5] == [f"{step.parameters:,}", f"{steps:,}", f"{hours:.2f}"]
        for words in ("2.0 GB of prepared training images", "estimates", "lower bound"):
            assert words in out
        assert "Nobody has trained with batches of that size" in out
        unknown = self.plan(capsys, *preset)  # names data that this machine may not have
        assert "of 3x64x64" in unknown
        assert "give the number of training images, such as --images 162770" in unknown
        assert "prepared training images" not in unknown

    def test_images_and_steps_are_those_of_training(self, capsys, images, tmp_path):
        """A tenth of the files is held out, at least two, and the last images of a pass that do not
        fill a batch are left out."""
        celeba = write_images(tmp_path / "celeba" / "img_align_celeba", 5, (178, 218), channels=3)
        parts = "".join(f"{number:03}.png {max(0, number - 2)}\n" for number in range(5))
        (celeba.parent / "list_eval_partition.txt").write_text(parts)
        archive, prepared = zip_up(images, tmp_path / "a.zip"), tmp_path / "file.safetensors"
        assert main(["prepare", str(images), "--out", str(prepared), "--image-size", "16"]) == 0
        capsys.readouterr()
        counts = {"digits": 4500, images: 10, archive: 10, celeba.parent: 3, prepared: 10}
        for data, count in counts.items():
            assert count_training_images(str(data)) == len(load_splits(str(data)).train) == count
            options = ["--data", str(data), "--max-steps", "null", "--epochs", "5"]
            out = self.plan(capsys, *TINY[2:], *options)
            rows = [line.split() for line in out.splitlines() if line.startswith("stage ")]
            assert [row[3] for row in rows[1:]] == [f"{5 * (count // min(4, count)):,}"] * 2
            assert ("prepared" in out) == (data != "digits")  # which are held in memory
        assert "4 images of 1x16x16" in out  # as the prepared file says
        assert count_training_images("no such file") is None
        assert "?" not in self.plan(capsys, *TINY)  # --max-steps needs no number of images


class TestAdvice:
    CONFIG = TrainConfig(**{**preset_options("celeba64"), "steps": 2, "stages": []}).resolve(
        (3, 64, 64)
    )

    @pytest.mark.parametrize(
        ("reversible", "memory", "begin", "advice"),
        [
            (True, "80GB", "Fits", "--no-reversible fits too"),
            (True, "2GB", "Fits", "--no-reversible does not fit"),
            (False, "2GB", "Does not fit", "--reversible fits"),
            (False, "80GB", "Fits", "With --reversible it takes"),
            (True, "500MB", "Does not fit", ""),
        ],
    )
    def test_the_other_training_is_advised_where_it_helps(self, reversible, memory, begin, advice):
        config = dataclasses.replace(self.CONFIG, reversible=reversible)
        text = describe_fit(config, walk(config), parse_memory(memory))
        assert text.startswith(begin)
        assert advice in text
        assert ("Nobody has trained" in text) == (begin == "Fits")  # with a larger batch

    @pytest.mark.parametrize(
        ("memory", "option", "processes", "stores"),
        [
            ("80GB", None, 1, True),
            ("80GB", True, 1, False),
            ("3GB", None, 1, False),
            ("3GB", False, 1, True),
            ("3GB", None, 64, True),  # a process computes 2 of the 128 images
        ],
    )
    def test_states_are_stored_where_a_card_has_room(self, memory, option, processes, stores):
        options = TrainConfig(**{**preset_options("celeba64"), "steps": 2, "reversible": option})
        resolved = options.resolve((3, 64, 64))
        assert resolved.reversible is (option is not False)  # also on a CPU
        choose_states(resolved, options, parse_memory(memory), processes)
        assert resolved.reversible is not stores
