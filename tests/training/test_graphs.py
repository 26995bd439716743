"""Forward and backward pass as CUDA graphs: all but the capture itself, which needs a GPU."""

import csv
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import TINY, torchrun
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mflow_kernels import ManifoldFlow, ManifoldObjective, VectorFlow
from mflow_kernels.layers import ReversibleChain
from mflow_kernels.reversible import apply, rerun
from mflow_kernels.testing import assert_close
from mflow_kernels.training import graphs, train
from mflow_kernels.training.cli import main
from mflow_kernels.training.graphs import Captured, StepGraphs
from mflow_kernels.training.module import FlowTraining


class StandIn:
    """Takes the place of the capture: a replay runs its pass again, and leaves the results where
    those of the first one lay, which are gone. It changes nothing else: no attribute of a chain."""

    def __init__(self, monkeypatch):
        self.captures, self.forwards, self.backwards = 0, 0, 0
        self.chains = {}
        record = ReversibleChain.record_drift

        def spied(chain, drift):
            self.chains[id(chain)] = chain
            record(chain, drift)

        monkeypatch.setattr(ReversibleChain, "record_drift", spied)

    @contextmanager
    def attributes_kept(self):
        before = [(chain, chain.drift) for chain in self.chains.values()]
        for chain, _ in before:
            chain.drift = None
        yield
        for chain, drift in before:
            chain.drift = drift

    def __call__(self, forward, backward):
        for _ in range(3):
            backward(forward())
        ran = []
        first = forward()
        losses, gradients = (
            tuple(torch.full_like(t, math.nan) for t in tensors)
            for tensors in (first, backward(first))
        )

        def forward_again():
            self.forwards += 1
            with torch.enable_grad(), self.attributes_kept(), _disable_current_modes():
                ran.append(forward())
            leave(losses, ran[0])

        def backward_again():
            self.backwards += 1
            with self.attributes_kept(), _disable_current_modes():
                leave(gradients, backward(ran.pop()))

        def leave(where, tensors):
            with torch.no_grad():
                for to, tensor in zip(where, tensors, strict=True):
                    to.copy_(tensor)

        self.captures += 1
        replays = (SimpleNamespace(replay=run) for run in (forward_again, backward_again))
        return Captured(next(replays), losses, next(replays), gradients)


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn(monkeypatch)
    monkeypatch.setattr(graphs, "capture", stand_in)
    monkeypatch.setattr(train, "check_cuda_graphs", lambda *_: None)
    return stand_in


@pytest.fixture
def command(images, tmp_path):
    return ["train", *TINY, "--data", str(images), "--run-dir", str(tmp_path / "run")]


