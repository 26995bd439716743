"""How `implementation` chooses what computes a coupling network, and what it measures."""

from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness.inputs import Draw
from mflow_kernels.ops import coupling_network as module
from mflow_kernels.ops.coupling_network import coupling_network_ref


def network(channels: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The input, weights and biases of a network in a step of flow with this number of channels."""
    draw = Draw((2, channels, 4, 4), (dtype, dtype), width=16)
    return list(DIFFERENTIABLE["coupling_network"].draw(draw).values())


def test_a_cpu_has_no_epilogues() -> None:
    """A network on a CPU runs torch's layers, under the interpreter of kernels too."""
    x, *weights = network()
    assert module.implementation(x, weights, training=True) == "torch"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "channels", "expected"),
    [
        (torch.float32, 12, ["torch", "layers"]),
        (torch.float64, 12, []),
        (torch.bfloat16, 12, ["torch", "layers", "kernels"]),
        (torch.bfloat16, 96, ["torch", "layers"]),
    ],
    ids=str,
)
def test_candidates_on_a_card(
    dtype: torch.dtype,
    channels: int,
    expected: list[str],
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card compares every implementation that supports the network, apart for training and for
    sampling and evaluation."""
    found: list[str] = []

    class OnCard:
        """A CPU tensor whose `is_cuda` is true."""

        def __init__(self, x: Tensor) -> None:
            self.__dict__["x"] = x

        def __getattr__(self, name: str) -> Any:
            return True if name == "is_cuda" else getattr(self.x, name)

    def fastest(key: str, candidates: Any, device: torch.device) -> str:
        found.extend(candidates)
        assert key.endswith(", training" if training else ", inference")
        work = module._train if training else module._infer
        assert all(candidate.func is work for candidate in candidates.values())
        return "layers"

    monkeypatch.setattr(module, "fastest", fastest)
    monkeypatch.setattr(module, "_has_cudnn", lambda device: True)
    monkeypatch.setattr(module, "uses_triton", lambda x: True)
    # A choice that is known must launch nothing, and drawing cannot be captured in a graph.
    monkeypatch.setattr(module, "_drawn", lambda *given: pytest.fail("drawn without a measurement"))
    x, *weights = network(channels, dtype)
    chosen = module.implementation(OnCard(x), weights, training)  # type: ignore[arg-type]
    assert found == expected
    assert chosen == ("layers" if expected else "torch")
    monkeypatch.setenv("MFLOW_NETWORK", "torch")
    assert module.implementation(OnCard(x), weights, training) == "torch"  # type: ignore[arg-type]


def test_nothing_is_measured_with_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_cudnn", lambda device: True)
    monkeypatch.setattr(module, "fastest", lambda *given: pytest.fail("measured"))
    with FakeTensorMode():
        x, *weights = network(dtype=torch.bfloat16)
        x, *weights = (torch.empty_like(t, device="cuda") for t in (x, *weights))
        assert module.implementation(x, weights, training=True) == "torch"


def test_what_a_card_compares_is_no_zero_network() -> None:
    """A new network has a last layer of zeros, which hides errors of all the others."""
    x, *weights = network()
    weights[4] = torch.zeros_like(weights[4])
    state = torch.get_rng_state()
    results = module._train(
        lambda *given: coupling_network_ref(*given)[0], lambda: module._drawn(x, weights)
    )
    (params,) = module._infer(
        lambda *given: coupling_network_ref(*given)[0], lambda: module._drawn(x, weights)
    )
    assert torch.equal(params, results[0])
    assert len(results) == 8
    assert all(0.01 < t.detach().abs().max() < 1e4 for t in results)
    assert torch.equal(torch.get_rng_state(), state)
