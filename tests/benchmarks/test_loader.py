"""The command that measures how fast the loader reads images."""

import re
import sys

import numpy as np
import torch
from tiny_runs import write_images

from benchmarks.celeba import loader
from mflow_kernels.training.cli import main


def test_a_prepared_file_and_a_run_are_measured(trained, tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "images.safetensors")
    prepare = ["prepare", str(write_images(tmp_path / "images")), "--out", file]
    assert main([*prepare, "--image-size", "8", "--workers", "1"]) == 0
    monkeypatch.setattr(sys, "argv", ["loader", file, "--run", str(trained)])
    loader.main()
    out = capsys.readouterr().out
    assert re.search(r"^1x8x8 +256( +[\d.,]+){5}$", out, re.MULTILINE)
    assert f"training in {trained} reached " in out

    path, images = tmp_path / "large", np.zeros((3, 1, 1100, 1100), np.uint8)
    images.tofile(path)  # larger than the listed sizes
    assert loader.measure(path, images, torch.device("cpu"))[:2] == ["1x1100x1100", 1]