def outcome(folder):
    """The final state, and all that was logged but speed."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    with (folder / "metrics.csv").open() as file:
        rows = [{**row, "images_per_second": None} for row in csv.DictReader(file)]
    return saved["state_dict"], saved["optimizer_states"], rows


def assert_same(one, other):
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0)
    assert one[2] == other[2]


@pytest.mark.parametrize(
    "options",
    ["", "--weight variance --release", "--domain latent --no-reversible --precision bfloat16"],
)
def test_a_run_with_graphs_is_the_run_without(options, command, tmp_path, stand_in):
    """Two stages of three steps, validated in between."""
    command += options.split()
    assert main(command) == 0
    without = outcome(tmp_path / "run")
    assert stand_in.captures == 0
    assert main([*command, "--overwrite", "--cuda-graphs"]) == 0
    assert (stand_in.captures, stand_in.forwards, stand_in.backwards) == (2, 6, 6)
    assert_same(outcome(tmp_path / "run"), without)


def test_a_run_resumes_inside_a_stage(command, tmp_path, stand_in, monkeypatch, capsys):
    command += ["--weight", "variance", "--cuda-graphs"]
    assert main(command) == 0
    whole = outcome(tmp_path / "run")
    step = FlowTraining.optimizer_step

    def power_cut(self, *args, **kwargs):
        if self.global_step == 4:
            raise RuntimeError("power cut")
        step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FlowTraining, "optimizer_step", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            main([*command, "--overwrite", "--save-steps", "1"])
    assert main([*command, "--resume"]) == 0
    assert "goes on from step 4\n" in capsys.readouterr().err
    assert_same(outcome(tmp_path / "run"), whole)


def test_two_ranks_train_as_without(images, tmp_path, stand_in):
    """They exchange gradients outside of the graphs, those of the stage that is trained alone."""
    states = []
    for options in ([], ["--overwrite", "--cuda-graphs"]):
        command = ["train", *TINY, "--data", str(images), "--run-dir", str(tmp_path / "run")]
        torchrun([*command, *options], tmp_path)
        states += [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    assert "CUDA graphs" not in (tmp_path / "log0").read_text()


class Launches(TorchDispatchMode):
    """Counts operators that work on a device, a list of tensors being one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def test_depth_and_width_do_not_change_what_a_step_launches(command, stand_in, monkeypatch):
    counts = []
    step = FlowTraining.optimizer_step

    def counted(self, *args, **kwargs):
        with Launches() as launches:
            step(self, *args, **kwargs)
        counts.append(launches.count)

    monkeypatch.setattr(FlowTraining, "optimizer_step", counted)
    sizes = [["--steps", str(steps), "--width", str(width)] for steps, width in ((1, 8), (4, 12))]
    for size in sizes:
        assert main([*command, *size, "--overwrite", "--cuda-graphs"]) == 0
    one, other = counts[:6], counts[6:]
    assert one[1:3] == other[1:3]  # the first one captures
    assert main([*command, *sizes[1], "--overwrite"]) == 0
    assert counts[13] > 5 * one[1]


def test_a_failing_capture_is_told_once_and_training_goes_on(
    command, tmp_path, stand_in, monkeypatch, capfd
):
    command += ["--weight", "variance"]
    assert main(command) == 0
    without = outcome(tmp_path / "run")
    tries = []

    def fails(forward, backward):
        backward(forward())
        tries.append(1)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        finally:  # what leaving torch.cuda.graph then does
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "capture", fails)
    capfd.readouterr()
    assert main([*command, "--overwrite", "--cuda-graphs"]) == 0
    assert tries == [1]
    assert_same(outcome(tmp_path / "run"), without)
    told = [line for line in capfd.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert told == [
        "training goes on without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_networks_that_draw_train_without_graphs(monkeypatch, capsys):
    """A graph's replay could not draw the same numbers twice; the capture says so."""
    capturing = []
    for module in (apply, rerun):
        monkeypatch.setattr(module, "capturing", lambda device: bool(capturing))

    def capture(forward, backward):
        backward(forward())
        capturing.append(True)
        try:
            forward()
        finally:
            capturing.clear()

    monkeypatch.setattr(graphs, "capture", capture)
    model = small_flow()
    for layer in model.flow.chain.layers:
        layer.coupling.net.append(torch.nn.Dropout(0.5))
    loss, _ = StepGraphs()(0, torch.randn(4, 6), losses_of(model), [model])
    loss.backward()
    told = capsys.readouterr().err
    assert "without CUDA graphs: ReversibleChain: a network (CouplingNetwork) draws random" in told
    assert all(p.grad is not None for p in model.parameters())


class Cuda:
    """Stands in for torch's side of a capture: notes what is asked of it, and is in a capture after
    one whose end failed, as torch 2.9 is."""

    def __init__(self, monkeypatch):
        self.said, self.solver, self.capturing = [], "default", False
        stream = SimpleNamespace(wait_stream=lambda _: self.said.append("wait"))
        generator = SimpleNamespace(
            clone_state=lambda: "copy", graphsafe_set_state=lambda state: self.said.append(state)
        )
        stands_in = {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(reset=lambda: self.said.append("reset")),
            "graph_pool_handle": lambda: (0, 1),
            "graph": self.graph,
            "synchronize": lambda: self.said.append("synchronize"),
            "current_device": lambda: 0,
            "default_generators": [generator],
        }
        for name, value in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.backends.cuda, "preferred_linalg_library", self.prefer)
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(torch._C, f"_cuda_{name}", getattr(self, name), raising=False)

    def prefer(self, solver=None):
        self.solver = solver or self.solver
        return self.solver

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode, self.solver) == ((0, 1), "thread_local", "cusolver")
        self.said.append("begin")
        self.capturing = True
        yield
        self.capturing = False
        self.said.append("end")

    def endAllocateToPool(self, device, pool):
        if not self.capturing:
            raise RuntimeError("not currently recording to mempool_id")
        self.capturing = False

    def releasePool(self, device, pool):
        self.said.append("release")


