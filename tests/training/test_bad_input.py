"""Bad input to every command: one line on stderr, exit code 2, nothing written."""

import pytest
import torch
from tiny_runs import TINY, refused, write_images

from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.training.cli import main

NAMES = ", ".join(map(repr, NAMED_DATASETS))


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--lr 0.1", "arguments: --lr 0.1 (did you mean --learning-rate?)"),
            ("--wdith 4 --batchsize=3", "(did you mean --width, --batch-size?)"),
            ("--zzz", "unrecognized arguments: --zzz\n"),
            ("--levels 4", "divisible by 2 ** levels = 16, got 8x8"),
            ("--levels 0", "--levels: expected at least 1, got 0"),
            ("--levels two", "--levels: expected a whole number, got two"),
            ("--manifold-dim 0", "--manifold-dim: expected at least 1, got 0"),
            ("--manifold-dim 65", "--manifold-dim: expected 1 to 64"),
            ("--manifold-dim 1000000", "--manifold-dim: expected 1 to 64"),
            ("--stage-dim 7", "--stage-dim: expected dimensions from 1 to the 6"),
            ("--stage-dim x", "--stage-dim: expected a whole number, got x"),
            (
                "--stage-coupling cubic",
                "--stage-coupling: expected one of affine, spline, got cubic",
            ),
            ("--stage-bins 1", "--stage-bins: expected 2 to 64, got 1"),
            ("--stage-steps=0", "--stage-steps: expected at least 1, got 0"),
            ("--stage-learning-rate 0", "--stage-learning-rate: expected a finite number > 0, got"),
            ("--stage-dims 4 3", "arguments: --stage-dims 4 3 (did you mean --stage-dim?)"),
            ("--stages [{'bins':1}]", "--stages[0].bins: expected 2 to 64, got 1"),
            ("--stages [{},{'epochs':x}]", "--stages[1].epochs: expected a whole number, got x"),
            (
                "--stages [{'weight_steps':2}]",
                "--stages[0].weight_steps: expected --stages[0].final_weight too, got none",
            ),
            ("--stages [{'stepz':1}]", "--stages[0]: expected dim, coupling, "),
            ("--stages [3]", "--stages[0]: expected options such as {dim: 32}, got 3"),
            ("--stages {}", "--stages: expected a list such as [{dim: 32}], got {}"),
            ("--stages [", "--stages: expected a list in YAML ("),
            (f"--stages {'[' * 9999}", "--stages: expected a list in YAML ("),
            ("--batch-size 0", "--batch-size: expected at least 1, got 0"),
            ("--max-steps 0", "--max-steps: expected at least 1, got 0"),
            ("--max-steps 1.5", "--max-steps: expected a whole number, got 1.5"),
            ("--image-size 0", "--image-size: expected at least 1, got 0"),
            ("--n-bits 9", "--n-bits: expected 1 to 8, got 9"),
            ("--learning-rate 0", "--learning-rate: expected a finite number > 0, got 0"),
            ("--weight -1", "--weight: expected a finite number > 0, got -1"),
            ("--rho l3", f"--rho: expected one of {', '.join(RHOS)}, got l3"),
            ("--seed -1", "--seed: expected at least 0, got -1"),
            ("--device tpu", "--device: expected one of auto, cpu, cuda, got tpu"),
            ("--precision float16", "--precision: expected float32 or bfloat16 on a CPU"),
            (
                "--data /nowhere",
                f"--data: expected {NAMES}, a folder or zip of images, or a file of mflow "
                "prepare, got '/nowhere'",
            ),
            ("--resume", "--run-dir: expected a folder of mflow train with config.yaml"),
            ("--resume --overwrite", "--resume: expected either --resume or --overwrite, got both"),
            ("--final-weight 2", "--final-weight: expected --weight-steps too, got none"),
            (
                "--error-bound 1 --final-weight 2 --weight-steps 3",
                "--error-bound: expected none together with --final-weight",
            ),
            ("--width 100000000", "--width, --steps, --stages: expected a model that fits in"),
            ("--width 1099511627776", "expected a model that fits in memory"),
            ("--stage-width 1099511627776", "expected a model that fits in memory"),
            ("--levels 99999999999", "--levels: expected at most 31, got 99999999999"),
            ("--checkpoint-every 0", "--checkpoint-every: expected at least 1, got 0"),
            ("--checkpoint-every x", "--checkpoint-every: expected a whole number, got x"),
            ("--max-drift 0", "--max-drift: expected a finite number > 0, got 0"),
            ("--max-drift nan", "--max-drift: expected a number, got nan"),
            ("--max-condition 0.5", "--max-condition: expected at least 1, got 0.5"),
            ("--reversible maybe", "maybe"),
            ("--cuda-graphs", "--cuda-graphs: expected a CUDA device"),
            ("--colour red", "unrecognized arguments: --colour red"),
        ],
    )
    def test_train(self, arguments, message, command, tmp_path, capsys):
        assert message in refused([*command, *arguments.split()], tmp_path, capsys)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_cuda_without_a_gpu(self, command, trained, tmp_path, capsys):
        message = "--device: expected a CUDA GPU for 'cuda', found none"
        for arguments in (command, ["evaluate", str(trained)]):
            assert message in refused([*arguments, "--device", "cuda"], tmp_path, capsys)

    def test_folders_without_images(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "a.png").write_text("no image")
        for data, detail in (
            ("empty", "found none"),
            ("text", "but no file there can be read as an image"),
        ):
            message = f"--data: expected images in {data}, {detail}"
            assert message in refused(["train", *TINY, "--data", data], tmp_path, capsys)

    def test_a_run_among_its_images(self, command, images, tmp_path, capsys):
        message = "--run-dir: expected a folder outside of the images' folder"
        inside = str(images / "runs" / "a")
        assert message in refused([*command, "--run-dir", inside], images.parent, capsys)

    def test_an_empty_name(self, command, images, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(images)  # which Path("") stands for
        for arguments in (command, ["plan"]):
            assert f"--data: expected {NAMES}, a folder or zip of images" in refused(
                [*arguments, "--data", ""], tmp_path, capsys
            )

    def test_an_existing_run_folder(self, run, command, capsys):
        assert "(--resume continues it, --overwrite replaces it)" in refused(command, run, capsys)

    def test_overwrite_spares_folders_that_are_no_runs(self, command, tmp_path, capsys):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("years of work")
        message = "--run-dir: --overwrite expected a folder of mflow train with config.yaml"
        assert message in refused([*command, "--overwrite"], tmp_path, capsys)

    @pytest.mark.parametrize("command", ["sample", "reconstruct", "evaluate"])
    def test_broken_runs(self, command, run, tmp_path, capsys):
        message = "run: expected a folder of mflow train with config.yaml"
        assert message in refused([command, str(tmp_path)], tmp_path, capsys)
        checkpoint = run / "last.ckpt"
        (run / "previous.ckpt").unlink()
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(whole[: len(whole) // 2])
        message = "checkpoint: expected a complete checkpoint of mflow train"
        assert message in refused([command, str(run)], tmp_path, capsys)
        torch.save({"weights": torch.zeros(2)}, checkpoint)
        assert "got another kind of file" in refused([command, str(run)], tmp_path, capsys)
        checkpoint.unlink()
        assert "last.ckpt, found none" in refused([command, str(run)], tmp_path, capsys)
        (run / "config.yaml").write_text("levels: two")
        message = "config.yaml: levels: expected a whole number, got two"
        assert message in refused([command, str(run)], tmp_path, capsys)

    @pytest.mark.parametrize(
        "command", ["sample RUN", "evaluate RUN", "train --resume --run-dir RUN"]
    )
    def test_a_checkpoint_of_another_architecture(self, command, run, tmp_path, capsys):
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("\nwidth: 8", "\nwidth: 16"))
        message = "checkpoint: expected the architecture of config.yaml, got another"
        assert message in refused(command.replace("RUN", str(run)).split(), tmp_path, capsys)

    def test_a_checkpoint_that_carries_code(self, run, tmp_path, capsys):
        class Trap:
            def __reduce__(self):
                return open, (str(tmp_path / "trapped"), "w")

        (run / "previous.ckpt").unlink()
        torch.save({"state_dict": {}, "trap": Trap()}, run / "last.ckpt")
        message = "checkpoint: expected a complete checkpoint of mflow train"
        assert message in refused(["evaluate", str(run)], tmp_path, capsys)

    def test_channels_that_do_not_match(self, run, tmp_path, capsys):
        coloured = write_images(tmp_path / "coloured", channels=3)
        for command in ("reconstruct", "evaluate"):
            message = "--data: expected grey images, got 3 colour channels"
            assert message in refused(
                [command, str(run), "--data", str(coloured)], tmp_path, capsys
            )

    @pytest.mark.parametrize("option", ["--data", "--ood"])
    def test_prepared_images_of_another_size(self, option, images, trained, tmp_path, capsys):
        file = str(tmp_path / "file")
        assert main(["prepare", str(images), "--out", file, "--image-size", "16"]) == 0
        message = f"{option}: expected images of 8x8 pixels, got 16x16 in {file}"
        assert message in refused(["evaluate", str(trained), option, file], tmp_path, capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--number 0", "--number: expected at least 1, got 0"),
            ("--temperature -1", "--temperature: expected at least 0, got -1"),
            ("--stages 3", "--stages: expected 1 to 2, got 3"),
            ("--output a.jpg", "--output: expected a name ending in .png"),
            ("--output no/where/a.png", "--output: expected an existing folder"),
        ],
    )
    def test_sample(self, arguments, message, run, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert message in refused(["sample", str(run), *arguments.split()], tmp_path, capsys)

    def test_reconstruct(self, run, tmp_path, capsys):
        message = "--missing: expected one of half, centre, pixels, got left"
        command = ["reconstruct", str(run), "--missing", "left"]
        assert message in refused(command, tmp_path, capsys)

    def test_missing_pixels_without_a_manifold(self, command, tmp_path, capsys):
        assert main([*command, "--manifold-dim", "64", "--stages", "[]"]) == 0
        message = "--missing: expected a model whose manifold has fewer dimensions than its images"
        reconstruct = ["reconstruct", str(tmp_path / "run"), "--missing", "half"]
        assert message in refused(reconstruct, tmp_path, capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "expected a command (mflow --help lists them)"),
            (["draw"], "expected a command (mflow --help lists them), got 'draw'"),
            (["sample"], "run: expected a value, got none"),
            (["prepare", "none", "--out", "a"], ": data: expected a folder or zip"),
            (["presets", "none"], ": preset: expected digits, "),
            (["train", "--levels", "9"], "--levels: expected height and width divisible by 2 **"),
            (["train", "--weight", "big"], "--weight: expected a number or variance, got big"),
        ],
    )
    def test_commands(self, arguments, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert message in refused(arguments, tmp_path, capsys)
