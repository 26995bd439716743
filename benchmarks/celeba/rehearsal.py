"""Rehearse training on CelebA, in minutes on a CPU.

The rehearsal writes a folder in CelebA's format from images that scikit-image and scikit-learn
ship. It then runs the commands that a user with CelebA runs, and checks their results: prepare the
zip (killed once and repeated), train at 64x64 (killed halfway and resumed), sample, reconstruct,
evaluate and export. The model is the preset celeba64 with fewer steps, channels and manifold
dimensions, so it learns little about faces.
"""

import json
import math
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.celeba.fake_celeba import make_celeba
from benchmarks.harness.output import command_parser
from mflow_kernels import HierarchicalFlow
from mflow_kernels.data.prepared import open_prepared
from mflow_kernels.training.callbacks import read_metrics

IMAGES = 2000
STEPS = 160
SCALED = shlex.split(
    "--preset celeba64 --steps 4 --width 32 --manifold-dim 32 --stages [] --batch-size 16 "
    f"--max-steps {STEPS} --warm-up 20 --save-steps 20 --precision float32 --device cpu"
)


def main() -> None:
    parser = command_parser("benchmarks.celeba.rehearsal", __doc__)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="new folder to keep everything in (default: a temporary one)",
    )
    folder = parser.parse_args().folder
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            rehearse(Path(temporary))
    else:
        folder.mkdir(parents=True)
        rehearse(folder)


def rehearse(folder: Path) -> None:
    """Run all commands; raise AssertionError or CalledProcessError at the first failure."""
    data, file, run = folder / "celeba", folder / "celeba64.safetensors", folder / "run"
    make_celeba(data, IMAGES, zipped=True)
    print(f"made {IMAGES} images in CelebA's format in {data}")

    prepare = ["prepare", str(data), "--out", str(file), "--image-size", "64"]
    journal = file.with_name(f".{file.name}.journal")
    kill(prepare, lambda: journal.exists() and journal.read_bytes().count(b"\n") > 3)
    check(not file.exists(), "the killed command left no file")
    mflow(prepare)
    mflow(prepare)
    prepared = open_prepared(file)
    check(prepared.record.count == [1600, 200, 200], "the official partition was kept")

    train = ["train", "--data", str(file), "--run-dir", str(run), *SCALED]
    kill(train, lambda: last_step(run) >= STEPS // 2)
    mflow([*train, "--resume"])
    rows = read_metrics(run / "metrics.csv")
    bits = [row["bits_per_dim"] for row in rows if "bits_per_dim" in row]
    check(int(rows[-1]["step"]) >= STEPS - 20, "training ran to its end")
    check(all(map(math.isfinite, bits)), "every logged loss is finite")
    check(sum(bits[-5:]) / 5 < sum(bits[:5]) / 5 - 1, "it learned more than a bit per dimension")

    mflow(["sample", str(run), "--number", "24"])
    mflow(["reconstruct", str(run)])
    mflow(["evaluate", str(run)])
    evaluation = json.loads((run / "evaluation.json").read_text())
    check(evaluation["images"] == 200, "it was evaluated on the test part")
    check((run / "report" / "report.html").is_file(), "it wrote a report")
    mflow(["export", str(run), "--out", str(folder / "exported")])
    HierarchicalFlow.from_pretrained(folder / "exported")
    print(f"\nrehearsed with torch {torch.__version__}; all checks passed")


def mflow(arguments: Sequence[str]) -> None:
    """Run one mflow command to its end and print how long it took."""
    print(f"\n$ mflow {shlex.join(arguments)}", flush=True)
    started = time.perf_counter()
    subprocess.run(command(arguments), check=True)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def kill(arguments: Sequence[str], when: Callable[[], bool]) -> None:
    """Start one mflow command and kill it (SIGKILL) as soon as `when()` is true."""
    print(f"\n$ mflow {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen(command(arguments))
    while not when():
        if process.poll() is not None:
            raise AssertionError(f"the command ended with {process.returncode} before the kill")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print("(killed with kill -9)", flush=True)


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of mflow under this interpreter; it need not be installed."""
    program = "import sys; from mflow_kernels.training.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, *arguments]


def last_step(run: Path) -> int:
    rows = read_metrics(run / "metrics.csv")
    return int(rows[-1]["step"]) if rows else 0


def check(holds: bool, what: str) -> None:
    """Print that a check passed, or raise AssertionError."""
    if not holds:
        raise AssertionError(f"check failed: {what}")
    print(f"checked: {what}", flush=True)


if __name__ == "__main__":
    main()
