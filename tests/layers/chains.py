"""Chains and other sequences for tests, their losses and their gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mflow_kernels import Bijection, FlowStep, ReversibleChain, Split, Squeeze
from mflow_kernels.testing import assert_close


class InSequence(Bijection):
    """The caller's bijection: layers one after another, without an `initialize`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, logdet = layer(x, *context)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for layer in reversed(self.layers):
            z, logdet = layer.inverse(z, *context)
            total = total + logdet
        return z, total


def parts(z: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The latents of a chain, which returns one without a tuple if there is only one."""
    return z if isinstance(z, tuple) else (z,)


def inverse_of(chain: nn.Module, *context: Tensor) -> Callable[..., object]:
    """The inverse of a chain as a function of its latents, one after another."""
    return lambda *z: chain.inverse(z if len(z) > 1 else z[0], *context)  # type: ignore[operator]


def loss_of(z: Tensor | tuple[Tensor, ...], logdet: Tensor) -> Tensor:
    cubes = sum((i + 1) * part.pow(3).sum() for i, part in enumerate(parts(z)))
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


def both_gradients(
    chain: ReversibleChain, *inputs: Tensor, backwards: bool = False, contexts: int = 0
) -> list[list[Tensor]]:
    """The `gradients` of a chain that rebuilds its states, and of one that stores them. The last
    `contexts` inputs are contexts."""
    states = len(inputs) - contexts

    def call(*given: Tensor) -> object:
        if backwards:
            return inverse_of(chain, *given[states:])(*given[:states])
        return chain(*given)

    results = []
    for chain.reversible in (True, False):
        results.append(gradients(chain, *inputs, call=call))
    return results


def assert_all_close(got: list[Tensor], want: list[Tensor], terms: int) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, terms=terms, name=f"gradient {i}")


def levels(**options: object) -> ReversibleChain:
    """A chain from (N, 1, H, W) to two latents (N, 2, H/2, W/2)."""
    layers = [Squeeze(), FlowStep(4, width=3), FlowStep(4, width=3), Split(4, width=3)]
    return ReversibleChain([*layers, FlowStep(2, width=3)], **options)  # type: ignore[arg-type]


def chain_of(net: Callable[[], nn.Module], **options: object) -> ReversibleChain:
    return ReversibleChain([FlowStep(4, net()) for _ in range(3)], **options)  # type: ignore[arg-type]
