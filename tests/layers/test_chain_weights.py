"""Gradients of the weights of chains: sums over launches and passes, shared and frozen weights."""

import pytest
import torch
from cases import perturbed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layers.chains import assert_all_close, both_gradients, gradients
from mflow_kernels import FlowStep, ReversibleChain


def test_partial_sums_in_smaller_buffers_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer for the partial sums of one or two steps gives the same bits as one for all."""
    chain = perturbed(ReversibleChain([FlowStep(6, width=8) for _ in range(5)])).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    want = gradients(chain, x, call=chain)
    for steps in (1, 2):
        monkeypatch.setattr(
            "mflow_kernels.reversible.linear_maps.PARTIALS_BYTES", steps * 6 * 6 * 8
        )
        torch.testing.assert_close(gradients(chain, x, call=chain), want, rtol=0, atol=0)


def test_stored_states_need_no_copy_of_the_partial_sums() -> None:
    """The backward launches of a group write dW into one buffer. `Tensor.unbind` would instead copy
    all of their results into another one."""
    chain = perturbed(ReversibleChain([FlowStep(6, width=8) for _ in range(5)], reversible=False))
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
    chain = perturbed(ReversibleChain([FlowStep(6, width=8) for _ in range(3)], reversible=False))
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    parameters = [p for p in chain.parameters() if p.requires_grad]
    z, logdet = chain(x)
    loss = logdet.sum() + z.square().sum()
    want = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)  # computes dW and does not ask for it
    for _ in range(2):
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_shared_and_frozen_parameters() -> None:
    shared = nn.Conv2d(2, 4, 3, padding=1)
    stored = perturbed(ReversibleChain([FlowStep(4, shared) for _ in range(3)], reversible=False))
    stored.double()
    stored.layers[1].actnorm.bias.requires_grad_(False)
    shared.weight.requires_grad_(False)
    got, want = both_gradients(stored, torch.randn(2, 4, 3, 3).double())
    assert_all_close(got, want, terms=2 * 3 * 18)
    assert len(want) == 2 + sum(p.requires_grad for p in stored.parameters())


@pytest.mark.parametrize("between", [0, 1], ids=["adjacent", "apart"])
def test_the_same_step_twice(between: int) -> None:
    step = FlowStep(4, width=4)
    others = [FlowStep(4, width=4) for _ in range(between)]
    stored = perturbed(ReversibleChain([step, *others, step], reversible=False)).double()
    x = torch.randn(2, 4, 3, 3).double()
    assert_all_close(*both_gradients(stored, x), terms=2 * 3 * 18)


@pytest.mark.parametrize("part", ["actnorm", "conv", "coupling"])
def test_parts_with_another_dtype_or_frozen(part: str) -> None:
    """Actnorm and convolution compute in the precision of the state, not of their parameters."""
    stored = perturbed(ReversibleChain([FlowStep(4, width=4) for _ in range(3)], reversible=False))
    if part == "coupling":
        stored.layers[1].coupling.requires_grad_(False)
    else:
        stored.layers[0].get_submodule(part).requires_grad_(False)
        stored.layers[1].get_submodule(part).double()
        stored.layers[2].get_submodule(part).bfloat16()
    got, want = both_gradients(stored, torch.randn(2, 4, 3, 3))
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert len(got) == 2 + sum(p.requires_grad for p in stored.parameters())
    # A gradient in float64 is no more exact than the float32 state.
    got = [g.float() if g.dtype == torch.float64 else g for g in got]
    assert_all_close(got, want, terms=2 * 3 * 18)
