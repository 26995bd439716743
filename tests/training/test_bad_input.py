"""Bad input to every command: one line on stderr, exit code 2, nothing written."""

import shutil

import pytest
import torch
from tiny_runs import TINY, refused, write_images, zip_up

from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.training.cli import main

NAMES = ", ".join(map(repr, NAMED_DATASETS))
NO_DATA = f"--data: expected {NAMES}, a folder or zip of images, or a file of mflow prepare, got "


# Options of `mflow train`, which follow those of a tiny run. RUN is one, and `data` has folders and
# files that cannot be used.
TRAIN = [
    ("--lr 0.1", "arguments: --lr 0.1 (did you mean --learning-rate?)"),
    ("--wdith 4 --batchsize=3", "(did you mean --width, --batch-size?)"),
    ("--stage-dims 4 3", "arguments: --stage-dims 4 3 (did you mean --stage-dim?)"),
    ("--zzz", "unrecognized arguments: --zzz\n"),
    ("--levels 4", "divisible by 2 ** levels = 16, got 8x8"),
    ("--levels two", "--levels: expected a whole number, got two"),
    ("--levels 99999999999", "--levels: expected at most 31, got 99999999999"),
    ("--manifold-dim 65", "--manifold-dim: expected 1 to 64"),
    ("--stage-dim 7", "--stage-dim: expected dimensions from 1 to the 6"),
    ("--stage-coupling cubic", "--stage-coupling: expected one of affine, spline, got cubic"),
    ("--stage-learning-rate 0", "--stage-learning-rate: expected a finite number > 0, got"),
    ("--stages [{'bins':1}]", "--stages[0].bins: expected 2 to 64, got 1"),
    ("--stages [{},{'epochs':x}]", "--stages[1].epochs: expected a whole number, got x"),
    ("--stages [{'weight_steps':2}]", "--stages[0].weight_steps: expected --stages[0].final_weig"),
    ("--stages [3]", "--stages[0]: expected options such as {dim: 32}, got 3"),
    ("--stages {}", "--stages: expected a list such as [{dim: 32}], got {}"),
    (f"--stages {'[' * 9999}", "--stages: expected a list in YAML ("),
    ("--batch-size 0", "--batch-size: expected at least 1, got 0"),
    ("--max-steps 1.5", "--max-steps: expected a whole number, got 1.5"),
    ("--image-size 0", "--image-size: expected at least 1, got 0"),
    ("--n-bits 9", "--n-bits: expected 1 to 8, got 9"),
    ("--rho l3", f"--rho: expected one of {', '.join(RHOS)}, got l3"),
    ("--seed -1", "--seed: expected at least 0, got -1"),
    ("--weight big", "--weight: expected a number or variance, got big"),
    ("--device tpu", "--device: expected one of auto, cpu, cuda, got tpu"),
    ("--precision float16", "--precision: expected float32 or bfloat16 on a CPU"),
    ("--data /nowhere", NO_DATA + "'/nowhere'"),
    ("--data empty", "--data: expected images in empty, found none"),
    ("--data text", "--data: expected images in text, but no file there can be read as an"),
    ("--data= --run-dir ../run", NO_DATA + "''"),
    ("--device cuda", "--device: expected a CUDA GPU for 'cuda', found none"),
    ("--preset own.yaml", "--preset: expected digits, digits_nested, celeba64"),
    ("--run-dir images/runs/a", "--run-dir: expected a folder outside of the images' folder"),
    ("--run-dir RUN", "(--resume continues it, --overwrite replaces it)"),
    ("--resume", "--run-dir: expected a folder of mflow train with config.yaml"),
    ("--run-dir work --overwrite", "--run-dir: --overwrite expected a folder of mflow train"),
    ("--resume --overwrite", "--resume: expected either --resume or --overwrite, got both"),
    ("--width 100000000", "--width, --steps, --stages: expected a model that fits in"),
    ("--stage-width 1099511627776", "expected a model that fits in memory"),
    ("--checkpoint-every 0", "--checkpoint-every: expected at least 1, got 0"),
    ("--max-drift nan", "--max-drift: expected a number, got nan"),
    ("--max-condition 0.5", "--max-condition: expected at least 1, got 0.5"),
    ("--reversible maybe", "maybe"),
]  # fmt: skip

