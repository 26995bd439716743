import importlib
import math
from typing import Any

import pytest
import torch
from cases import allocated
from torch import Tensor

from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.masked_penalty import (
    masked_penalty,
    masked_penalty_gaussian,
    masked_penalty_ref,
)
from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.testing import assert_close

if KERNELS_ON_CPU:
    pytest.skip("the penalty has no Triton kernel", allow_module_level=True)

# torch.empty returns NaN, so that no unwritten value is right by chance.
pytestmark = pytest.mark.usefixtures("poison")
module = importlib.import_module("mflow_kernels.ops.masked_penalty")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "inner permuted": lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    "samples apart": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "pixels apart": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "samples innermost": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
}
# Shapes of the mask or weight of a state (N, C, H, W).
BROADCASTS = {
    "none": None,
    "number": (),
    "row": (-1,),
    "pixel": (-2, -1),
    "channel": (-3, 0, 0),
    "shared": (-3, -2, -1),
    "sample": (-4, 0, 0, 0),
    "sample and pixel": (-4, 0, -2, -1),
    "channel and row": (0, -3, -2, 0),
    "full": (-4, -3, -2, -1),
}


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def broadcast(name: str, shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor | None:
    axes = BROADCASTS[name]
    if axes is None:
        return None
    small = tuple(shape[a] if a else 1 for a in axes)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(small, generator=generator).to(device)


def assert_matches(
    x: Tensor,
    target: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | float = 1.0,
    rho: Any = "huber",
    delta: float = 0.75,
) -> None:
    """Values and gradients against the float64 reference."""
    leaves = [t.detach().requires_grad_() for t in (x, target) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got = masked_penalty_gaussian(*leaves, mask=mask, weight=weight, rho=rho, delta=delta)
    tensor, scale = (weight, 1.0) if isinstance(weight, Tensor) else (None, weight)
    want = masked_penalty_ref(
        exact[0], exact[1] if target is not None else None, mask, tensor, scale, rho, delta
    )
    terms = x[0].numel()
    for name, a, b in zip(("penalty", "gaussian"), got, want, strict=True):
        assert a.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert_close(a, b, terms=terms, name=name)
    seeds = [random(tuple(t.shape), t.dtype, x.device, i) for i, t in enumerate(got)]
    grads = torch.autograd.grad(got, leaves, seeds)
    expected = torch.autograd.grad(want, exact, [s.double() for s in seeds])
    for name, leaf, a, b in zip(("dinput", "dtarget"), leaves, grads, expected, strict=False):
        assert a.dtype == leaf.dtype
        if x.dim() <= 5:  # with more axes, the gradient may be that of a flattened copy
            assert a.stride() == torch.empty_like(leaf).stride()
        assert_close(a, b, terms=4, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", RHOS)
def test_layouts(device: torch.device, dtype: torch.dtype, rho: str) -> None:
    for layout in LAYOUTS.values():
        for shape in ((3, 4, 8, 16), (3, 3, 5, 7)):
            x = layout(random(shape, dtype, device, 0))
            assert_matches(x, rho=rho)
            for other in LAYOUTS.values():
                target = other(random(shape, dtype, device, 1))
                assert_matches(
                    x, target, mask=broadcast("pixel", shape, device, 2), weight=0.3, rho=rho
                )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "inner permuted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_and_weights_broadcast(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    for shape in ((2, 8, 4, 8), (3, 3, 5, 7)):
        x = LAYOUTS[layout](random(shape, dtype, device, 0))
        for i, of_mask in enumerate(BROADCASTS):
            mask = broadcast(of_mask, shape, device, 1)
            for of_weight in BROADCASTS:
                weight = broadcast(of_weight, shape, device, 2)
                if mask is not None and i % 2:
                    mask = mask > 0.4
                assert_matches(x, mask=mask, weight=0.3 if weight is None else weight)


@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1), (1, 3), (7, 1), (1000, 2), (3, 1, 1, 1), (2, 1025), (4, 31)],
        *[(2, 3, 129, 131), (1, 300_001), (3, 2, 1, 4096), (2, 3, 5), (2, 3, 4, 5, 6)],
        *[(2, 2, 3, 2, 3, 2), (2, 1, 2, 3, 1, 2, 3)],
    ],
)
def test_sizes(device: torch.device, shape: tuple[int, ...]) -> None:
    x, target = (random(shape, torch.float32, device, i) for i in range(2))
    middle = (1,) * (len(shape) - 2)
    mask = random((shape[1], *middle), torch.float32, device, 2) > 0
    assert_matches(x, target)
    assert_matches(x, target, mask=mask)
    assert_matches(
        x, mask=mask, weight=random((shape[0], 1, *middle), torch.float32, device, 3).abs()
    )


