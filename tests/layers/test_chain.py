"""Reversible chains have the gradients of stored ones and leave the caller's tensors alone."""

import copy
from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layers.chains import assert_all_close, chain_of, gradients, loss_of, shaken
from mflow_kernels import (
    ActNorm,
    FlowStep,
    Glow,
    InvertibleConv1x1,
    ReversibleChain,
    Split,
    Squeeze,
    VectorFlow,
)
from mflow_kernels.layers.chain_layer import ChainLayer
from mflow_kernels.layers.folding import ActNormConv
from mflow_kernels.ops.conv1x1 import conv1x1_eager, spread
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.partial_sums import unbind_weights
from mflow_kernels.reversible.apply import segment_starts
from mflow_kernels.reversible.backward import BackwardPass
from mflow_kernels.reversible.program import SpaceToDepth
from mflow_kernels.testing import assert_close

FLOWS = {
    "image": (lambda **o: Glow((3, 8, 8), 2, 3, 8, **o), (2, 3, 8, 8)),
    "one level": (lambda **o: Glow((1, 4, 4), 1, 2, 8, **o), (3, 1, 4, 4)),
    "vector": (lambda **o: VectorFlow(5, 3, 8, **o), (4, 5)),
}


def test_partial_sums_in_smaller_buffers_change_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A buffer for the partial sums of one or two steps gives the same bits as one for all."""
    chain = shaken(ReversibleChain([FlowStep(6, width=8) for _ in range(5)])).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    want = gradients(chain, x, call=chain)
    for steps in (1, 2):
        monkeypatch.setattr("mflow_kernels.reversible.backward.PARTIALS_BYTES", steps * 6 * 6 * 8)
        for got, wanted in zip(gradients(chain, x, call=chain), want, strict=True):
            assert torch.equal(got, wanted)


def test_stored_states_need_no_copy_of_the_partial_sums() -> None:
    """The backward launches of a group write dW into one buffer. `Tensor.unbind` would instead copy
    all of their results into another one."""
    chain = shaken(ReversibleChain([FlowStep(6, width=8) for _ in range(5)], reversible=False))
    z, logdet = chain(torch.randn(2, 6, 4, 4))

    class Stacks(TorchDispatchMode):
        shapes: list[torch.Size] = []  # noqa: RUF012

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.stack, torch.ops.aten.cat):
                self.shapes.append(out.shape)
            return out

    with Stacks() as stacks:
        (logdet.sum() + z.square().sum()).backward()
    assert [shape for shape in stacks.shapes if shape[-2:] == (6, 6)] == []


def test_gradients_of_weights_add_up_over_backward_passes() -> None:
    """Each pass over a graph, or over a part of it, gives the gradient of that pass alone."""
    chain = shaken(ReversibleChain([FlowStep(6, width=8) for _ in range(3)], reversible=False))
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    parameters = [p for p in chain.parameters() if p.requires_grad]
    z, logdet = chain(x)
    loss = logdet.sum() + z.square().sum()
    want = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)  # computes dW and does not ask for it
    for _ in range(2):
        for got, wanted in zip(
            torch.autograd.grad(loss, parameters, retain_graph=True), want, strict=True
        ):
            assert torch.equal(got, wanted)


def test_a_weight_that_two_launches_use_gets_the_sum_of_both_gradients() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    weight = torch.randn(3, 6, 6, dtype=torch.float64, requires_grad=True)
    spread_weight, spread_bias = spread(weight, torch.zeros(3, 6), x)
    first, _, last = unbind_weights(spread_weight)
    y = x
    for row in (first, last, first):  # the second row gets no gradient
        y, _ = conv1x1_eager(y, row, spread_bias[0], "tf32x3", None)
    y.square().sum().backward()
    reference = weight.detach().clone().requires_grad_()
    w_0, _, w_2 = reference.unbind()
    torch.einsum("ij,njhw->nihw", w_0 @ w_2 @ w_0, x).square().sum().backward()
    assert weight.grad is not None
    assert reference.grad is not None
    assert_close(weight.grad, reference.grad, terms=3 * 6 * 2 * 16)  # three maps, two images


# In float32, the rounding grows with the number of steps between two kept states.
@pytest.mark.parametrize(
    ("every", "dtype"),
    [(None, torch.float64), (1, torch.float64), (2, torch.float64), (None, torch.float32)],
)
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

    # The longest sum is that of dW over all pixels. States round once a step in each direction.
    assert_all_close(run(rebuilt), run(stored), terms=2 * 7 * x[:, 0].numel())
    assert rebuilt.chain.drift is not None
    assert_close(rebuilt.chain.drift, torch.zeros_like(rebuilt.chain.drift), terms=64, scale=4.0)


def test_memory_holds_only_the_first_and_last_state() -> None:
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
        # Four-dimensional tensors: the input, the last state, the latent, and stored states.
        states_saved = [t for t in saved if t.dim() == 4 and not isinstance(t, nn.Parameter)]
        assert len(states_saved) == 3 + 2 * states


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


class LinearStep(ChainLayer):
    """A user's layer: actnorm and 1x1 convolution without a coupling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.actnorm, self.conv = ActNorm(channels), InvertibleConv1x1(channels)

    @property
    def channels(self) -> int:
        return len(self.actnorm.bias)

    def instructions(self) -> list[ActNormConv]:
        return [ActNormConv(self.actnorm, self.conv)]

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = self.actnorm(x)
        z, added = self.conv(y)
        return z, logdet + added


