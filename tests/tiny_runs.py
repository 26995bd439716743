"""Options and images small enough for tests that train, and helpers that read runs."""

import csv
import os
import socket
import sys
import zipfile

import numpy as np
import torch
from PIL import Image

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


def refused(arguments, folder, capsys, code=2):
    """Assert that a command fails with one line and writes nothing in a folder; return the line."""
    from mflow_kernels.training.cli import main

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
    from mflow_kernels.training.cli import main

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

                def spied(run, fit=fit, rank=rank):
                    averaged = fit(run)
                    state = {**run.model.state_dict(), **averaged.state_dict(prefix="average.")}
                    torch.save(state, states / f"{rank}.pt")
                    return averaged

                train._fit = spied
                code = main(command)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], (states / "log0").read_text()