COMMANDS = [
    ("prepare nowhere --out a", ": data: expected a folder or zip of images, found none at"),
    ("prepare images", "--out: expected a value, got none"),
    ("prepare images --out images/a", "--out: expected a file outside of the images' folder"),
    ("prepare zip --out zip --overwrite", "--out: expected a file outside of the images' folder"),
    ("prepare images --out no/where", "--out: expected a folder that can be written, got no"),
    ("prepare images --out made", "--out: made exists and was not made from these images at 64x64"),
    ("prepare images --out made --overwrite", "--out: expected a file of mflow prepare to overwri"),
    ("prepare images --out circle", "--out: expected a path that can exist, got circle (symbolic"),
    ("prepare images --out a --image-size 0", "--image-size: expected at least 1, got 0"),
    ("prepare images --out a --workers 0", "--workers: expected at least 1, got 0"),
    ("prepare text --out a", ": data: expected images in text, but no file there can be read as "),
    ("", "expected a command (mflow --help lists them)"),
    ("draw", "expected a command (mflow --help lists them), got 'draw'"),
    ("presets none", ": preset: expected digits, "),
    ("plan --data=", NO_DATA + "''"),
    ("plan --gpu-memory 80", "--gpu-memory: expected a size such as 80GB or 16GiB, got 80"),
    ("plan --gpu-memory 0GB", "--gpu-memory: expected a size"),
    ("plan --channels 0", "--channels: expected at least 1, got 0"),
    ("plan --images 0", "--images: expected at least 1, got 0"),
    ("plan --classes a,b,c,d,e,f,g", "--classes: expected up to 6 different attributes, got"),
    ("plan --classes labels", "--classes: expected a named data set or a file of mflow prepare"),
    ("plan --data nowhere", "--data: expected 'digits', a folder or zip of images, or a file"),
    ("plan --levels 7", "divisible by 2 ** levels = 128, got 64x64"),
    ("plan --manifold-dim 12289", "--manifold-dim: expected 1 to 12288"),
    ("plan --stage-dim 65", "--stage-dim: expected dimensions from 1 to the 64"),
    ("plan --device cpu --precision float16", "--precision: expected float32 or bfloat16"),
    ("plan --run-dir x", "unrecognized arguments: --run-dir x"),
    ("evaluate RUN --device cuda", "--device: expected a CUDA GPU for 'cuda', found none"),
    ("sample", "run: expected a value, got none"),
    ("sample .", "run: expected a folder of mflow train"),
    ("reconstruct .", "run: expected a folder of mflow train"),
    ("evaluate .", "run: expected a folder of mflow train"),
    ("sample RUN --number 0", "--number: expected at least 1, got 0"),
    ("sample RUN --temperature -1", "--temperature: expected at least 0, got -1"),
    ("sample RUN --stages 3", "--stages: expected 1 to 2, got 3"),
    ("sample RUN --output a.jpg", "--output: expected a name ending in .png"),
    ("sample RUN --output no/where/a.png", "--output: expected an existing folder"),
    ("reconstruct RUN --missing left", "--missing: expected one of half, centre, pixels, got left"),
    ("reconstruct RUN --data coloured", "--data: expected grey images, got 3 colour channels"),
    ("evaluate RUN --data coloured", "--data: expected grey images, got 3 colour channels"),
    ("evaluate RUN --data large", "--data: expected images of 8x8 pixels, got 16x16 in large"),
    ("evaluate RUN --ood large", "--ood: expected images of 8x8 pixels, got 16x16 in large"),
]


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(images, folder / "images")
    (folder / "empty").mkdir()
    (folder / "work").mkdir()
    (folder / "work" / "thesis.tex").write_text("years of work")
    (folder / "circle").symlink_to("circle")
    (folder / "made").write_text("by somebody else")
    zip_up(images, folder / "zip")
    (folder / "text").mkdir()
    (folder / "text" / "a.png").write_text("no image")
    write_images(folder / "coloured", channels=3)
    prepare = ["prepare", str(images), "--out", str(folder / "large")]
    assert main([*prepare, "--image-size", "16"]) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [*((f"train {words}", message) for words, message in TRAIN), *COMMANDS],
)
def test_bad_input(arguments, message, data, trained, monkeypatch, capsys):
    if "--device cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(data)
    words = [str(trained) if word == "RUN" else word for word in arguments.split()]
    if words[:1] == ["train"]:
        words[1:1] = [*TINY, "--data", "images", "--run-dir", "run"]
    assert message in refused(words, data, capsys)


@pytest.mark.parametrize("command", ["sample RUN", "evaluate RUN", "train --resume --run-dir RUN"])
def test_a_checkpoint_of_another_architecture(command, run, tmp_path, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("\nwidth: 8", "\nwidth: 16"))
    message = "checkpoint: expected the architecture of config.yaml, got another"
    assert message in refused(command.replace("RUN", str(run)).split(), tmp_path, capsys)


def test_missing_pixels_without_a_manifold(command, tmp_path, capsys):
    assert main([*command, "--manifold-dim", "64", "--stages", "[]"]) == 0
    message = "--missing: expected a model whose manifold has fewer dimensions than its images"
    reconstruct = ["reconstruct", str(tmp_path / "run"), "--missing", "half"]
    assert message in refused(reconstruct, tmp_path, capsys)
