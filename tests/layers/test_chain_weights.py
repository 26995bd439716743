"""Gradients of the weights of chains: sums over launches and passes, and other dtypes."""

import pytest
import torch
from cases import perturbed
from torch import Tensor, nn

from layers.chains import assert_all_close, both_gradients, chain_of, gradients
from mflow_kernels import FlowStep, ReversibleChain, coupling_net


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


class HalfNet(nn.Module):
    """A network in float16 on states in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(2, 4, 1).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.half())


@pytest.mark.parametrize("part", ["actnorm", "conv", "coupling", "network"])
def test_parts_with_another_dtype_or_frozen(part: str) -> None:
    """Actnorm and convolution compute in the precision of the state, not of their parameters. A
    network whose input is stored reads the same bits again."""
    net = HalfNet if part == "network" else lambda: coupling_net(2, 4, 4, 2)
    chain = perturbed(chain_of(net, checkpoint_every=1))
    if part == "coupling":
        chain.layers[1].coupling.requires_grad_(False)
    elif part != "network":
        chain.layers[0].get_submodule(part).requires_grad_(False)
        chain.layers[1].get_submodule(part).double()
        chain.layers[2].get_submodule(part).bfloat16()
    got, want = both_gradients(chain, torch.randn(2, 4, 3, 3) / 10)
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert len(got) == 2 + sum(p.requires_grad for p in chain.parameters())
    # A gradient in float64 is no more exact than the float32 state.
    got = [g.float() if g.dtype == torch.float64 else g for g in got]
    assert_all_close(got, want, terms=2 * 3 * 18)