def test_a_layer_of_the_user_in_a_chain() -> None:
    """A `ChainLayer` runs at the start, in the middle and at the end, and has gradients."""
    linear = [LinearStep(c) for c in (4, 4, 16, 8)]
    layers = [linear[0], FlowStep(4, width=4), linear[1], Squeeze()]
    layers += [linear[2], Split(16, width=4), linear[3]]
    stored = shaken(ReversibleChain(layers, reversible=False)).double()
    rebuilt = copy.deepcopy(stored)
    rebuilt.reversible = True
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert_close(linear[0](x)[0], ReversibleChain(linear[:1])(x)[0], terms=16)
    got, want = (gradients(chain, x, call=chain) for chain in (rebuilt, stored))
    assert len(got) == 2 + len(list(stored.parameters()))
    assert_all_close(got, want, terms=2 * 7 * 32)
    z, _ = rebuilt(x)
    assert_close(rebuilt.inverse(z)[0], x, terms=2 * 7 * 16)
    with pytest.raises(
        ValueError, match=r"layers\[1\]: expected a layer of 4 channels, got one of"
    ):
        ReversibleChain([linear[0], LinearStep(5)])


class Unsqueeze(ChainLayer):
    """A user's layer that a chain does not support."""

    def instructions(self) -> list[SpaceToDepth]:
        return [SpaceToDepth(inverse=True)]


def test_a_layer_that_undoes_a_squeeze_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SpaceToDepth\(inverse=False\), got inverse=True"):
        ReversibleChain([Squeeze(), Unsqueeze()])(torch.zeros(1, 4, 4, 4))


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
def test_parts_with_another_dtype_or_frozen(part: str) -> None:
    """Actnorm and convolution compute in the precision of the state, not of their parameters."""
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
    # A gradient in float64 is no more exact than the float32 state.
    got = [g.float() if g.dtype == torch.float64 else g for g in got]
    assert_all_close(got, want, terms=2 * 3 * 18)


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_a_node_for_each_level_changes_no_bit(
    backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of networks and context that levels share are added in the same order."""

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
def test_gradients_of_a_level_are_complete_before_the_next_is_undone(
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


def test_frozen_levels_are_not_undone() -> None:
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


def test_nothing_is_stored_without_gradients() -> None:
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
def test_a_replaced_parameter_is_noticed(part: str) -> None:
    """The backward pass runs networks and folds weights again, so it needs the same parameters."""
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
    """Autograd's second derivatives raise an error; those of torch.func are exact."""
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
    # The errors of central differences, h^2 and eps / h, are about 1e-10 of the gradient each.
    assert (second - expected).abs().max() < 1e-8 * plain.abs().max()


def smooth_images(n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, 8, 8) in float64: smooth images with dequantization noise."""
    coarse = torch.rand(n, 3, 3, 3, generator=generator, dtype=torch.float64)
    fine = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True)
    return (fine * 255 + torch.rand(fine.shape, generator=generator)).floor() / 256 - 0.5


@pytest.mark.skipif(KERNELS_ON_CPU, reason="dozens of steps, and the interpreter adds nothing")
def test_trains_like_stored_activations_for_200_steps() -> None:
    """In float64 the loss curves agree. In float32 the gradients of the trained model agree with
    the stored ones to 1e-5."""
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
