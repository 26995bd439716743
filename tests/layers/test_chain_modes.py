"""Reversible chains under dropout, autocast, compilation, export and CUDA graphs."""

import copy

import pytest
import torch
from cases import compiles, not_about_kernels, perturbed
from torch import Tensor, nn

from layers.chains import assert_all_close, both_gradients, chain_of, gradients, levels, loss_of
from mflow_kernels import FlowStep, Glow, ReversibleChain
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.testing import assert_close


class DropoutAndNorm(nn.Module):
    """A coupling network with random numbers and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Dropout(0.5), nn.Conv2d(8, 4, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_dropout_and_running_statistics() -> None:
    stored = perturbed(chain_of(DropoutAndNorm, reversible=False)).double()
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible = True
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    results, after = [], []
    for chain in (stored, rebuilt):
        torch.manual_seed(1)
        results.append(gradients(chain, x, call=chain))
        after.append((dict(chain.named_buffers()), torch.get_rng_state()))
    assert_all_close(results[1], results[0], terms=2 * 3 * 75)
    (buffers, rng), (buffers_rebuilt, rng_rebuilt) = after
    assert torch.equal(rng, rng_rebuilt)
    for name, buffer in buffers.items():
        if name.endswith("num_batches_tracked"):
            assert buffer.item() == buffers_rebuilt[name].item() == 1
        else:
            assert_close(buffers_rebuilt[name].double(), buffer.double(), terms=75, name=name)


def test_a_mode_switched_before_the_backward_pass() -> None:
    """Networks run again in the mode of the forward pass, and keep their new mode afterwards."""
    chain = perturbed(chain_of(DropoutAndNorm)).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    results = []
    for call in (chain.train, chain.eval):
        chain.train()
        torch.manual_seed(1)
        z, logdet = chain(x)
        call()
        buffers = [b.clone() for b in chain.buffers()]
        results.append(torch.autograd.grad(loss_of(z, logdet), list(chain.parameters())))
        assert all(map(torch.equal, buffers, chain.buffers()))
        modes = {m.training for m in chain.modules()}
        assert modes == {call == chain.train}
    torch.testing.assert_close(*results, rtol=0, atol=0)


@not_about_kernels
def test_autocast_keeps_the_state_in_float32() -> None:
    """Networks run in low precision on a float32 state. Stored inputs repeat their bits, so that
    rebuilding adds far less error than the low precision itself."""
    stored = perturbed(Glow((3, 8, 8), 2, 4, 16, reversible=False))
    rebuilt = Glow((3, 8, 8), 2, 4, 16, checkpoint_every=1)
    rebuilt.load_state_dict(stored.state_dict())
    x = torch.randn(4, 3, 8, 8)

    def run(model: nn.Module, low: bool) -> list[Tensor]:
        def call(x: Tensor) -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                z, logdet = model(x)
            assert all(part.dtype == torch.float32 for part in (*z, logdet))
            return z, logdet

        return gradients(model, x, call=call)

    exact, low, again = run(stored, False), run(stored, True), run(rebuilt, True)

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        total = sum(t.double().pow(2).sum() for t in b)
        return (
            sum((s - t).double().pow(2).sum() for s, t in zip(a, b, strict=True)) / total
        ) ** 0.5

    assert distance(low, exact) > 1e-4  # the networks did run in low precision
    assert distance(again, low) < distance(low, exact) / 10


def test_autocast_casts_weights_again_in_the_backward_pass() -> None:
    """A backward pass inside autocast must not use weights that were cast without gradients."""
    chain = perturbed(chain_of(lambda: nn.Conv2d(2, 4, 1)))
    x = torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(*chain(x)).backward()
    assert all(p.grad is not None for p in chain.parameters())


@pytest.mark.skipif(KERNELS_ON_CPU, reason="dozens of steps, and the interpreter adds nothing")
def test_float16_networks_train_under_a_gradient_scaler() -> None:
    """The gradients are those of the stored chain, and a step whose scale overflows is skipped."""
    stored = perturbed(Glow((3, 8, 8), 2, 4, 16, reversible=False), 0.05)
    rebuilt = Glow((3, 8, 8), 2, 4, 16)
    rebuilt.load_state_dict(stored.state_dict())
    x = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(rebuilt.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)

    def loss_at(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            z, logdet = model(x)
        return sum(part.square().sum() for part in z) / 2 - logdet.sum()

    before = [p.detach().clone() for p in rebuilt.parameters()]
    scales = []
    for _ in range(20):
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
        scaler.scale(loss_at(rebuilt)).backward()
        scaler.unscale_(optimizer)
        moved = [p.grad.isfinite().all() for p in rebuilt.parameters()]
        if all(moved):
            break
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, rebuilt.parameters()))
    assert scales[-1] < scales[0]
    stored.zero_grad()
    (loss_at(stored) * scaler.get_scale()).backward()
    wants = [p.grad / scaler.get_scale() for p in stored.parameters()]
    for a, b in zip(rebuilt.parameters(), wants, strict=True):
        # The last bit of a rebuilt state may change a network's input by one step of float16.
        assert (a.grad - b).norm() <= torch.finfo(torch.float16).eps * b.norm() * 4
    scaler.step(optimizer)
    assert not all(map(torch.equal, before, rebuilt.parameters()))


@compiles
def test_networks_may_be_compiled() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
    stored = perturbed(ReversibleChain([FlowStep(4, net)], reversible=False))
    x = torch.randn(2, 4, 3, 3)
    want = gradients(stored, x, call=stored)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    chain = ReversibleChain([FlowStep(4, compiled)])
    chain.layers[0].actnorm.load_state_dict(stored.layers[0].actnorm.state_dict())
    chain.layers[0].conv.load_state_dict(stored.layers[0].conv.state_dict())
    assert_all_close(gradients(chain, x, call=chain), want, terms=2 * 18)


@compiles
def test_sampling_of_stored_levels_is_exported() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = perturbed(levels(reversible=False))

        def forward(self, *z: Tensor) -> Tensor:
            return self.chain.inverse(z)[0]

    sampling = Sampling()
    z = torch.randn(2, 2, 2, 2), torch.randn(2, 2, 2, 2)
    assert_close(torch.export.export(sampling, z).module()(*z), sampling(*z), terms=3 * 32)


class HalfNet(nn.Module):
    """A network in float16 on states in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(2, 4, 1).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.half())


