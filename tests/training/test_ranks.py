"""Two ranks on a CPU, in the environment that torchrun sets, train as one process does."""

import pytest
import torch
from tiny_runs import TINY, metrics, refused, torchrun, write_images

from mflow_kernels.training.cli import main


def column(folder, name):
    return [(row["step"], float(row[name])) for row in metrics(folder, name)]


@pytest.mark.parametrize("release", [False, True])
def test_two_ranks_train_as_one(release, tmp_path):
    # Three images are held out, so in the last batch of validation one rank has no image.
    faces = write_images(tmp_path / "faces", count=24)
    (faces / "none.png").write_text("no image")
    options = ["--batch-size", "2", "--error-bound", "0.01", "--data", str(faces)]
    options += ["--release"] if release else []
    command = ["train", *TINY, *options, "--run-dir"]
    torchrun([*command, str(tmp_path / "both")], tmp_path)
    assert "skipped 1 file that cannot be read: none.png" in (tmp_path / "log0").read_text()
    assert "skipped" not in (tmp_path / "log1").read_text()  # only rank 0 prints
    assert main([*command, str(tmp_path / "one")]) == 0
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    both, one = (column(tmp_path / name, "loss_bits_per_dim") for name in ("both", "one"))
    assert [step for step, _ in both] == [step for step, _ in one]
    # Both halves of the first batch initialize actnorm. Only the image flow is compared: in the
    # second flow the gradient of actnorm's bias is a rounding error, which Adam turns into steps.
    # If the image flow is trained with it, the loss is that of the images again.
    losses = [[x for _, x in run[: 6 if release else 3]] for run in (both, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    both, one = (column(tmp_path / name, "heldout_bits_per_dim") for name in ("both", "one"))
    assert [step for step, _ in both] == [step for step, _ in one]
    assert both[0][1] == pytest.approx(one[0][1], rel=1e-4)
    assert (tmp_path / "both" / "samples.png").is_file()
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_batch_that_ranks_cannot_share_is_refused(command, tmp_path, monkeypatch, capsys):
    world = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "test"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    message = "--batch-size: expected a multiple of the 3 processes"
    assert message in refused(command, tmp_path, capsys)
