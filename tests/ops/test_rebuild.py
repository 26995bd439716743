"""The two operators of a reversible backward pass, compared with their references in float64."""

import math
import os

import pytest
import torch
from cases import LONG_SHAPES, SCALES, SHAPES, growth, layouts_of, normal
from torch import Tensor

from benchmarks.harness.inputs import params_shape, rotation
from mflow_kernels.ops.channel_products import weight_gradient_splits
from mflow_kernels.ops.compiler import tl
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.ops.rebuild_conv1x1 import (
    MOST_SLICED,
    Halves,
    RebuiltConv1x1,
    rebuild_conv1x1,
    rebuild_conv1x1_ref,
    rebuild_splits,
)
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling, rebuild_coupling_ref
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close

FLOATS = [torch.float32, torch.float64]
# Each kernel of the 1x1 convolution, with odd numbers of channels too.
CONV1X1_SHAPES = [(2, 5), (1, 2, 1, 1), (2, 12, 5, 7), (1, 16, 4, 4), (1, 32, 4, 4), (2, 7, 20, 13)]
CONV1X1_SHAPES += [(1, 33, 3, 3), (1, 70, 3, 3), (2, 96, 4, 5), (1, 130, 3, 3), (0, 4, 2)]
CONV1X1_SHAPES += [shape for shape in LONG_SHAPES if shape[1] <= 130]


TANH = ScaleFunction("tanh")
COUPLINGS = [
    *(((2, 7, 5, 6), "channels_last", scale) for scale in SCALES),
    *((shape, layout, TANH) for shape in SHAPES + LONG_SHAPES for layout in layouts_of(shape)),
    ((0, 4, 2), "contiguous", TANH),
]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("shape", "layout", "scale"), COUPLINGS, ids=str)
def test_rebuilt_coupling(device, shape, layout, scale, inverse, stored):
    if KERNELS_ON_CPU and scale is TANH and (inverse or stored):
        pytest.skip("the other scale functions are tested so")
    for dtype in FLOATS[: 2 if layout == "channels_last" else 1]:
        how = {"dtype": dtype, "device": device, "layout": layout}
        z, dz, y = (normal(*shape, **how)[:, shape[1] // 2 :] for _ in range(3))
        given = {
            "z_b": z,
            "dz_b": dz,
            "dlogdet": normal(shape[0], dtype=dtype, device=device),
            "params": normal(*params_shape(shape), **how),
            **({"true_b": y} if stored else {}),
        }
        got = rebuild_coupling(**given, scale=scale, inverse=inverse)
        exact = {name: t.double() for name, t in given.items()}
        want = rebuild_coupling_ref(**exact, scale=scale, inverse=inverse)
        for name, a, b in zip(want._fields, got, want, strict=True):
            size = growth(given["params"], scale) * b.abs().max().item() if b.numel() else 1.0
            assert_close(a, b, scale=size, name=name)
            assert (a.shape, a.dtype) == (b.shape, dtype)


@pytest.mark.parametrize("separate_halves", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", CONV1X1_SHAPES, ids=str)
def test_rebuilt_conv1x1(device, shape, layout, separate_halves):
    if layout not in layouts_of(shape):
        pytest.skip("only images have this layout")
    single, double = FLOATS
    for dtype, net_dtype in ((single, torch.bfloat16), (single, None), (double, double)):
        check_rebuilt_conv1x1(shape, layout, separate_halves, dtype, net_dtype, device)
        if KERNELS_ON_CPU and math.prod(shape) > 300:
            break  # each further run would take seconds


def check_rebuilt_conv1x1(
    shape: tuple[int, ...],
    layout: str,
    separate_halves: bool,
    dtype: torch.dtype,
    net_dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Without a dtype, neither does a network read x, nor did one read y and return a gradient."""
    n, c, *spatial = shape
    c_a = c // 2
    how = {"dtype": dtype, "device": device}

    def halves() -> Halves:
        state = normal(*shape, layout=layout, **how)
        # One half is a view and the other its own tensor, as in the reversible backward pass.
        return state[:, :c_a], state[:, c_a:].clone()

    y, dy = halves(), halves()
    dnet = normal(n, c_a, *spatial, layout=layout, **how) if net_dtype else None
    weight = rotation(c, dtype).to(device)
    given = {"weight": weight, "weight_inverse": torch.linalg.inv(weight.double()).to(dtype)}
    given["bias"] = normal(c, **how)
    options = {"net_dtype": net_dtype, "channels_last": layout == "channels_last"}
    splits = rebuild_splits(y[1], c)

    def run() -> RebuiltConv1x1:
        sums = {"outer_sum": y[1].new_full((splits, c, c), torch.nan)}
        sums["dbias"] = y[1].new_full((splits, c), torch.nan)
        return rebuild_conv1x1(
            y, dy, dnet, **given, **options, separate_halves=separate_halves, **sums
        )

    got = run()
    exact = [tuple(t.double() for t in pair) for pair in (y, dy)]
    wide = {name: t.double() for name, t in given.items()}
    exact_dnet = None if dnet is None else dnet.double()
    want = rebuild_conv1x1_ref(*exact, exact_dnet, **wide, **options)
    for name, a, b in (("x", got.x, want.x), ("dx", got.dx, want.dx)):
        for half, half_wanted in zip(a, b, strict=True):
            assert_close(half, half_wanted, terms=c, name=name)
    if net_dtype is None:
        assert got.net is None
    else:
        assert_close(got.net, want.net, terms=c, name="net")
    columns = max(1, n * pixels(y[0]))
    largest = max((t.abs().max().item() for t in want.dx if t.numel()), default=1.0)
    for name in ("outer_sum", "dbias"):
        a, b = getattr(got, name).sum(0), getattr(want, name).sum(0)
        assert_close(a, b, terms=columns, scale=math.sqrt(columns) * largest**2, name=name)
    form = torch.channels_last if options["channels_last"] else torch.contiguous_format
    whole = got.whole if got.whole is not None else (*got.x, *got.dx)
    assert all(t.is_contiguous(memory_format=form) for t in whole)
    for a, b in zip(tensors(got), tensors(run()), strict=True):
        assert torch.equal(a, b)


def tensors(made: RebuiltConv1x1) -> list[Tensor]:
    net = [] if made.net is None else [made.net]
    return [*made.x, *made.dx, *net, made.outer_sum, made.dbias]


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
    shape, dtype = (1, channels, 3, 3), torch.float32
    check_rebuilt_conv1x1(shape, "channels_last", True, dtype, torch.bfloat16, kernel_device)
    assert asked


@pytest.mark.parametrize("splits", [rebuild_splits, lambda half, c: weight_gradient_splits(half)])
@pytest.mark.parametrize(("c", "side"), [(12, 128), (48, 16), (96, 16), (192, 8), (384, 4)])
def test_partial_sums_are_no_larger_than_the_state(monkeypatch, splits, c, side):
    """There is at least one partial sum. If there are more, together they have at most as many
    values as the state."""
    for module in ("rebuild_conv1x1", "channel_products"):
        monkeypatch.setattr(f"mflow_kernels.ops.{module}.uses_triton", lambda x: True)
    state = torch.empty(16, c, side, side, device="meta")
    count = splits(state, c)
    assert count >= 1
    assert count == 1 or count * c * c <= state.numel()
    assert count > 1 or 2 * c * c > state.numel()  # one only if two do not fit
