"""Reversible chains: the gradients of stored activations, and nothing of the caller's disturbed."""

import copy
from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

from mflow_kernels import FlowStep, Glow, ReversibleChain, Split, Squeeze, VectorFlow
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.reversible.apply import segment_starts
from mflow_kernels.reversible.backward import BackwardPass
from mflow_kernels.testing import assert_close


def shaken(module: nn.Module) -> nn.Module:
    """The module with every parameter moved off its start, where couplings do nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def loss_of(z: Tensor | tuple[Tensor, ...], logdet: Tensor) -> Tensor:
    parts = z if isinstance(z, tuple) else (z,)
    cubes = sum((i + 1) * part.pow(3).sum() for i, part in enumerate(parts))
    return cubes + (logdet * torch.arange(1, len(logdet) + 1, device=logdet.device)).sum()


def gradients(chain: nn.Module, *inputs: Tensor, call: Callable[..., object]) -> list[Tensor]:
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    chain.zero_grad()
    loss = loss_of(*call(*inputs))  # type: ignore[misc]
    loss.backward()
    return [
        loss.detach(),
        *(x.grad for x in inputs if x.grad is not None),
        *(p.grad.clone() for p in chain.parameters() if p.grad is not None),
    ]


def assert_all_close(got: list[Tensor], want: list[Tensor], terms: int) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, terms=terms, name=f"gradient {i}")


FLOWS = {
    "image": (lambda **o: Glow((3, 8, 8), 2, 3, 8, **o), (2, 3, 8, 8)),
    "one level": (lambda **o: Glow((1, 4, 4), 1, 2, 8, **o), (3, 1, 4, 4)),
    "vector": (lambda **o: VectorFlow(5, 3, 8, **o), (4, 5)),
}


def test_partial_sums_that_are_added_up_as_they_fill_their_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for one step's partial outer sums or for two gives what room for all gives."""
    chain = shaken(ReversibleChain([FlowStep(6, width=8) for _ in range(5)])).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    want = gradients(chain, x, call=chain)
    for steps in (1, 2):
        monkeypatch.setattr("mflow_kernels.reversible.backward.PARTIALS_BYTES", steps * 6 * 6 * 8)
        for got, wanted in zip(gradients(chain, x, call=chain), want, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_are_those_of_stored_activations(
    flow: str, backwards: bool, every: int | None, dtype: torch.dtype
) -> None:
    make, shape = FLOWS[flow]
    stored = shaken(make(reversible=False)).to(dtype)
    rebuilt = make(checkpoint_every=every).to(dtype)
    rebuilt.load_state_dict(stored.state_dict())
    x = torch.randn(shape, dtype=dtype)
    inputs = tuple(z.detach() for z in stored(x)[0]) if backwards else (x,)

    def run(model: nn.Module) -> list[Tensor]:
        call = (lambda *z: model.inverse(z)) if backwards else model
        return gradients(model, *inputs, call=call)

    # The longest sum, dW's over all pixels, of states that rounded once a step each way.
    assert_all_close(run(rebuilt), run(stored), terms=2 * 7 * x[:, 0].numel())
    assert rebuilt.chain.drift is not None
    assert_close(rebuilt.chain.drift, torch.zeros_like(rebuilt.chain.drift), terms=64, scale=4.0)


def test_memory_holds_no_state_but_the_ends() -> None:
    chain = shaken(Glow((3, 8, 8), 2, 6, 8)).chain  # type: ignore[union-attr]
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    for every, states in ((None, 0), (1, 13), (4, 4)):
        chain.checkpoint_every = every
        saved: list[Tensor] = []

        def pack(t: Tensor, into: list[Tensor] = saved) -> Tensor:
            into.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            chain(x)
        # Four-dimensional: the input, the last state, the latent that left, and states kept.
        states_saved = [t for t in saved if t.dim() == 4 and not isinstance(t, nn.Parameter)]
        assert len(states_saved) == 3 + states


def chain_of(net: Callable[[], nn.Module], **options: object) -> ReversibleChain:
    return ReversibleChain([FlowStep(4, net()) for _ in range(3)], **options)  # type: ignore[arg-type]


class DropoutAndNorm(nn.Module):
    """A coupling network with everything that running it again could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Dropout(0.5), nn.Conv2d(8, 4, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_dropout_and_running_statistics() -> None:
    stored = shaken(chain_of(DropoutAndNorm, reversible=False)).double()
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
    """Networks run again in the mode that they ran in, and are left in the new one."""
    chain = shaken(chain_of(DropoutAndNorm)).double()
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
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state, self.label = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.state(x) + self.label(label)[:, :, None, None]


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_conditional_inputs_have_gradients(backwards: bool) -> None:
    stored = shaken(chain_of(Conditional, reversible=False)).double()
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible = True
    x, label = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 3).double()
    results = [
        gradients(c, x, label, call=c.inverse if backwards else c) for c in (rebuilt, stored)
    ]
    assert len(results[0]) == 3 + sum(1 for _ in stored.parameters())
    assert_all_close(*results, terms=2 * 3 * 18)


def test_shared_and_frozen_parameters() -> None:
    shared = nn.Conv2d(2, 4, 3, padding=1)
    stored = shaken(ReversibleChain([FlowStep(4, shared) for _ in range(3)], reversible=False))
    stored.double()
    stored.layers[1].actnorm.bias.requires_grad_(False)
    shared.weight.requires_grad_(False)
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible = True
    x = torch.randn(2, 4, 3, 3).double()
    assert_all_close(
        gradients(rebuilt, x, call=rebuilt), gradients(stored, x, call=stored), terms=2 * 3 * 18
    )
    assert rebuilt.layers[0].coupling.net.weight.grad is None


@pytest.mark.parametrize("between", [0, 1], ids=["adjacent", "apart"])
def test_the_same_step_twice(between: int) -> None:
    step = FlowStep(4, width=4)
    others = [FlowStep(4, width=4) for _ in range(between)]
    stored = shaken(ReversibleChain([step, *others, step], reversible=False)).double()
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible = True
    x = torch.randn(2, 4, 3, 3).double()
    assert_all_close(
        gradients(rebuilt, x, call=rebuilt), gradients(stored, x, call=stored), terms=2 * 3 * 18
    )


@pytest.mark.parametrize("part", ["actnorm", "conv", "coupling"])
def test_parts_of_another_dtype_or_frozen(part: str) -> None:
    """Actnorm and convolution compute in the state's precision, whatever they are kept in."""
    stored = shaken(ReversibleChain([FlowStep(4, width=4) for _ in range(3)], reversible=False))
    if part == "coupling":
        stored.layers[1].coupling.requires_grad_(False)
    else:
        stored.layers[0].get_submodule(part).requires_grad_(False)
        stored.layers[1].get_submodule(part).double()
        stored.layers[2].get_submodule(part).bfloat16()
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible = True
    x = torch.randn(2, 4, 3, 3)
    got, want = gradients(rebuilt, x, call=rebuilt), gradients(stored, x, call=stored)
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert len(got) == 2 + sum(p.requires_grad for p in stored.parameters())
    # Wider gradients than the state hold no more of its digits.
    got = [g.float() if g.dtype == torch.float64 else g for g in got]
    assert_all_close(got, want, terms=2 * 3 * 18)


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_a_node_for_each_level_changes_no_bit(
    backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks and a context that levels share: their gradients are added in the order of one
    walk."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = nn.Linear(3, 1)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            params = torch.cat([x.cumsum(1), x.sin()], 1)
            return params * self.label(label)[:, :, None, None]

    shared = Wide()
    steps = [FlowStep(c, shared) for c in (4, 4, 8, 8)]
    layers = [Squeeze(), *steps[:2], Split(4, shared), Squeeze(), *steps[2:]]
    chain = shaken(ReversibleChain(layers, checkpoint_every=2))
    x, label = torch.randn(2, 1, 8, 8), torch.randn(2, 3)
    z = tuple(part.detach() for part in chain(x, label)[0])

    def run() -> list[Tensor]:
        if backwards:
            return gradients(chain, *z, label, call=lambda *i: chain.inverse(i[:-1], i[-1]))
        return gradients(chain, x, label, call=chain)

    several = run()
    assert segment_starts(chain._program().instructions) == [0, 7]
    monkeypatch.setattr("mflow_kernels.reversible.apply.segment_starts", lambda _: [0])
    assert all(map(torch.equal, several, run()))


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_gradients_of_a_level_are_there_before_the_next_is_walked_back(
    backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = shaken(Glow((1, 8, 8), 3, 1, 4))
    events: list[str] = []
    undo = BackwardPass.undo

    def noted(*args: object) -> object:
        events.append("undo")
        return undo(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(BackwardPass, "undo", noted)
    for p in flow.parameters():
        p.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    x = torch.randn(2, 1, 8, 8)
    if backwards:
        loss_of(*flow.inverse(tuple(z.detach() for z in flow(x)[0]))).backward()
    else:
        loss_of(*flow(x)).backward()
    assert [kind for kind, _ in groupby(events)] == 3 * ["undo", "gradient"]


def test_levels_that_are_frozen_are_not_walked_back() -> None:
    stored = shaken(Glow((1, 8, 8), 3, 1, 4, reversible=False))
    layers = list(stored.chain.layers)
    for layer in layers[: len(layers) // 2]:
        layer.requires_grad_(False)
    rebuilt = copy.deepcopy(stored)
    rebuilt.chain.reversible = True
    x = torch.randn(2, 1, 8, 8)
    results = []
    for flow in (stored, rebuilt):
        parameters = [p for p in flow.parameters() if p.requires_grad]
        results.append(list(torch.autograd.grad(loss_of(*flow(x)), parameters)))
    assert_all_close(results[1], results[0], terms=2 * 3 * 64)
    assert rebuilt.chain.drift is not None


def test_twice_in_one_graph_and_autograd_grad() -> None:
    chain = shaken(chain_of(lambda: nn.Conv2d(2, 4, 1))).double()
    x = torch.randn(2, 4, 3, 3).double()
    parameters = list(chain.parameters())

    def twice() -> Tensor:
        once, logdet = chain(x)
        return loss_of(*chain(once)) + logdet.sum()

    got = torch.autograd.grad(twice(), parameters)
    chain.reversible = False
    assert_all_close(list(got), list(torch.autograd.grad(twice(), parameters)), terms=2 * 6 * 18)


def test_without_gradients_nothing_is_kept() -> None:
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1))
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        z, _ = chain(x)
    assert z.grad_fn is None
    assert chain.drift is None


def test_the_callers_tensors_are_left_alone() -> None:
    chain = shaken(chain_of(lambda: nn.Conv2d(2, 4, 1)))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    z, logdet = chain(x)
    before = x.detach().clone(), z.detach().clone()
    loss_of(z, logdet).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])


def test_a_changed_output_is_noticed() -> None:
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1))
    z, _ = chain(torch.randn(2, 4, 3, 3, requires_grad=True))
    loss = z.pow(2).sum()
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_changed_parameter_is_noticed() -> None:
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1))
    loss = loss_of(*chain(torch.randn(2, 4, 3, 3)))
    with torch.no_grad():
        chain.layers[1].coupling.net.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("part", ["net", "conv"])
