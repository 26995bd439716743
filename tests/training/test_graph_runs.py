"""Training runs give the same result with CUDA graphs as without.

Without a GPU, the fixture `fake_capture` replaces the capture itself.
"""

import pytest
import torch
from cases import Calls
from tiny_runs import assert_same_run, metrics, spy, torchrun, weights

from mflow_kernels.models import graphs
from mflow_kernels.testing import assert_close
from mflow_kernels.training.cli import main
from mflow_kernels.training.module import FlowTraining


@pytest.mark.parametrize(
    "options",
    [
        "--error-bound 0.01 --stages [{'final_weight':9,'weight_steps':2}]",
        "--weight variance --release",
        "--domain latent --no-reversible --precision bfloat16",
    ],
)
def test_a_run_with_graphs_is_the_run_without(options, command, tmp_path, fake_capture):
    """Trains two stages of three steps, with validation between them."""
    command += options.split()
    assert main([*command, "--no-cuda-graphs"]) == 0
    without = (tmp_path / "run").rename(tmp_path / "without")
    assert fake_capture.captures == 0
    assert main(command) == 0
    assert (fake_capture.captures, fake_capture.forwards, fake_capture.backwards) == (2, 4, 4)
    assert_same_run(tmp_path / "run", without)


def test_two_ranks_train_as_without(command, tmp_path, fake_capture):
    """Ranks exchange gradients outside of the graphs, and only those of the stage in training."""
    states = []
    for options in (["--no-cuda-graphs"], ["--overwrite"]):
        torchrun([*command, *options], tmp_path)
        states += [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    assert "CUDA graphs" not in (tmp_path / "log0").read_text()


def test_a_batch_in_parts_is_replayed_in_parts(command, tmp_path, fake_capture):
    command += ["--accumulate", "2"]
    assert main([*command, "--no-cuda-graphs"]) == 0
    without = (tmp_path / "run").rename(tmp_path / "without")
    assert main(command) == 0
    assert (fake_capture.captures, fake_capture.forwards, fake_capture.backwards) == (2, 10, 10)
    assert_same_run(tmp_path / "run", without)


def test_depth_and_width_do_not_change_what_a_step_launches(command, fake_capture, monkeypatch):
    counts = []
    step = FlowTraining.optimizer_step

    def counted(self, *args, **kwargs):
        with Calls() as calls:
            step(self, *args, **kwargs)
        # An operator on a list of tensors counts once.
        counts.append(sum(f is not torch.ops.aten.detach.default for f, _ in calls.found))

    monkeypatch.setattr(FlowTraining, "optimizer_step", counted)
    sizes = [["--steps", str(steps), "--width", str(width)] for steps, width in ((1, 8), (4, 12))]
    for size in sizes:
        assert main([*command, *size, "--overwrite"]) == 0
    one, other = counts[:6], counts[6:]
    assert one[2::3] == other[2::3]  # the third step of each stage; the second one captures
    assert main([*command, *sizes[1], "--overwrite", "--no-cuda-graphs"]) == 0
    assert counts[14] > 5 * one[2]


def test_a_failing_capture_is_reported_once_and_training_continues(
    command, tmp_path, fake_capture, monkeypatch, capfd
):
    command += ["--weight", "variance"]
    assert main([*command, "--no-cuda-graphs"]) == 0
    without = (tmp_path / "run").rename(tmp_path / "without")
    tries = []

    def fails(forward, backward):
        backward(forward())
        tries.append(1)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        finally:  # as torch.cuda.graph does when it exits
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "capture", fails)
    capfd.readouterr()
    assert main(command) == 0
    assert tries == [1]
    assert_same_run(tmp_path / "run", without)
    reported = [line for line in capfd.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert reported == [
        "training continues without CUDA graphs: loss_fn cannot be captured in a CUDA graph: "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("options", ["", "--weight variance --release --precision bfloat16"])
def test_a_run_with_graphs_on_a_gpu_is_the_run_without(
    options, command, tmp_path, monkeypatch, capfd
):
    """Compares the first step. Bits can differ, because cuBLAS chooses algorithms by stream and
    workspace. Later steps are not compared, because AdamW turns the rounding error of a gradient
    near 0 into a step of normal size."""
    command += ["--device", "cuda", *options.split()]
    assert main([*command, "--no-cuda-graphs"]) == 0
    without = metrics(tmp_path / "run")[0]
    captures = []
    spy(monkeypatch, graphs, "capture", lambda *_: captures.append(1))
    assert main([*command, "--overwrite"]) == 0
    assert captures == [1, 1]
    assert "without CUDA graphs" not in capfd.readouterr().err
    graphed = metrics(tmp_path / "run")[0]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    for name in ("loss_bits_per_dim", "bits_per_dim", "gradient_norm"):
        value, expected = (torch.tensor(float(row[name])) for row in (graphed, without))
        assert_close(value.to(dtype), expected, terms=64, name=name)  # 64 pixels
