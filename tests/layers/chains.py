"""Chains for tests, their losses and their gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mflow_kernels import FlowStep, ReversibleChain
from mflow_kernels.testing import assert_close


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


def chain_of(net: Callable[[], nn.Module], **options: object) -> ReversibleChain:
    return ReversibleChain([FlowStep(4, net()) for _ in range(3)], **options)  # type: ignore[arg-type]
