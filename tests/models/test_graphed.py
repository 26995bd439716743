"""The forward and backward pass as CUDA graphs, in a loop of one's own.

A GPU is replaced: by `fake_capture`, whose replays run the passes again, or by a recording of
torch's operators.
"""

import copy
from contextlib import nullcontext
from unittest.mock import MagicMock, Mock

import pytest
import torch
from captures import DETACH, TRANSFERS, RecordedCapture
from cases import Calls
from torch import nn

from mflow_kernels import Glow, ManifoldFlow, ManifoldObjective, VectorFlow, graphed
from mflow_kernels.interop import accelerate
from mflow_kernels.models import graphs
from mflow_kernels.ops.launch import use_kernels
from mflow_kernels.testing import assert_close


def randomized(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def small_flow():
    torch.manual_seed(0)
    objective = ManifoldObjective("data", weight="variance")
    flow = VectorFlow(6, steps=2, width=8, reversible=True)
    return randomized(ManifoldFlow(flow, 3, objective=objective))


def losses_of(model):
    def losses(x):
        terms = model.terms(x)
        return terms.loss.mean(), terms.penalty.detach()

    return losses


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def gradients_of(model):
    return [p.grad for p in model.parameters()]


def test_a_batch_of_another_shape_is_computed_without(fake_capture):
    plain, model = small_flow(), small_flow()
    step, loss_of = graphed(model, losses_of(model)), losses_of(plain)
    for size in (4, 3, 4, 4):
        x = torch.randn(size, 6)
        expected, given = loss_of(x), step(x)
        same(given, expected)
        (3 * expected[0]).backward()
        (3 * given[0]).backward()
        same(gradients_of(model), gradients_of(plain))
        same(model.flow.chain.drift, plain.flow.chain.drift)
        same(model.state_dict(), plain.state_dict())
        plain.zero_grad()
        model.zero_grad()
    assert (fake_capture.captures, fake_capture.forwards, fake_capture.backwards) == (1, 2, 2)


def test_classes_are_copied_into_the_graph(fake_capture):
    """A replay reads the classes of its own batch. Classes of another shape are not replayed."""
    torch.manual_seed(0)
    flow = VectorFlow(6, steps=2, width=8, context_channels=3, reversible=True)
    model = randomized(ManifoldFlow(flow, 3))

    def loss_of(x, classes):
        return model.terms(x, context=classes).loss.mean()

    step, x = graphed(model, loss_of), torch.randn(4, 6)
    for classes in (torch.tensor(c) for c in ([0, 1, 1, 0], [0, 1, 2, 0], [2, 2, 0, 1])):
        given = step(x, classes)
        given.backward()
        assert torch.equal(given, loss_of(x, classes))
    assert fake_capture.forwards == 2
    maps = torch.nn.functional.one_hot(classes, 3).float()
    assert torch.equal(step(x, maps), given)
    assert (fake_capture.captures, fake_capture.forwards) == (1, 2)


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
    step = graphed(model, losses_of(model))
    with Calls() as calls:
        for _ in range(2):
            step(torch.randn(4, 6))[0].backward()
    assert not TRANSFERS & {function for function, _ in calls.found}
    assert fake_capture.backwards == 1


class Net(nn.Module):
    """A classifier with what a capture must not disturb: statistics, dropout, an unused weight."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.head(self.layers(x))


def glow(reversible):
    model = Glow((1, 4, 4), levels=2, steps=2, width=8, reversible=reversible)
    return randomized(model), lambda x: -model.log_prob(x.view(-1, 1, 4, 4)).mean(), 16


def accelerated_nflows(reversible):
    transforms, flows, distributions, resnet = (
        pytest.importorskip(f"nflows.{name}")
        for name in ("transforms", "flows", "distributions", "nn.nets.resnet")
    )
    layers = []
    for i in range(4):
        mask = (torch.arange(6) + i) % 2

        def net(inputs, outputs):
            return resnet.ResidualNet(inputs, outputs, hidden_features=8, num_blocks=1)

        layers += [transforms.ActNorm(6), transforms.AffineCouplingTransform(mask, net)]
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([6]))
    accelerate(model, reversible=reversible, even_if_slower=True)
    return model, lambda x: -model.log_prob(x).mean(), 6


def net(_):
    model = Net()
    return model, lambda x: model(x).square().sum(1).mean(), 6


@pytest.mark.parametrize("make", [glow, accelerated_nflows, net])
@pytest.mark.parametrize(
    ("reversible", "precision"),
    [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)],
    ids=["reversible", "stored", "autocast"],
)
def test_a_replay_launches_what_the_eager_step_launches(make, reversible, precision, monkeypatch):
    """Replays of a recording train to the same bits, and launch the operators of the eager passes.

    The first batch initializes nflows' actnorms. The loop scales and accumulates gradients, keeps
    their memory in every other step, and changes the learning rate. Autocast is on around the call
    of the loss, so it could keep cast weights between the passes.
    """
    capture = RecordedCapture()
    monkeypatch.setattr(graphs, "capture", capture)
    # Constants are kept, as they are without `references`.
    monkeypatch.setattr("mflow_kernels.interop.linear.transformed", lambda: False)
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    torch.manual_seed(0)
    plain, loss_of, dims = make(reversible)
    torch.manual_seed(0)
    model, own_loss_of, _ = make(reversible)
    same(model.state_dict(), plain.state_dict())
    batches = [torch.randn(5, dims) for _ in range(8)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32)
    results = []
    for trained, loss in ((plain, loss_of), (model, graphed(model, own_loss_of))):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        losses = []
        with use_kernels("torch"):
            for i, x in enumerate(batches):
                with autocast:
                    losses.append(loss(x))
                scaler.scale(losses[-1] / 2).backward()
                if i % 2:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=i % 4 == 1)
                    optimizer.param_groups[0]["lr"] /= 2
        results.append((torch.stack(losses).detach(), trained.state_dict(), gradients_of(trained)))
    same(results[1], results[0])
    assert len(capture.recordings) == 2
    with use_kernels("torch"), autocast, Calls() as forward:
        loss = loss_of(batches[0])
    ones, leaves = torch.ones_like(loss), [p for p in plain.parameters() if p.grad is not None]
    with use_kernels("torch"), Calls() as backward:
        torch.autograd.grad(loss, leaves, ones)
    for recording, eager in zip(capture.recordings, (forward, backward), strict=True):
        assert recording.functions() == [f for f, _ in eager.found if f is not DETACH]


def test_a_cpu_computes_without(monkeypatch):
    monkeypatch.setattr(graphs, "capture", Mock(side_effect=AssertionError))
    plain, model = small_flow(), small_flow()
    step = graphed(model, losses_of(model))
    for _ in range(3):
        x = torch.randn(4, 6)
        same(step(x), losses_of(plain)(x))


def test_results_stay_and_gradients_of_inputs_flow(fake_capture):
    """An encoder outside of the graphs gets its gradient. Results are not overwritten."""
    model, encoder = Net().eval(), nn.Linear(4, 6)
    step = graphed(model, lambda x: (model(x).square().mean(), x.detach().clone()))
    kept, expected = [], []
    for _ in range(4):
        x = torch.randn(5, 4)
        given, plain = step(encoder(x)), model(encoder(x)).square().mean()
        own, others = (torch.autograd.grad(loss, encoder.weight)[0] for loss in (given[0], plain))
        kept += [*given, own]
        expected += [plain, encoder(x), others]
    same([t.detach() for t in kept], [t.detach() for t in expected])
    assert fake_capture.backwards == 3


def test_hooks_of_parameters_run_once(fake_capture):
    model = Net().eval()
    step, x = graphed(model, lambda x: model(x).square().mean()), torch.randn(5, 6)
    calls = []
    model.head.weight.register_hook(lambda gradient: 2 * gradient)
    model.head.bias.register_post_accumulate_grad_hook(calls.append)
    found = []
    for _ in range(3):
        step(x).backward()
        found.append(gradients_of(model))
        model.zero_grad()
    same(found[1:], found[:1] * 2)
    assert len(calls) == 3
    assert fake_capture.backwards == 2


CHANGES = {
    "eval": lambda model: model.eval(),
    "frozen": lambda model: model.head.requires_grad_(False),
    "moved": lambda model: model.double().float(),
    "loaded": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "buffer": lambda model: model.layers[1].register_buffer("running_mean", torch.ones(8)),
}


@pytest.mark.parametrize("change", [*CHANGES.values(), None], ids=[*CHANGES, "autocast"])
def test_what_a_graph_depends_on_captures_it_again(change, fake_capture):
    torch.manual_seed(0)
    model = Net()
    model.layers[2].p = 0.0
    plain = copy.deepcopy(model)
    step = graphed(model, lambda x: model(x).square().mean())
    for i in range(6):
        x = torch.randn(5, 6)
        if i == 3 and change is not None:
            change(model)
            change(plain)
        with torch.autocast("cpu", enabled=i >= 3 and change is None):
            given, expected = step(x), plain(x).square().mean()
        same(given, expected)
        given.backward()
        expected.backward()
        same(gradients_of(model), gradients_of(plain))
        same(model.state_dict(), plain.state_dict())
        model.zero_grad()
        plain.zero_grad()
    assert (fake_capture.captures, fake_capture.forwards) == (2, 4)
    with torch.no_grad():
        same(step(x), plain(x).square().mean())
    assert fake_capture.forwards == 4


@pytest.mark.parametrize("late", ["twice", "after the next call"])
def test_activations_that_are_overwritten_are_not_used(late, fake_capture):
    model = Net()
    step, x = graphed(model, lambda x: model(x).square().mean()), torch.randn(5, 6)
    step(x)
    loss = step(x)
    loss.backward(retain_graph=True)
    loss = loss if late == "twice" else (step(x), step(x))[0]
    with pytest.raises(RuntimeError, match="differentiated once, before the next call"):
        loss.backward()


OUTSIDE = torch.ones(3, requires_grad=True)


def replaces_a_buffer(model, x):
    model.layers[1].running_mean = model.layers[1].running_mean + 1
    return model(x).mean()


def changes_a_parameter(model, x):
    with torch.no_grad():
        model.head.bias += 1
    return model(x).mean()


@pytest.mark.parametrize(
    ("loss_of", "message"),
    [
        (lambda model, x: (model(x) * OUTSIDE).mean(), r"a tensor of shape \(3,\) that requires"),
        (lambda model, x: model(x).detach().mean(), "the loss does not require gradients"),
        (replaces_a_buffer, "replaces the buffer layers.1.running_mean"),
        (changes_a_parameter, "changes the parameter head.bias"),
        (lambda model, x: model(x).mean() * model(x).sum().item(), "_local_scalar_dense"),
    ],
)
def test_what_cannot_be_captured_says_why(loss_of, message, monkeypatch):
    monkeypatch.setattr(graphs, "capture", RecordedCapture())
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    model, x = Net(), torch.randn(5, 6)
    step = graphed(model, lambda x: loss_of(model, x))
    step(x)
    generator = torch.get_rng_state()
    tracked = model.layers[1].num_batches_tracked.clone()
    with pytest.raises(
        RuntimeError, match=f"^loss_fn cannot be captured in a CUDA graph: .*{message}"
    ):
        step(x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model.layers[1].num_batches_tracked, tracked)


def distributed():
    """A DistributedDataParallel that was not connected to other processes."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.add_module("module", Net())
    return wrapper


def test_random_numbers_of_the_host_are_refused(fake_capture):
    """Meta tensors stand for a GPU's."""
    model = nn.Linear(6, 3, device="meta")
    step = graphed(model, lambda x: model(x + torch.rand(()).item()).mean())
    x = torch.randn(5, 6, device="meta")
    step(x)
    with pytest.raises(RuntimeError, match="draws random numbers on the CPU"):
        step(x)
    assert fake_capture.captures == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, abs), TypeError, r"model: expected a torch.nn.Module, got int"),
        ((Net(), 1), TypeError, r"loss_fn: expected a function, got int"),
        ((nn.ReLU(), abs), ValueError, r"model: expected a module with parameters"),
        ((distributed(), abs), ValueError, r"model: expected a module without DistributedData"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        graphed(*arguments)


@pytest.mark.parametrize(
    ("batch", "results", "error", "message"),
    [
        ((1.0,), (), TypeError, "argument 0: expected a torch.Tensor, got float"),
        ((torch.ones(2), None), (), TypeError, "argument 1: expected a torch.Tensor, got NoneType"),
        ((), [], TypeError, "loss_fn: expected a tensor or a tuple of tensors, got list"),
        ((), (), TypeError, r"expected a tensor or a tuple of tensors, got \(\)"),
        ((), (OUTSIDE.sum(), 1), TypeError, "a tuple of tensors, got Tensor, int"),
        ((), (OUTSIDE.sum(), OUTSIDE), ValueError, "results without gradients after the loss"),
    ],
)
def test_bad_batches_and_results(batch, results, error, message):
    with pytest.raises(error, match=message):
        graphed(Net(), lambda *_: results)(*batch)


def test_a_batch_on_another_device_is_refused(fake_capture):
    step = graphed(nn.Linear(2, 2), lambda x: x)
    with pytest.raises(ValueError, match="argument 0: expected device cpu, got meta"):
        step(torch.ones(2, device="meta"))


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
def test_replays_on_a_gpu_are_the_passes():
    plain, model = small_flow().cuda(), small_flow().cuda()
    step, captures = graphed(model, losses_of(model)), []
    capture = graphs.capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "capture", lambda *passes: captures.append(1) or capture(*passes))
        for size in (4, 3, 4, 4):
            x = torch.randn(size, 6, device="cuda")
            expected, given = losses_of(plain)(x), step(x)
            assert_close(given[0].detach(), expected[0], terms=size * 8)
            for loss, trained in ((expected[0], plain), (given[0], model)):
                trained.zero_grad()
                loss.backward()
            largest = max(p.grad.abs().max().item() for p in plain.parameters())
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                assert_close(q.grad, p.grad, terms=size * 8, scale=largest)
    assert captures == [1]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_capture_that_fails_on_a_gpu_leaves_nothing():
    plain, model = small_flow().cuda(), small_flow().cuda()
    x = torch.randn(4, 6, device="cuda")

    def reads(x):
        losses = losses_of(model)(x)
        losses[0].item()
        return losses

    step = graphed(model, reads)
    assert_close(step(x)[0].detach(), losses_of(plain)(x)[0], terms=32)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="cannot be captured") as failed:
        step(x)
    assert "previous error" not in str(failed.value)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)  # the warm-up was undone
    # Both raise if torch is still in a capture.
    torch.cuda.empty_cache()
    torch.randn(2, device="cuda")
