"""Arguments that the masked penalty refuses, and GPUs that its kernels cannot run on."""

import contextlib
import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mflow_kernels.ops.masked_penalty import masked_penalty
from mflow_kernels.ops.penalty_functions import RHOS

module = importlib.import_module("mflow_kernels.ops.masked_penalty")


def _extension(**changes: Any) -> SimpleNamespace:
    working = dict(cuda_archs=["sm_90"], cuda_note="", cuda_problem=lambda: "")
    return SimpleNamespace(**(working | changes))


@pytest.mark.parametrize(
    ("extension", "why"),
    [
        (None, r"_C is not built"),
        (_extension(cuda_archs=[], cuda_note="no nvcc"), r"no CUDA kernels \(no nvcc\)"),
        (
            _extension(cuda_problem=lambda: "CUDA driver version is insufficient"),
            r"cannot run \(CUDA driver version is insufficient\)",
        ),
    ],
)
def test_a_gpu_without_kernels_falls_back_with_one_warning(
    extension: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(module, "_C", extension)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    module._why_not_cuda.cache_clear()
    try:
        with pytest.warns(UserWarning, match=why + ".*MFLOW_CUDA=1") as warned:
            assert all(module._native(gpu) is None for _ in range(3))
        assert len(warned) == 1
        monkeypatch.setattr(module, "_C", _extension())
        module._why_not_cuda.cache_clear()
        assert module._native(gpu) is module._C
    finally:
        module._why_not_cuda.cache_clear()


ONES = torch.ones(2, 3, 4, 4)
BAD = {
    "integer input": (TypeError, r"input: expected dtype .*got int64", {"input": ONES.long()}),
    "no tensor": (TypeError, r"input: expected a torch.Tensor, got list", {"input": [1.0]}),
    "one axis": (ValueError, r"input: expected shape \(N, C", {"input": torch.ones(3)}),
    "empty sample": (ValueError, r"input: .*\(2, 0\)", {"input": torch.ones(2, 0)}),
    "target shape": (ValueError, r"target: .*\(2, 3, 4, 4\), got \(3,", {"target": ONES[0]}),
    "target dtype": (TypeError, r"target: .*float32, got float64", {"target": ONES.double()}),
    "target device": (ValueError, r"target: .*cpu, got meta", {"target": ONES.to("meta")}),
    "mask dtype": (TypeError, r"mask: .*bool.*got int64", {"mask": ONES.long()}),
    "mask type": (TypeError, r"mask: expected a torch.Tensor, got bool", {"mask": True}),
    "mask shape": (ValueError, r"mask: .*broadcasts.*got \(2,\)", {"mask": torch.ones(2)}),
    "mask device": (ValueError, r"mask: .*cpu, got meta", {"mask": ONES.to("meta")}),
    "mask learned": (ValueError, r"mask: .*constant", {"mask": ONES.clone().requires_grad_()}),
    "weight learned": (ValueError, r"weight: .*const", {"weight": ONES.clone().requires_grad_()}),
    "weight shape": (ValueError, r"weight: .*broadcasts", {"weight": torch.ones(2, 4)}),
    "weight dtype": (TypeError, r"weight: .*got int64", {"weight": ONES.long()}),
    "weight type": (TypeError, r"weight: expected a number or", {"weight": "1"}),
    "weight bool": (TypeError, r"weight: expected a number or", {"weight": True}),
    "weight sign": (ValueError, r"weight: .*got -1", {"weight": -1}),
    "weight inf": (ValueError, r"weight: .*got inf", {"weight": math.inf}),
    "weights sign": (ValueError, r"weight: .*from -1.0 to -1.0", {"weight": -ONES}),
    "weights inf": (ValueError, r"weight: .*to inf", {"weight": ONES * math.inf}),
    "rho": (ValueError, rf"rho: expected one of {', '.join(RHOS)}, got 'l3'", {"rho": "l3"}),
    "delta type": (TypeError, r"delta: expected a number, got str", {"delta": "1"}),
    "delta 0": (ValueError, r"delta: .*got 0", {"delta": 0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, argument = BAD[case]
    with pytest.raises(error, match=message):
        masked_penalty(**{"input": ONES, **argument})
