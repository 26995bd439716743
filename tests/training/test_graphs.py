"""The forward and backward pass as CUDA graphs, apart from training runs.

The fixture `fake_capture` replaces the capture itself, which needs a GPU.
"""

from contextlib import nullcontext
from unittest.mock import MagicMock, Mock

import pytest
import torch
from cases import Calls

from mflow_kernels import ManifoldFlow, ManifoldObjective, VectorFlow
from mflow_kernels.testing import assert_close
from mflow_kernels.training import graphs
from mflow_kernels.training.graphs import StepGraphs


def small_flow():
    torch.manual_seed(0)
    objective = ManifoldObjective("data", weight="variance")
    flow = VectorFlow(6, steps=2, width=8, reversible=True)
    model = ManifoldFlow(flow, 3, objective=objective)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def losses_of(model):
    def losses(x):
        model.flow.chain.drift = None
        terms = model.terms(x)
        return terms.loss.mean(), terms.penalty.detach()

    return losses


def test_a_batch_of_another_shape_is_computed_without(fake_capture):
    plain, graphed = small_flow(), small_flow()
    step = StepGraphs()
    for size in (4, 3, 4, 4):
        x = torch.randn(size, 6)
        expected = losses_of(plain)(x)
        given = step(0, (x,), losses_of(graphed), [graphed])
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
        (3 * expected[0]).backward()
        (3 * given[0]).backward()
        for p, q in zip(plain.parameters(), graphed.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            p.grad = q.grad = None
        assert torch.equal(plain.flow.chain.drift, graphed.flow.chain.drift)
        torch.testing.assert_close(graphed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert (fake_capture.captures, fake_capture.forwards, fake_capture.backwards) == (1, 3, 3)


def test_classes_are_copied_into_the_graph(fake_capture):
    """A replay reads the classes of its own batch. Classes of another shape are not replayed."""
    torch.manual_seed(0)
    model = ManifoldFlow(VectorFlow(6, steps=2, width=8, context_channels=3, reversible=True), 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    def losses(x, classes):
        return (model.terms(x, context=classes).loss.mean(),)

    step, x = StepGraphs(), torch.randn(4, 6)
    for classes in (torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 0, 1])):
        (given,) = step(0, (x, classes), losses, [model])
        given.backward()
        assert torch.equal(given, losses(x, classes)[0])
    assert fake_capture.forwards == 2
    maps = torch.nn.functional.one_hot(classes, 3).float()
    assert torch.equal(step(0, (x, maps), losses, [model])[0], given)
    assert (fake_capture.captures, fake_capture.forwards) == (1, 2)


def test_a_stage_frees_the_memory_of_the_stage_before(fake_capture):
    first, second = small_flow(), small_flow()
    step, x = StepGraphs(), torch.randn(4, 6)
    loss, _ = step(0, (x,), losses_of(first), [first])
    loss.backward()
    step(1, (x,), losses_of(second), [second])
    assert all(p.grad is None for p in first.parameters())  # the gradients were in that memory


# They read numbers from the device or send them to it, which a capture refuses.
TRANSFERS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.nonzero.default,
}


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(
    ("domain", "weight"), [("latent", 1.0), ("data", 1.0), ("data", "variance")]
)
def test_captured_passes_do_not_wait_for_the_device(
    domain, weight, reversible, fake_capture, monkeypatch
):
    # This function computes a constant from Python numbers on the host.
    monkeypatch.setattr("mflow_kernels.models.objectives.penalty_log_normalizer", lambda *_: 0.0)
    flow = VectorFlow(6, steps=3, width=8, reversible=reversible, checkpoint_every=2)
    model = ManifoldFlow(flow, 3, objective=ManifoldObjective(domain, weight=weight))
    with Calls() as calls:
        loss, _ = StepGraphs()(0, (torch.randn(4, 6),), losses_of(model), [model])
        loss.backward()
    assert not TRANSFERS & {function for function, _ in calls.found}
    assert fake_capture.backwards == 1