def test_networks_that_cast_to_float16() -> None:
    """A network whose input is stored reads the same bits again."""
    stored = perturbed(chain_of(HalfNet, reversible=False, checkpoint_every=1))
    got, want = both_gradients(stored, torch.randn(2, 4, 3, 3) / 10)
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert torch.float16 in {w.dtype for w in want}
    assert_all_close(got, want, terms=2 * 3 * 18)


@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_one() -> None:
    """A training step in a CUDA graph: no synchronization with the host, no data-dependent size."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = perturbed(Glow((3, 16, 16), 2, 3, 16)).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")

    def step() -> Tensor:
        for p in model.parameters():
            p.grad = None
        loss = loss_of(*model(x))
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    want = [step().detach(), *(p.grad.clone() for p in model.parameters())]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = [loss, *(p.grad for p in model.parameters())]
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(captured, want, rtol=0, atol=0)


@pytest.mark.parametrize("reversible", [True, False])
def test_autocast_leaves_float64_alone(reversible: bool) -> None:
    """As torch does: autocast casts neither float64 states nor float64 weights."""
    model = perturbed(Glow((3, 8, 8), 2, 2, 8, reversible=reversible)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def run(low: bool) -> list[Tensor]:
        def call(x: Tensor) -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                return model(x)

        return gradients(model, x, call=call)

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


@compiles
@pytest.mark.parametrize("reversible", [True, False])
def test_a_compiled_function_may_call_backward(reversible: bool) -> None:
    """The backward pass of six steps is compiled once, and not for each step."""
    torch.compiler.reset()
    chain = perturbed(ReversibleChain([FlowStep(4, width=4) for _ in range(6)])).double()
    chain.reversible = reversible
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    want = gradients(chain, x, call=chain)

    def step(x: Tensor) -> Tensor:
        loss = loss_of(*chain(x))
        loss.backward()
        return loss

    chain.zero_grad()
    given = x.clone().requires_grad_()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        loss = torch.compile(step, backend="aot_eager")(given)
    got = [loss.detach(), given.grad, *(p.grad for p in chain.parameters())]
    assert_all_close(got, want, terms=2 * 6 * 18)
