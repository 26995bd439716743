"""`rebuild_conv1x1` against its reference in float64, and dW from outer_sum."""

import math
import os
from collections.abc import Callable

import pytest
import torch
from cases import LAYOUTS, normal
from torch import Tensor

from benchmarks.harness.table import rotation
from mflow_kernels.ops.channel_products import weight_gradient_splits
from mflow_kernels.ops.compiler import tl
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.ops.rebuild_conv1x1 import (
    MOST_SLICED,
    Halves,
    RebuiltConv1x1,
    launch_rebuild_conv1x1,
    rebuild_conv1x1_ref,
    rebuild_splits,
)
from mflow_kernels.testing import assert_close

SHAPES = [
    (2, 5),
    (1, 2, 1, 1),
    (2, 12, 5, 7),
    (1, 16, 4, 4),
    (1, 32, 4, 4),
    (2, 7, 20, 13),
    (1, 33, 3, 3),
    (1, 70, 3, 3),
    (2, 96, 4, 5),
    (1, 130, 3, 3),
]


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("separate_halves", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rebuilt_conv1x1_matches_the_reference(
    kernel_device: torch.device, shape: tuple[int, ...], layout: str, separate_halves: bool
) -> None:
    n, c, *spatial = shape
    if layout == "channels_last" and len(spatial) != 2:
        layout = "contiguous"
    c_a = c // 2

    def halves() -> Halves:
        state = normal(*shape, device=kernel_device, layout=layout)
        # One half is a view and the other its own tensor, as in the reversible backward pass.
        return state[:, :c_a], state[:, c_a:].clone()

    y, dy = halves(), halves()
    dnet = LAYOUTS[layout](normal(n, c_a, *spatial, device=kernel_device))
    weight = rotation(c).to(kernel_device)
    inverse = torch.linalg.inv(weight.double()).float()
    bias = normal(c, device=kernel_device)
    dtype = torch.bfloat16
    last = layout == "channels_last"
    splits = rebuild_splits(y[1], c)

    def run(separate_halves: bool) -> RebuiltConv1x1:
        sums = [y[1].new_full(size, torch.nan) for size in ((splits, c, c), (splits, c))]
        return launch_rebuild_conv1x1(
            y, dy, dnet, weight, inverse, bias, dtype, last, separate_halves, *sums
        )

    got = run(separate_halves)
    want = rebuild_conv1x1_ref(
        tuple(doubled(*y)),
        tuple(doubled(*dy)),
        dnet.double(),  # type: ignore[arg-type]
        weight.double(),
        inverse.double(),
        bias.double(),
        dtype,
        last,
    )
    for name, a, b in (("x", got.x, want.x), ("dx", got.dx, want.dx)):
        for half, half_wanted in zip(a, b, strict=True):
            assert_close(half, half_wanted, terms=c, name=name)
    assert_close(got.net, want.net, terms=c, name="net")
    columns = n * pixels(y[0])
    magnitude = math.sqrt(columns) * max(t.abs().max().item() for t in want.dx) ** 2
    assert_close(
        got.outer_sum.sum(0),
        want.outer_sum.sum(0),
        terms=columns,
        scale=magnitude,
        name="outer_sum",
    )
    assert_close(got.dbias.sum(0), want.dbias.sum(0), terms=columns, scale=magnitude, name="dbias")
    form = torch.channels_last if last else torch.contiguous_format
    if got.whole is None:
        assert all(t.is_contiguous(memory_format=form) for t in (*got.dx, *got.x))
    else:
        assert got.whole[1].is_contiguous(memory_format=form)
        assert got.dx[1].data_ptr() == got.whole[1][:, c_a:].data_ptr()
    again = run(separate_halves)
    for a, b in zip(results(got), results(again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="a compiled kernel has the order of its own architecture",
)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("channels", [24, *([70] if MOST_SLICED >= 70 else [])])
def test_the_order_of_products_of_each_architecture(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, channels: int, capability: int
) -> None:
    asked = []

    def cuda_capability_geq(major: int, minor: int = 0) -> bool:
        asked.append(major)
        return capability >= 10 * major + minor

    monkeypatch.setattr(tl.target_info, "cuda_capability_geq", cuda_capability_geq)
    test_rebuilt_conv1x1_matches_the_reference(
        kernel_device, (1, channels, 3, 3), "channels_last", True
    )
    assert asked


def results(made: RebuiltConv1x1) -> list[Tensor]:
    assert made.net is not None
    return [*made.x, *made.dx, made.net, made.outer_sum, made.dbias]


@pytest.mark.parametrize("splits", [rebuild_splits, lambda half, c: weight_gradient_splits(half)])
@pytest.mark.parametrize(("c", "side"), [(12, 128), (48, 16), (96, 16), (192, 8), (384, 4)])
def test_partial_sums_are_no_larger_than_the_state(
    monkeypatch: pytest.MonkeyPatch, splits: Callable[[Tensor, int], int], c: int, side: int
) -> None:
    """There is at least one partial sum. If there are more, together they have at most as many
    values as the state."""
    for module in ("rebuild_conv1x1", "channel_products"):
        monkeypatch.setattr(f"mflow_kernels.ops.{module}.uses_triton", lambda x: True)
    state = torch.empty(16, c, side, side, device="meta")
    count = splits(state, c)
    assert count >= 1
    assert count == 1 or count * c * c <= state.numel()
    assert count > 1 or 2 * c * c > state.numel()  # one only if two do not fit


def test_outer_sum_recovers_the_gradient_of_the_weight() -> None:
    """dW = outer_sum W^-T, up to rounding in float64, although outer_sum is computed from y."""
    x = normal(2, 6, 3, 4, dtype=torch.float64)
    weight, bias = rotation(6, torch.float64), normal(6, dtype=torch.float64)
    weight.requires_grad_()
    y = torch.einsum("oc,nchw->nohw", weight, x) + bias.view(-1, 1, 1)
    dy = normal(2, 6, 3, 4, dtype=torch.float64)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    y, weight = y.detach(), weight.detach()
    inverse = torch.linalg.inv(weight)
    outer_sum = rebuild_conv1x1_ref(
        (y[:, :3], y[:, 3:]), (dy[:, :3], dy[:, 3:]), None, weight, inverse, bias, None, False
    ).outer_sum[0]
    assert_close(outer_sum @ inverse.mT, dweight, terms=24 * 6)