def test_an_exchanged_parameter_is_noticed(part: str) -> None:
    """Networks run again and weights are folded again: with other ones, gradients would be lost."""
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1))
    x = torch.randn(2, 4, 3, 3)
    others = {k: p.detach().clone().requires_grad_() for k, p in chain.named_parameters()}
    others = {k: p for k, p in others.items() if part in k}
    loss = loss_of(*torch.func.functional_call(chain, others, (x,)))
    with pytest.raises(RuntimeError, match=r"replaced.*functional_call.*reversible=False"):
        loss.backward()
    chain.reversible = False
    loss_of(*torch.func.functional_call(chain, others, (x,))).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in others.values())


@pytest.mark.parametrize("reversible", [True, False])
def test_gradients_of_gradients(reversible: bool) -> None:
    """Autograd's are refused, where nothing would carry them; those of torch.func are exact."""
    chain = chain_of(lambda: nn.Conv2d(2, 4, 1)).double()
    chain.reversible = reversible
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def total(x: Tensor) -> Tensor:
        z, logdet = chain(x)
        return z.square().sum() + logdet.sum()

    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*torch\.func"):
        torch.autograd.grad(total(x), x, create_graph=True)
    (plain,) = torch.autograd.grad(total(x), x)
    assert_close(torch.func.grad(total)(x), plain, terms=100)
    v, h = torch.randn_like(x), 1e-6
    second = torch.func.grad(lambda x: (torch.func.grad(total)(x) * v).sum())(x)
    differences = torch.stack([torch.autograd.grad(total(x + step * v), x)[0] for step in (h, -h)])
    expected = (differences[0] - differences[1]) / (2 * h)
    assert expected.abs().max() > 1e-3
    # Central differences err by h^2 and by eps / h, some 1e-10 of the gradient each.
    assert (second - expected).abs().max() < 1e-8 * plain.abs().max()