def test_a_capture_warms_up_and_captures_both_passes(monkeypatch):
    cuda = Cuda(monkeypatch)
    x = torch.ones((), requires_grad=True)

    def forward():
        cuda.said.append("forward")
        return (2 * x,)

    def backward(losses):
        cuda.said.append("backward")
        return torch.autograd.grad(losses, x)

    captured = graphs.capture(forward, backward)
    passes = ["forward", "backward"]
    captures = ["begin", "forward", "end", "begin", "backward", "end"]
    assert cuda.said == ["wait", *3 * passes, *captures, "wait"]
    assert not captured.losses[0].requires_grad
    assert captured.gradients == (torch.tensor(2.0),)
    assert cuda.solver == "default"


@pytest.mark.parametrize("at", ["forward", "backward", "warm-up"])
def test_a_capture_that_fails_leaves_nothing(at, monkeypatch):
    cuda = Cuda(monkeypatch)

    def run(name):
        refused = not cuda.said.count("begin") if at == "warm-up" else cuda.capturing and name == at
        if refused:
            raise RuntimeError(at)
        return ()

    with pytest.raises(RuntimeError, match=at):
        graphs.capture(lambda: run("forward"), lambda _: run("backward"))
    assert not cuda.capturing
    assert cuda.solver == "default"
    ended = ["synchronize", "reset", "reset", "copy"]
    ended += [] if at == "warm-up" else ["release"]
    assert cuda.said[cuda.said.index("synchronize") :] == ended


def test_without_a_cuda_device_they_are_refused(command, tmp_path, capsys):
    assert main([*command, "--cuda-graphs"]) == 2
    assert "--cuda-graphs: expected a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def small_flow():
    torch.manual_seed(0)
    objective = ManifoldObjective("data", weight="variance")
    model = ManifoldFlow(VectorFlow(6, steps=2, width=8), 3, objective=objective)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def losses_of(model):
    def losses(x):
        model.flow.chain.drift = None
        terms = model.terms(x)
        return terms.loss.mean(), terms.penalty.detach()

    return losses


