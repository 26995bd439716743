"""Strides, tiles, and the layouts that need no copy."""

import inspect
from itertools import product

import pytest
import torch
from cases import (
    DIFFERENTIABLE,
    FLOW_OPERATORS,
    IMAGES,
    IN_PLACE,
    LAYOUTS,
    launched,
    normal,
    not_about_kernels,
    sample,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness.inputs import Draw
from mflow_kernels.ops import channel_products, coupling_network_launches
from mflow_kernels.ops.actnorm import _actnorm_bwd_kernel
from mflow_kernels.ops.addresses import strided
from mflow_kernels.ops.compiler import GLUON, tl
from mflow_kernels.ops.coupling_conv1x1 import launch_coupling_conv1x1_backward
from mflow_kernels.ops.coupling_kernels import _coupling_fwd_kernel
from mflow_kernels.ops.coupling_network_kernels import _network_kernel
from mflow_kernels.ops.layouts import dense_pixels, flow_state, in_layout_of, pixels, strides
from mflow_kernels.ops.logdet import _accumulate_kernel
from mflow_kernels.ops.rebuild_conv1x1 import rebuild_conv1x1
from mflow_kernels.ops.rebuild_conv1x1_kernels import (
    _rebuild_conv1x1_kernel,
    _rebuild_conv1x1_wide_kernel,
)
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.tiles import tile_columns
from mflow_kernels.ops.written import written_arguments


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *product(IMAGES, IN_PLACE),
        *product([(3, 4), (2, 3, 5), (2, 3, 2, 2, 3), (1, 4, 1, 1)], ["contiguous"]),
    ],
    ids=str,
)
def test_layouts_of_models_are_read_in_place(shape, layout):
    x = normal(*shape, layout=layout)
    assert dense_pixels(x) is x
    assert flow_state("x", x) is x
    size = (*shape[:2], pixels(x))
    walked = torch.as_strided(x, size, strides(x.shape, x.stride()), x.storage_offset())
    assert torch.equal(walked, x.reshape(size))


def test_other_layouts_are_copied():
    x = normal(2, 3, 5, 6, layout="transposed")
    assert not x.is_contiguous()
    assert dense_pixels(x).is_contiguous()
    assert torch.equal(dense_pixels(x), x)
    every_second = normal(2, 3, 5, 6)[..., ::2]
    assert dense_pixels(every_second) is every_second  # one stride, of 2, walks all its pixels
    cropped = normal(2, 3, 5, 6)[..., 1:5]
    assert dense_pixels(cropped).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_layout_of(layout):
    x = normal(2, 3, 5, 6, layout=layout)
    y = in_layout_of(x, normal(2, 3, 5, 6, layout="channels_last"))
    assert y.stride() == torch.empty_like(x).stride()
    fitting = torch.empty_like(x)
    assert in_layout_of(x, fitting) is fitting


def test_strides_say_what_a_kernel_may_know_when_it_is_compiled():
    """Kernels know the stride of 1 and a divisor of the others, at any batch and image size."""

    def strides_of(*shape, layout=torch.contiguous_format):
        _, n, c, p, unit = strided(torch.empty(shape).to(memory_format=layout))
        return n, c, p, unit.value

    last = torch.channels_last
    assert strides_of(2, 12, 8, 8) == (768, 64, None, 8)
    assert strides_of(2, 12, 6, 6) == (432, 36, None, 4)
    assert strides_of(2, 12, 7, 7) == (588, 49, None, 1)
    assert strides_of(2, 12, 7, 7, layout=last) == (588, None, 12, 4)
    assert strides_of(7, 12, 6, 6, layout=last) == (432, None, 12, 4)
    assert strides_of(2, 6) == (6, None, None, 2)
    assert strided(None) == (None,)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(1, 2, 2**15, 2**15 + 1, device="meta"),
        torch.empty(1, device="meta").as_strided((1, 2, 3), (1, 2**31, 1)),
        torch.empty(1, device="meta").as_strided((1, 2, 3), (1, 1, 2**30)),
    ],
    ids=["size", "channels", "pixels"],
)
def test_offsets_within_a_sample_fit_in_32_bits(x):
    with pytest.raises(
        ValueError, match=r"^state: .*span at most 2\^31 elements, got one of shape \(2, "
    ):
        strided(x)
    strided(x[:, :, :1, :1] if x.dim() == 4 else x[:, :1, :2])


def test_a_sample_that_is_too_large_is_named():
    x = torch.empty(1, 2, 2**15, 2**15 + 1, device="meta")
    with pytest.raises(ValueError, match=r"^params: expected samples that span at most 2\^31"):
        flow_state("params", x)
    flow_state("params", torch.empty(9, 2, 2**14, 2**14, device="meta"))  # only the batch is large


def test_the_number_of_a_column_fits_in_32_bits():
    """Tiles that run across samples number the columns of all samples."""
    assert tile_columns(2**31 - 64, 1, 64).programs == 2**25 - 1
    for n, p in ((2**31 - 63, 1), (2**28, 8)):
        with pytest.raises(ValueError, match=rf"^x: .* got {n} samples of {p} pixels"):
            tile_columns(n, p, 64)
    assert tile_columns(2**26, 64, 64).programs == 2**26  # a tile for each sample


