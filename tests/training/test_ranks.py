"""Two ranks on a CPU, under the environment that torchrun sets, train as one does."""

import csv
import os
import socket
import sys

import pytest
import torch
from tiny_runs import TINY, write_images

from mflow_kernels.training import train
from mflow_kernels.training.cli import main


def torchrun(command, states):
    """What `torchrun --nproc-per-node 2` would run, in two forks; each leaves its final state."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for descriptor in (1, 2):
                    log = os.open(states / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.dup2(log, descriptor)
                sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
                os.environ |= {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
                    **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"},
                    **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
                    "GLOO_SOCKET_IFNAME": "lo",
                }
                fit = train._fit

                def spied(plan, fit=fit, rank=rank):
                    averaged = fit(plan)
                    state = {**plan.model.state_dict(), **averaged.state_dict(prefix="average.")}
                    torch.save(state, states / f"{rank}.pt")
                    return averaged

                train._fit = spied
                code = main(command)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], (states / "log0").read_text()


def figures(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], float(row[name])) for row in csv.DictReader(file) if row[name]]


def test_two_ranks_train_as_one(tmp_path):
    # Three are held out, for two ranks in batches of two: of the last one rank has none.
    faces = write_images(tmp_path / "faces", count=24)
    (faces / "none.png").write_text("no image")
    command = ["train", *TINY, "--batch-size", "2", "--data", str(faces), "--run-dir"]
    torchrun([*command, str(tmp_path / "both")], tmp_path)
    assert "skipped 1 file that cannot be read: none.png" in (tmp_path / "log0").read_text()
    assert "skipped" not in (tmp_path / "log1").read_text()  # one of them speaks for both
    assert main([*command, str(tmp_path / "one")]) == 0
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    both, one = (figures(tmp_path / name, "loss") for name in ("both", "one"))
    assert [step for step, _ in both] == [step for step, _ in one]
    # The image flow, set from both halves of the first batch: actnorm is that of the whole. Of the
    # flow after it the gradient of actnorm's bias is 0 but for rounding, of which Adam makes steps.
    assert [x for _, x in both[:3]] == pytest.approx([x for _, x in one[:3]], rel=1e-4)
    both, one = (figures(tmp_path / name, "heldout_bits_per_dim") for name in ("both", "one"))
    assert [step for step, _ in both] == [step for step, _ in one]
    assert both[0][1] == pytest.approx(one[0][1], rel=1e-4)
    assert (tmp_path / "both" / "samples.png").is_file()
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_batch_that_ranks_cannot_share_is_refused(images, tmp_path, monkeypatch, capsys):
    world = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "test"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    command = ["train", *TINY, "--data", str(images), "--run-dir", str(tmp_path / "run")]
    assert main(command) == 2
    assert "--batch-size: expected a multiple of the 3 processes" in capsys.readouterr().err
