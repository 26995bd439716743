"""The masked penalty at special values. `test_values.py` and the fuzz test it on all layouts."""

import contextlib
import importlib
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import allocated, normal
from torch import Tensor
from views import VIEWS

from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.masked_penalty import (
    masked_penalty,
    masked_penalty_gaussian,
    masked_penalty_ref,
)
from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.testing import EPS, assert_close

if KERNELS_ON_CPU:
    pytest.skip("the penalty has no Triton kernel", allow_module_level=True)

# torch.empty returns NaN, so that no unwritten value is right by chance.
pytestmark = pytest.mark.usefixtures("poison")
module = importlib.import_module("mflow_kernels.ops.masked_penalty")
views = pytest.mark.parametrize("view", dict.fromkeys(VIEWS), ids=lambda view: view.__name__)


@pytest.mark.parametrize("dtype", EPS)
def test_special_values(device: torch.device, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    values = [
        0.0,
        -0.0,
        torch.finfo(dtype).smallest_normal,
        0.75,
        -0.75,
        1.0,
        top**0.4,
        -(top**0.4),
    ]
    x = torch.tensor(values, dtype=dtype, device=device)[:, None]
    for rho in RHOS:
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        got = masked_penalty_gaussian(leaf, rho=rho, delta=0.75)
        want = masked_penalty_ref(exact, None, None, None, 1.0, rho, 0.75)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
        (grad,), (slope,) = (
            torch.autograd.grad(sum(p.sum() for p in both), of)
            for both, of in ((got, leaf), (want, exact))
        )
        assert_close(grad, slope)
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.full((1, 3), bad, dtype=dtype, device=device)
        for rho in RHOS:
            assert not masked_penalty(x, rho=rho).isfinite()


def all_of(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit floating-point type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def test_every_bfloat16_is_widened_as_by_torch() -> None:
    every = all_of(torch.bfloat16)
    penalty = masked_penalty(every[:, None], rho="l1")
    assert torch.equal(penalty.nan_to_num(), every.float().abs().nan_to_num())
    assert torch.equal(penalty.isnan(), every.isnan())


def test_floats_are_rounded_to_bfloat16_as_by_torch() -> None:
    """Every bfloat16, every midpoint of two, and the float32 neighbours of these."""
    dtype = torch.bfloat16
    finite = all_of(dtype)
    finite = finite[finite.isfinite()].float().sort()[0]
    midpoints = (finite[1:].double() + finite[:-1]).div(2).float()
    top = torch.finfo(dtype).max * torch.tensor([1 + 2**-12, 1 + 2**-11, 1 + 2**-8, 2])
    values = torch.cat([finite, midpoints, top, -top, torch.tensor([math.inf, 1e-45, -1e-40])])
    up, down = (torch.nextafter(values, torch.tensor(end)) for end in (math.inf, -math.inf))
    values = torch.cat([values, up, down, torch.tensor([math.nan])])
    ones = torch.ones(len(values), 1, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_penalty(ones, rho="l2"), ones, values)
    grad = grad[:, 0]  # of each sample, its cotangent times 1
    assert torch.equal(grad.nan_to_num(0), values.to(dtype).nan_to_num(0))
    assert torch.equal(grad.signbit()[:-1], values.signbit()[:-1])
    assert torch.equal(grad.isnan(), values.isnan())


@pytest.mark.parametrize("by", ["extension", "reference"])
@pytest.mark.parametrize("rho", RHOS)
def test_bool_masks_leave_nan_and_infinity_out(
    device: torch.device, rho: Any, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "reference":
        monkeypatch.setattr(module, "_C", None)
    shape = (2, 3, 5, 7)
    clean, target, mask = (normal(*shape, device=device) for _ in range(3))
    mask = mask > 0
    for bad in (math.nan, math.inf, -math.inf):
        for penalized in (True, False):
            # The bad values are outside the part that the tested sum covers.
            x = clean.masked_fill(~mask if penalized else mask, bad)
            results = []
            for values in (clean, x):
                leaves = [v.clone().requires_grad_() for v in (values, target)]
                both = masked_penalty_gaussian(*leaves, mask=mask, rho=rho)
                sums = both[0 if penalized else 1]
                results.append([sums, *torch.autograd.grad(sums.sum(), leaves)])
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
                assert a.isfinite().all()
    # Bad values inside the part that is summed do count; without a mask, everything is summed.
    x = clean.masked_fill(mask, math.nan)
    assert masked_penalty_gaussian(x, rho=rho)[0].isnan().all()
    assert masked_penalty_gaussian(x, rho=rho)[1].eq(0).all()
    x = clean.masked_fill(mask, math.nan).requires_grad_()
    (grad,) = torch.autograd.grad(masked_penalty(x, mask=mask, rho="l2").sum(), x)
    assert torch.equal(grad.isnan(), mask)


def test_second_derivatives(device: torch.device) -> None:
    """Of autograd and of torch.func; also by a gradient of the sums that is 0."""
    x = normal(2, 3, 4, dtype=torch.float64, device=device).requires_grad_()

    def total(x: torch.Tensor) -> torch.Tensor:
        return masked_penalty(x, weight=0.5, rho="l2").sum()

    want = 0.5 * torch.eye(x.numel(), dtype=x.dtype, device=device)
    for found in (torch.func.hessian(total)(x), torch.autograd.functional.hessian(total, x)):
        assert_close(found.detach().reshape(x.numel(), -1), want)  # type: ignore[union-attr]
    v = torch.zeros(2, dtype=x.dtype, device=device).requires_grad_()
    (dx,) = torch.autograd.grad(masked_penalty(x, rho="l2"), x, v, create_graph=True)
    assert_close(torch.autograd.grad(dx.sum(), v)[0], x.detach().flatten(1).sum(1))


@pytest.mark.skipif(module._C is None, reason="csrc is not built")
@views
def test_no_hidden_copies(device: torch.device, view: Any) -> None:
    x, target = (
        view(normal(4, 6, 32, 32, dtype=torch.bfloat16, device=device), random.Random(0))
        for _ in range(2)
    )
    mask, weight = normal(32, 32, device=device) > 0, normal(6, 32, 32, device=device).abs()
    problem = (x, target, mask, weight, 1.0, "huber", 1.0)
    tiles = x[0].numel() // 1024
    sums, cost = allocated(lambda: module._forward(*problem))
    # Results, partial sums and the range of weights. CUDA rounds each tensor up to 512 bytes.
    assert cost <= 4 * (2 * 4 + 2 * 4 * tiles + 2) + (3 * 512 if x.is_cuda else 0)
    gradients, cost = allocated(lambda: module._backward(*sums, *problem, True, True))
    assert cost == sum(gradient.nbytes for gradient in gradients)


@pytest.mark.skipif(module._C is None, reason="csrc is not built")
@views
def test_float16_on_a_cpu_is_computed_in_float32(view: Any) -> None:
    """Bits as of a float32 call whose gradients are rounded once; saved tensors stay float16."""
    shape = (3, 5, 16, 17)
    x, target = (
        view(normal(*shape, dtype=torch.float16), random.Random(0)).requires_grad_()
        for _ in range(2)
    )
    mask, weight = normal(16, 17), normal(5, 1, 1).abs()
    wide = [t.detach().float().requires_grad_() for t in (x, target)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = masked_penalty_gaussian(x, target, mask=mask, weight=weight)
    want = masked_penalty_gaussian(*wide, mask=mask, weight=weight)
    assert [t.dtype for t in saved if t.shape == shape] == [torch.float16] * 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    grads = torch.autograd.grad(got, (x, target), [torch.ones_like(v) for v in got])
    expected = torch.autograd.grad(want, wide, [torch.ones_like(v) for v in want])
    assert all(torch.equal(a, b.half()) for a, b in zip(grads, expected, strict=True))


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