# Triton's interpreter truncates to bfloat16 where devices round.
LOW = torch.float16 if KERNELS_ON_CPU else torch.bfloat16


def test_autocast_leaves_the_state_in_float32() -> None:
    """Networks in low precision, float32 state: networks whose input was kept see the same bits
    again, so that walking back costs far less than the low precision itself."""
    stored = shaken(Glow((3, 8, 8), 2, 4, 16, reversible=False))
    rebuilt = Glow((3, 8, 8), 2, 4, 16, checkpoint_every=1)
    rebuilt.load_state_dict(stored.state_dict())
    x = torch.randn(4, 3, 8, 8)

    def run(model: nn.Module, low: bool) -> list[Tensor]:
        def call(x: Tensor) -> object:
            with torch.autocast("cpu", LOW, enabled=low):
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


def test_autocast_casts_its_weights_anew_for_the_walk_back() -> None:
    """Backward inside autocast must not meet weights that were cast without gradients."""
    chain = shaken(chain_of(lambda: nn.Conv2d(2, 4, 1)))
    x = torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(*chain(x)).backward()
    assert all(p.grad is not None for p in chain.parameters())


@pytest.mark.skipif(KERNELS_ON_CPU, reason="dozens of steps, and the interpreter adds nothing")
def test_float16_networks_train_under_a_gradient_scaler() -> None:
    """The gradients are the stored chain's, a scale that overflows skips its step, and the next is
    taken."""
    stored = shaken(Glow((3, 8, 8), 2, 4, 16, reversible=False))
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
        # A rebuilt state's last bit may move a network's input by one step of float16.
        assert (a.grad - b).norm() <= torch.finfo(torch.float16).eps * b.norm() * 4
    scaler.step(optimizer)
    assert not all(map(torch.equal, before, rebuilt.parameters()))