def test_a_batch_of_another_shape_is_computed_without(stand_in):
    plain, graphed = small_flow(), small_flow()
    step = StepGraphs()
    for size in (4, 3, 4, 4):
        x = torch.randn(size, 6)
        expected = losses_of(plain)(x)
        came = step(0, x, losses_of(graphed), [graphed])
        torch.testing.assert_close(came, expected, rtol=0, atol=0)
        (3 * expected[0]).backward()
        (3 * came[0]).backward()
        for p, q in zip(plain.parameters(), graphed.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            p.grad = q.grad = None
        assert torch.equal(plain.flow.chain.drift, graphed.flow.chain.drift)
        torch.testing.assert_close(graphed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert (stand_in.captures, stand_in.forwards, stand_in.backwards) == (1, 3, 3)


def test_a_stage_gives_back_the_memory_of_the_one_before(stand_in):
    first, second = small_flow(), small_flow()
    step, x = StepGraphs(), torch.randn(4, 6)
    loss, _ = step(0, x, losses_of(first), [first])
    loss.backward()
    step(1, x, losses_of(second), [second])
    assert all(p.grad is None for p in first.parameters())  # which lay in it


def test_gradients_are_not_copied_out_of_the_graph(stand_in, monkeypatch):
    kept = []

    def capture(*passes):
        kept.append(stand_in(*passes))
        return kept[0]

    monkeypatch.setattr(graphs, "capture", capture)
    model = small_flow()
    loss, _ = StepGraphs()(0, torch.randn(4, 6), losses_of(model), [model])
    loss.backward()
    parameters = list(model.parameters())
    where = [gradient.data_ptr() for gradient in kept[0].gradients[: len(parameters)]]
    assert [p.grad.data_ptr() for p in parameters] == where


class HostReads(TorchDispatchMode):
    """Refuses what a capture would: numbers read from the device, or sent to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.lift_fresh.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(
    ("domain", "weight"), [("latent", 1.0), ("data", 1.0), ("data", "variance")]
)
def test_nothing_in_what_is_captured_waits_for_the_device(
    domain, weight, reversible, stand_in, monkeypatch
):
    # It computes a number of numbers on the host.
    monkeypatch.setattr("mflow_kernels.models.objectives.penalty_log_normalizer", lambda *_: 0.0)
    flow = VectorFlow(6, steps=3, width=8, reversible=reversible, checkpoint_every=2)
    model = ManifoldFlow(flow, 3, objective=ManifoldObjective(domain, weight=weight))
    with HostReads():
        loss, _ = StepGraphs()(0, torch.randn(4, 6), losses_of(model), [model])
        loss.backward()
    assert stand_in.backwards == 1


def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "--weight variance --release --precision bfloat16"])
def test_a_run_with_graphs_on_a_gpu_is_the_run_without(
    options, command, tmp_path, monkeypatch, capfd
):
    """At its first step. Bits are not promised: cuBLAS chooses by stream and workspace. Later steps
    say little: AdamW moves a weight by the rounding of a gradient near 0 as by any other."""
    needs_a_gpu()
    command += ["--device", "cuda", *options.split()]
    assert main(command) == 0
    without = outcome(tmp_path / "run")
    captures = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *a: captures.append(1) or capture(*a))
    assert main([*command, "--overwrite", "--cuda-graphs"]) == 0
    assert captures == [1, 1]
    assert "without CUDA graphs" not in capfd.readouterr().err
    graphed = outcome(tmp_path / "run")
    assert all(value.isfinite().all() for value in graphed[0].values())
    dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    for name in ("loss", "bits_per_dim", "gradient_norm"):
        came, expected = (torch.tensor(float(run[2][0][name])) for run in (graphed, without))
        assert_close(came.to(dtype), expected, terms=64, name=name)  # 64 pixels


@pytest.mark.gpu
def test_replays_on_a_gpu_are_the_passes(capfd):
    needs_a_gpu()
    plain, graphed = small_flow().cuda(), small_flow().cuda()
    step = StepGraphs()
    for size in (4, 3, 4, 4):
        x = torch.randn(size, 6, device="cuda")
        expected, came = losses_of(plain)(x), step(0, x, losses_of(graphed), [graphed])
        assert_close(came[0].detach(), expected[0], terms=size * 8)
        for loss, model in ((expected[0], plain), (came[0], graphed)):
            model.zero_grad()
            loss.backward()
        largest = max(p.grad.abs().max().item() for p in plain.parameters())
        for p, q in zip(plain.parameters(), graphed.parameters(), strict=True):
            assert_close(q.grad, p.grad, terms=size * 8, scale=largest)
    assert "without CUDA graphs" not in capfd.readouterr().err


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu_leaves_nothing(capfd):
    needs_a_gpu()
    plain, graphed = small_flow().cuda(), small_flow().cuda()
    x = torch.randn(4, 6, device="cuda")

    def reads(x):
        losses = losses_of(graphed)(x)
        losses[0].item()
        return losses

    loss, _ = StepGraphs()(0, x, reads, [graphed])
    told = capfd.readouterr().err
    assert "without CUDA graphs" in told
    assert "previous error" not in told
    assert_close(loss.detach(), losses_of(plain)(x)[0], terms=32)
    loss.backward()
    torch.testing.assert_close(graphed.state_dict(), plain.state_dict())  # the warm-up undone
    # Both raise where torch is still in a capture.
    torch.cuda.empty_cache()
    torch.randn(2, device="cuda")
