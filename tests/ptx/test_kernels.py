"""Compiled Triton kernels on the machine: their results, and bugs planted in their PTX."""

import os
import re
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from mflow_kernels import ops
from mflow_kernels.ops import launch
from mflow_kernels.ops.channel_products import FENCES_COPIES
from ptx.launch import Device, Violation, installed
from ptx.report import Report

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)

ARCHS = ["sm_80", "sm_90"]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A machine that records faults instead of raising them."""
    monkeypatch.setattr(launch, "KERNELS_ON_CPU", True)
    with installed(Device(getattr(request, "param", "sm_80"), raises=False)) as device:
        yield device


archs = pytest.mark.parametrize("device", ARCHS, indirect=True)


def last(device: Device) -> Report:
    return device.launches[-1].report


@triton.jit
def _add_kernel(x, y, z, SIZE, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(x + i, mask=i < SIZE) + tl.load(y + i, mask=i < SIZE), mask=i < SIZE)


@triton.jit
def _strided_kernel(x, strides, scale, y, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE), tl.arange(0, SIZE)
    at = x + i[:, None] * strides[0] + j[None, :] * strides[1]
    tl.store(y + i[:, None] * SIZE + j[None, :], tl.load(at) * scale)


@triton.jit
def _dot_kernel(a, b, c, s, TILES, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                PRECISION: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """C = A B^T over tiles of K columns, and the sum of A's columns if SUM."""
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    dtype = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    acc, total = tl.zeros([M, N], dtype), tl.zeros([M, K], dtype)
    for t in range(0, TILES):
        a_t = tl.load(a + i[:, None] * (TILES * K) + t * K + k[None, :])
        b_t = tl.load(b + j[None, :] * (TILES * K) + t * K + k[:, None])
        acc = tl.dot(a_t, b_t, acc, input_precision=PRECISION, out_dtype=dtype)
        if SUM:
            total += a_t
    tl.store(c + i[:, None] * N + j[None, :], acc)
    if SUM:
        tl.store(s + i, tl.sum(total, axis=1))


def test_tuples_floats_and_constants_are_bound_as_triton_binds_them(device: Device) -> None:
    x, y = torch.randn(16, 32).t(), torch.empty(16, 16)
    for strides in ((1, 32), (2, 32)):  # Triton makes a constant of 1
        view = x[:: strides[0]][:16]
        _strided_kernel[(1,)](view, strides, 0.5, y, SIZE=16)
        assert torch.equal(y, 0.5 * view[:, :16])
        assert not last(device).faults


def dot(
    device: Device, dtype: torch.dtype, m: int, n: int, stages: int, total: bool = False
) -> tuple[bool, Report]:
    """Whether a product of small integers is exact, and the launch's report."""
    tiles, k = 6, 32
    a, b = (torch.randint(-8, 9, (s, k * tiles)).to(dtype) for s in (m, n))
    out = torch.float64 if dtype == torch.float64 else torch.float32
    c, s = torch.empty(m, n, dtype=out), torch.empty(m, dtype=out)
    precision = "tf32" if dtype == torch.float32 else "ieee"
    _dot_kernel[(1,)](
        a, b, c, s, tiles, M=m, N=n, K=k, PRECISION=precision, SUM=total, num_stages=stages
    )
    return torch.equal(c.double(), a.double() @ b.double().t()), last(device)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (64, 64)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@archs
def test_products_of_tensor_cores_are_exact(
    device: Device, dtype: torch.dtype, m: int, n: int
) -> None:
    # Before Triton 3.7.1 a pipelined loop lacks a fence (docs/results.md).
    exact, report = dot(device, dtype, m, n, stages=3 if FENCES_COPIES else 1)
    assert exact
    assert not report.faults, report.faults
    asynchronous = any(op.startswith("wgmma.mma") for op in report.instructions)
    assert asynchronous == (device.arch == "sm_90" and m == 64 and dtype != torch.float64)
    assert any("mma" in op for op in report.instructions)


def test_a_race_that_triton_compiles(device: Device) -> None:
    """A tf32 product on sm_90 whose operand is also summed has a single buffer. The next tile is
    copied there while the product may still read it, and a late product reads the wrong tile. The
    machine must report the race even if the result is right."""
    device.arch = "sm_90"
    exact, report = dot(device, torch.float32, 64, 64, stages=2, total=True)
    if not report.faults:
        pytest.skip("this Triton compiles no such race")
    assert exact
    assert report.kinds == {"race"}
    # Before 3.7.1 the product also reads the copy without a proxy fence.
    assert ("may still read" if FENCES_COPIES else "no proxy fence") in str(report.faults[0])
    device.late = True
    exact, report = dot(device, torch.float32, 64, 64, stages=2, total=True)
    assert not exact


@pytest.mark.parametrize(
    ("device", "channels", "side", "pattern", "new", "kind", "least"),
    [
        ("sm_80", 12, 10, r"bar\.sync", "membar.cta; //", "race", 1.0),
        ("sm_80", 12, 10, r"@%p\d+ (st\.global)", r"\1", "out of bounds", 0.01),
        ("sm_90", 48, 8, r"fence\.proxy\.async[\w.:]*", "membar.cta", "race", 0.01),
        ("sm_90", 48, 8, r"wgmma\.wait_group[\w.:]* 0", "membar.cta", "race", 0.01),
    ],
    indirect=["device"],
    ids=["barrier", "mask", "fence", "wait"],
)
def test_a_planted_bug_is_reported(
    device: Device, channels: int, side: int, pattern: str, new: str, kind: str, least: float
) -> None:
    """Each match of `pattern` is replaced by `new` in a launch; `least` is the least fraction of
    these launches that must report a fault of `kind`."""
    x, w = torch.randn(2, channels, side, side), torch.randn(channels, channels)
    want = torch.einsum("oc,nchw->nohw", w.double(), x.double())
    assert (ops.conv1x1(x, w).double() - want).abs().max() < 1e-4
    assert not last(device).faults
    text = device.ptx
    reported = []
    for found in re.finditer(pattern, text):
        edited = text[: found.start()] + found.expand(new) + text[found.end() :]
        device.edit = lambda _, edited=edited: edited
        ops.conv1x1(x, w)
        reported.append(kind in last(device).kinds)
    assert reported, f"the kernel has no {pattern}"
    assert sum(reported) / len(reported) >= least


def test_a_violation_names_kernel_argument_and_thread(device: Device) -> None:
    device.raises = True
    x, y, z = torch.randn(100), torch.randn(100), torch.randn(99)
    with pytest.raises(Violation) as raised:
        _add_kernel[(1,)](x, y, z, 100, BLOCK=128)
    reports = str(raised.value)
    assert "_add_kernel, compiled for sm_80, on a grid of (1, 1, 1)" in reports
    assert "out of bounds: block 0 thread 99: 4 bytes at 0x18c past the 396 bytes of z" in reports
    assert re.search(r"st\.global\.b32 .* at test_kernels\.py:\d+", reports)


def test_an_access_outside_a_view_is_a_fault(device: Device) -> None:
    whole = torch.randn(2, 128)
    x, z = whole[0], torch.zeros(256)
    _add_kernel[(1,)](x, z, z, 256, BLOCK=256)
    assert "but outside its view" in str(last(device).faults[0])