@not_about_kernels
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", FLOW_OPERATORS.values(), ids=lambda op: op.id)
def test_fake_tensors_are_launched_nowhere(monkeypatch, op, device):
    """Operators on fake tensors give the shape and layout of every result, even without a GPU."""

    drawn = sample(op, (4, 12, 32, 32), layout="channels_last").values()
    inputs = [t if t.dim() == 4 else t.contiguous() for t in drawn]  # a copy on CUDA needs a GPU
    real = op.call(*inputs)
    refuse_cuda(monkeypatch)
    with FakeTensorMode():
        how = [{"size": t.shape, "stride": t.stride(), "dtype": t.dtype} for t in inputs]
        fake = op.call(*(torch.empty_strided(**given, device=device) for given in how))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, device)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rebuilding_fake_tensors_launches_nothing(monkeypatch, device):
    refuse_cuda(monkeypatch)
    with FakeTensorMode():
        half = torch.empty(4, 6, 8, 8, device=device).to(memory_format=torch.channels_last)
        params = torch.empty(4, 12, 8, 8, device=device).to(memory_format=torch.channels_last)
        dlogdet, bias = torch.empty(4, device=device), torch.empty(12, device=device)
        weight = torch.empty(12, 12, device=device)
        b = rebuild_coupling(half, half, dlogdet, params, scale=ScaleFunction(), inverse=False)
        found = rebuild_conv1x1(
            y=(half, b.y_b),
            dy=(half, b.dy_b),
            dnet=None,
            weight=weight,
            weight_inverse=weight,
            bias=bias,
            net_dtype=None,
            channels_last=True,
            separate_halves=True,
            outer_sum=torch.empty(1, 12, 12, device=device),
            dbias=torch.empty(1, 12, device=device),
        )
    for y in (*found.x, *found.dx):
        assert (y.shape, y.device, y.stride(1)) == (half.shape, half.device, 1)
    assert (b.dparams.shape, b.dparams.stride()) == (params.shape, params.stride())


def launch_a_network(x, weight, precision):
    """Its precision is always that of bfloat16."""
    drawn = DIFFERENTIABLE["coupling_network"].draw(Draw((1, 4, 3, 3), width=16))
    x, w1, b1, w2, b2, w3, b3 = (t.detach().bfloat16() for t in drawn.values())
    packed = coupling_network_launches.pack(x, w1, w2, w3)
    coupling_network_launches.launch_network(x, packed, b1, b2, b3, True)


PRODUCTS = {
    "_conv1x1_kernel": lambda x, w, how: channel_products.launch_conv1x1(x, w[0], None, how),
    "_coupling_conv1x1_bwd_kernel": lambda x, w, how: launch_coupling_conv1x1_backward(
        x, None, x[:, :1, 0, 0], x, x, w, how, ScaleFunction("tanh"), False
    ),
    "_weight_gradient_kernel": lambda x, w, how: channel_products.launch_weight_gradient(
        x, None, x, w, how
    ),
    "_network_kernel": launch_a_network,
}


@pytest.mark.parametrize(
    ("kernel", "precision", "stages"),
    [
        *(("_conv1x1_kernel", "tf32", 1), ("_conv1x1_kernel", "tf32x3", 3)),
        *(
            ("_coupling_conv1x1_bwd_kernel", "tf32", 1),
            ("_coupling_conv1x1_bwd_kernel", "tf32x3", 3),
        ),
        *(("_weight_gradient_kernel", "tf32", 1), ("_weight_gradient_kernel", "tf32x3", 2)),
        ("_network_kernel", "bfloat16", 1),
    ],
)
def test_loops_that_would_race_are_not_pipelined(monkeypatch, kernel, precision, stages):
    """Before Triton 3.7.1 an asynchronous product may read a copy before it has arrived. In every
    version, a second stage overwrites dy while the product of dW reads it (PTX shows the race)."""
    seen = []
    for module in (channel_products, coupling_network_launches):
        seen.append(launched(module, monkeypatch))
        monkeypatch.setattr(module, "FENCES_COPIES", False)
    # 128 channels take four turns of the loop, so that a pipeline has all its stages.
    PRODUCTS[kernel](torch.ones(2, 128, 2, 2), torch.ones(1, 128, 128), precision)
    assert (seen[0] | seen[1])[kernel]["num_stages"] == stages


def refuse_cuda(monkeypatch):
    for name in ("current_device", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("asked CUDA"))


def test_written_arguments_are_those_that_a_kernel_stores_to():
    """Directly, by a computed address, in a helper, and in a helper of a helper."""
    expected = {
        _accumulate_kernel: "logdet",
        _actnorm_bwd_kernel: "dx partials",
        _coupling_fwd_kernel: "y ledger",
        _network_kernel: "row_sums h1 h2",
        _rebuild_conv1x1_kernel: "x_a x_b dx_a dx_b net outer_sum dbias",
        _rebuild_conv1x1_wide_kernel: "x dx net outer_sum dbias",
    }
    if GLUON:
        from mflow_kernels.ops.coupling_network_hopper import _hopper_network_kernel
        from mflow_kernels.ops.coupling_network_hopper_backward import (
            _hopper_dh1_kernel,
            _hopper_dh2_kernel,
        )

        expected[_hopper_network_kernel] = "row_sums h1 h2"
        expected[_hopper_dh1_kernel] = "dx_taps dw2 dw1 db1"
        expected[_hopper_dh2_kernel] = "dh2 dw3 db3 db2"
    for kernel, names in expected.items():
        function = getattr(kernel, "fn", kernel)
        parameters = inspect.signature(function).parameters
        written = [
            name
            for name, is_written in zip(parameters, written_arguments(kernel), strict=True)
            if is_written and not (name.isupper() or parameters[name].annotation is tl.constexpr)
        ]
        assert written == names.split(), function.__name__