def smooth_images(n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, 8, 8) in float64 whose neighbours are alike, with dequantization noise."""
    coarse = torch.rand(n, 3, 3, 3, generator=generator, dtype=torch.float64)
    fine = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True)
    return (fine * 255 + torch.rand(fine.shape, generator=generator)).floor() / 256 - 0.5


@pytest.mark.skipif(KERNELS_ON_CPU, reason="dozens of steps, and the interpreter adds nothing")
def test_trains_like_stored_activations_for_200_steps() -> None:
    """In float64, where rounding has no time to grow, the loss curves are one; and in float32 the
    gradients of the trained model are still the stored ones to 1e-5."""
    curves = []
    for reversible in (False, True):
        torch.manual_seed(0)
        flow = Glow((3, 8, 8), 2, 2, 8, reversible=reversible).double()
        generator = torch.Generator().manual_seed(1)
        flow.initialize(smooth_images(16, generator))
        optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
        curve = []
        for _ in range(200):
            z, logdet = flow(smooth_images(4, generator))
            loss = (sum(part.square().sum() for part in z) / 2 - logdet.sum()) / (4 * 192)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-20:].mean() < curves[0][:20].mean() - 0.5  # it did learn
    assert (curves[1] - curves[0]).abs().max() < 1e-8

    stored = Glow((3, 8, 8), 2, 2, 8, reversible=False)
    stored.load_state_dict(flow.state_dict())
    rebuilt = copy.deepcopy(stored)
    rebuilt.chain.reversible = True
    x = smooth_images(8, torch.Generator().manual_seed(2)).float()
    flat = [torch.cat([g.flatten() for g in gradients(m, x, call=m)]) for m in (rebuilt, stored)]
    assert (flat[0] - flat[1]).norm() < 1e-5 * flat[1].norm()


def test_networks_may_be_compiled() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
    stored = shaken(ReversibleChain([FlowStep(4, net)], reversible=False))
    x = torch.randn(2, 4, 3, 3)
    want = gradients(stored, x, call=stored)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    chain = ReversibleChain([FlowStep(4, compiled)])
    chain.layers[0].actnorm.load_state_dict(stored.layers[0].actnorm.state_dict())
    chain.layers[0].conv.load_state_dict(stored.layers[0].conv.state_dict())
    assert_all_close(gradients(chain, x, call=chain), want, terms=2 * 18)


def stored_levels() -> ReversibleChain:
    layers = [Squeeze(), FlowStep(4, width=4), FlowStep(4, width=4), Split(4, width=4)]
    return shaken(ReversibleChain([*layers, FlowStep(2, width=4)], reversible=False))  # type: ignore[return-value]


def test_stored_chain_compiles_whole_both_ways() -> None:
    chain, x = stored_levels(), torch.randn(2, 1, 4, 4)
    z = tuple(part.detach() for part in chain(x)[0])
    for call, inputs in ((chain, (x,)), (lambda *z: chain.inverse(z), z)):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        want = gradients(chain, *inputs, call=call)
        assert_all_close(gradients(chain, *inputs, call=compiled), want, terms=3 * 32)


def test_sampling_of_stored_levels_is_exported() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = stored_levels()

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


def test_networks_in_float16_by_themselves() -> None:
    """Where the state before a network is kept, it reads the same bits again."""
    stored = shaken(chain_of(HalfNet, reversible=False))
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible, rebuilt.checkpoint_every = True, 1
    x = torch.randn(2, 4, 3, 3) / 10
    got, want = gradients(rebuilt, x, call=rebuilt), gradients(stored, x, call=stored)
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert torch.float16 in {w.dtype for w in want}
    assert_all_close(got, want, terms=2 * 3 * 18)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ReversibleChain([]), ValueError, "layers: expected at least one"),
        (lambda: ReversibleChain([nn.ReLU()]), TypeError, r"layers\[0\].*got ReLU"),  # type: ignore[list-item]
        (lambda: ReversibleChain([Squeeze()], checkpoint_every=0), ValueError, "got 0"),
        (lambda: ReversibleChain([Split(4)]).inverse((torch.zeros(1, 2, 2, 2),)), ValueError,
         "expected 2 latents, got 1"),
        (lambda: ReversibleChain([Squeeze()], checkpoint_every=1.5), TypeError,
         "checkpoint_every: expected a whole number, got float"),
        (lambda: ReversibleChain([FlowStep(4), Split(4), FlowStep(4)]), ValueError,
         r"layers\[2\]: expected a layer of 2 channels, got one of 4"),
        (lambda: ReversibleChain([Squeeze(), FlowStep(6)]), ValueError,
         r"layers\[1\]: expected a multiple of 4 channels, got one of 6"),
    ],
)  # fmt: skip
def test_bad_input(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_one() -> None:
    """A whole training step of the chain in a CUDA graph: no host sync, no data-dependent size."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = shaken(Glow((3, 16, 16), 2, 3, 16)).cuda()
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
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)