# A pass, and the number of captures that have begun.
WARM_UP = 3 * [("forward", 0), ("backward", 0)]
PASSES = [*WARM_UP, ("forward", 1), ("backward", 2)]


@pytest.mark.parametrize("fails", [None, 1, 6, 7], ids=["none", "warm-up", "forward", "backward"])
def test_a_capture_warms_up_runs_both_passes_and_leaves_nothing(fails, monkeypatch):
    """Torch's side of a capture is replaced. After a failure in a capture, it stays in the capture
    as torch 2.9 does, and "end" leaves it."""
    cuda, allocator = MagicMock(), Mock()
    cuda.graph.return_value.__exit__.return_value = False
    allocator.end.side_effect = RuntimeError("not recording") if fails == 1 else None
    prefer = Mock(return_value="default")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", allocator.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", allocator.release, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "preferred_linalg_library", prefer)
    x, passes = torch.ones((), requires_grad=True), []

    def run(name):
        passes.append((name, cuda.graph.call_count))
        assert prefer.call_args.args == ("cusolver",)
        if len(passes) - 1 == fails:
            raise RuntimeError("fails")

    def forward():
        run("forward")
        return (2 * x,)

    def backward(losses):
        run("backward")
        return torch.autograd.grad(losses, x)

    with pytest.raises(RuntimeError, match="fails") if fails else nullcontext():
        captured = graphs.capture(forward, backward)
    assert passes == (PASSES[: fails + 1] if fails else PASSES)
    how = {"pool": cuda.graph_pool_handle(), "stream": cuda.Stream()}
    for call in cuda.graph.call_args_list:
        assert call.kwargs == how | {"capture_error_mode": "thread_local"}
    assert prefer.call_args.args == ("default",)
    generator = cuda.default_generators[cuda.current_device()]
    if fails is None:
        assert not captured.losses[0].requires_grad
        assert captured.gradients == (torch.tensor(2.0),)
        assert not cuda.synchronize.called
    else:
        assert cuda.synchronize.called
        assert cuda.CUDAGraph().reset.call_count == 2
        generator.graphsafe_set_state.assert_called_once_with(generator.clone_state())
        assert allocator.end.called
        assert allocator.release.called == (fails != 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_replays_on_a_gpu_are_the_passes(capfd):
    plain, graphed = small_flow().cuda(), small_flow().cuda()
    step = StepGraphs()
    for size in (4, 3, 4, 4):
        x = torch.randn(size, 6, device="cuda")
        expected, given = losses_of(plain)(x), step(0, (x,), losses_of(graphed), [graphed])
        assert_close(given[0].detach(), expected[0], terms=size * 8)
        for loss, model in ((expected[0], plain), (given[0], graphed)):
            model.zero_grad()
            loss.backward()
        largest = max(p.grad.abs().max().item() for p in plain.parameters())
        for p, q in zip(plain.parameters(), graphed.parameters(), strict=True):
            assert_close(q.grad, p.grad, terms=size * 8, scale=largest)
    assert "without CUDA graphs" not in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_capture_that_fails_on_a_gpu_leaves_nothing(capfd):
    plain, graphed = small_flow().cuda(), small_flow().cuda()
    x = torch.randn(4, 6, device="cuda")

    def reads(x):
        losses = losses_of(graphed)(x)
        losses[0].item()
        return losses

    loss, _ = StepGraphs()(0, (x,), reads, [graphed])
    printed = capfd.readouterr().err
    assert "without CUDA graphs" in printed
    assert "previous error" not in printed
    assert_close(loss.detach(), losses_of(plain)(x)[0], terms=32)
    loss.backward()
    torch.testing.assert_close(graphed.state_dict(), plain.state_dict())  # the warm-up was undone
    # Both raise if torch is still in a capture.
    torch.cuda.empty_cache()
    torch.randn(2, device="cuda")
