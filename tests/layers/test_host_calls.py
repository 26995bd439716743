"""The calls of Python functions that a step of flow costs the host: counted, not timed."""

import sys
from types import FrameType
from typing import Any

import pytest
import torch

from mflow_kernels import FlowStep, ReversibleChain
from mflow_kernels.ops import cpu
from mflow_kernels.ops.launch import KERNELS_ON_CPU

pytestmark = pytest.mark.skipif(
    KERNELS_ON_CPU or cpu.load_extension() is None, reason="counts the path of csrc"
)


def calls_of(model: torch.nn.Module, x: torch.Tensor, *, train: bool) -> int:
    """The Python functions of this package that one call, or one training step, enters."""
    entered = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal entered
        entered += event == "call" and "mflow_kernels" in frame.f_code.co_filename

    def step() -> None:
        with torch.set_grad_enabled(train):
            z, logdet = model(x)
        if train:
            (z.square().sum() - logdet.sum()).backward()

    for _ in range(3):  # the first runs check more
        step()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return entered


MOST = {"layer forward": 95, "layer": 125, "stored": 140, "reversible": 290}


@pytest.mark.parametrize("case", MOST)
def test_a_step_enters_few_functions(case: str) -> None:
    """What a parameter set, a shape and a dtype determine is settled once."""
    x, step = torch.randn(8, 12, 4, 4), FlowStep(12)
    step.initialize(x)
    model = step
    if not case.startswith("layer"):
        model = ReversibleChain([step], reversible=case == "reversible")
    assert calls_of(model, x, train=case != "layer forward") <= MOST[case]