@pytest.mark.parametrize("dtype", DTYPES)
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
        assert_matches(x, rho=rho)
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


def without_extension(name: str, patch: pytest.MonkeyPatch) -> None:
    if name == "reference":
        patch.setattr(module, "_C", None)


@pytest.mark.parametrize("by", ["extension", "reference"])
@pytest.mark.parametrize("rho", RHOS)
def test_bool_masks_leave_nan_and_infinity_out(
    device: torch.device, rho: Any, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_extension(by, monkeypatch)
    shape = (2, 3, 5, 7)
    clean, target = (random(shape, torch.float32, device, i) for i in range(2))
    mask = random(shape, torch.float32, device, 2) > 0
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
    x = random((2, 3, 4), torch.float64, device, 0).requires_grad_()
    with pytest.raises(RuntimeError, match="masked_penalty: its gradient cannot be differentiated"):
        torch.autograd.grad(masked_penalty(x).sum(), x, create_graph=True)
    hessian = torch.func.hessian(lambda x: masked_penalty(x, weight=0.5, rho="l2").sum())(x)
    want = 0.5 * torch.eye(x.numel(), dtype=x.dtype, device=device)
    assert_close(hessian.detach().reshape(x.numel(), -1), want)


@pytest.mark.skipif(module._C is None, reason="csrc is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_hidden_copies(device: torch.device, layout: str) -> None:
    shape = (4, 6, 32, 32)
    x, target = (LAYOUTS[layout](random(shape, torch.bfloat16, device, i)) for i in range(2))
    mask, weight = (broadcast(b, shape, device, 0) for b in ("pixel", "shared"))
    assert mask is not None
    problem = (x, target, mask > 0.5, weight, 1.0, "huber", 1.0)
    tiles = x[0].numel() // 1024
    sums, cost = allocated(lambda: module._forward(*problem))
    # Results, partial sums and the range of weights. CUDA rounds each tensor up to 512 bytes.
    assert cost <= 4 * (2 * 4 + 2 * 4 * tiles + 2) + (3 * 512 if x.is_cuda else 0)
    gradients, cost = allocated(lambda: module._backward(*sums, *problem, True, True))
    assert cost == sum(gradient.nbytes for gradient in gradients)


@pytest.mark.skipif(module._C is None, reason="csrc is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_on_a_cpu_is_computed_in_float32(layout: str) -> None:
    """Bits as of a float32 call whose gradients are rounded once; saved tensors stay float16."""
    shape, cpu = (3, 5, 16, 17), torch.device("cpu")
    x, target = (
        LAYOUTS[layout](random(shape, torch.float16, cpu, i)).requires_grad_() for i in range(2)
    )
    mask, weight = broadcast("pixel", shape, cpu, 2), broadcast("channel", shape, cpu, 3)
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


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_C", None)
    cpu = torch.device("cpu")
    for dtype in DTYPES:
        x, target = (random((2, 3, 4, 5), dtype, cpu, i) for i in range(2))
        assert_matches(
            LAYOUTS["channels_last"](x), target, mask=broadcast("pixel", (2, 3, 4, 5), cpu, 0)
        )
