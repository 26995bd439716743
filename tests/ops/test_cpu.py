"""The CPU loops against the references in float64, called as the operators call them."""

import math
import os
import shlex
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS, SHAPES, normal
from torch import Tensor

from benchmarks.harness.table import params_shape, rotation
from mflow_kernels import ops
from mflow_kernels.ops import cpu
from mflow_kernels.ops.conv1x1 import (
    add_to_first_half,
    conv1x1_backward_ref,
    conv1x1_eager,
    conv1x1_ref,
)
from mflow_kernels.ops.coupling import affine_coupling_ref, coupling_backward_ref, coupling_eager
from mflow_kernels.ops.coupling_conv1x1 import coupling_conv1x1_backward, coupling_conv1x1_ref
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.layouts import dense_pixels
from mflow_kernels.ops.rebuild_conv1x1 import empty_state, rebuild_conv1x1_ref
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling_ref
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close

if cpu._C is None:
    pytest.skip("csrc is not built", allow_module_level=True)
if KERNELS_ON_CPU:
    pytest.skip("the loops launch no Triton kernel", allow_module_level=True)

FLOATS = [torch.float32, torch.float64]
# Further shapes: vectors and rows longer than a tile of 1,024 elements and not a multiple of it;
# rows of few channels; more channels than a tile.
MORE = [(700, 3), (2, 4, 1100), (1, 2, 40, 30), (2, 17, 9, 8), (2, 2101), (1, 2101, 2), (0, 4, 2)]
# The default scale bounds s and 1 / s by e, so a rounding error grows at most by this factor.
GROWTH = math.e


def layouts(shape: tuple[int, ...]) -> list[str]:
    return list(LAYOUTS) if len(shape) == 4 else ["contiguous"]


CASES = [(shape, layout) for shape in SHAPES + MORE for layout in layouts(shape)]


def exact(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def sample(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """A state, its params, a gradient of the state and a gradient of the log-determinants."""
    state, dstate = (normal(*shape, dtype=dtype, layout=layout) for _ in range(2))
    params = normal(*params_shape(shape), dtype=dtype, layout=layout)
    return state, params, dstate, normal(shape[0], dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_couple(shape, layout, inverse, dtype):
    scale = ScaleFunction("tanh")
    x, params, dy, dlogdet = sample(shape, layout, dtype)
    y, ledger = cpu.couple(x, params, scale, inverse)
    want, sums = affine_coupling_ref(*exact(x, params), scale, inverse)
    assert_close(y, want, scale=GROWTH, name="y")
    assert_close(ledger, sums, terms=x[:1].numel(), scale=1.0, name="ledger")
    assert y.dtype == ledger.dtype == dtype
    got = cpu.couple_backward(dy, dlogdet, x, params, scale, inverse)
    wants = coupling_backward_ref(*exact(dy, dlogdet[:, None], x, params), scale, inverse)
    for name, a, b in zip(("dx", "dparams"), got, wants, strict=True):
        assert_close(a, b, scale=GROWTH, name=name)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_rebuild_coupling(shape, layout, inverse, stored):
    scale = ScaleFunction("tanh")
    z, params, dz, dlogdet = sample(shape, layout)
    c_a = shape[1] // 2
    given = z[:, c_a:], dz[:, c_a:], dlogdet, params
    true = (dz[:, c_a:].sin(),) if stored else ()
    got = cpu.rebuild_coupling(*given, scale, inverse, *true)
    want = rebuild_coupling_ref(*exact(*given), scale, inverse, *exact(*true))
    for name, a, b in zip(want._fields, got, want, strict=True):
        size = b.abs().max().item() if b.numel() else 1.0
        assert_close(a, b, scale=GROWTH * size, name=name)
        assert a.shape == b.shape


CONV1X1_CASES = [c for c in CASES if c[0][1] <= cpu.CONV1X1_MAX_CHANNELS] + [
    ((2, 1, 5, 4), "contiguous")
]


def assert_sums(got: Tensor, want: Tensor, terms: int, name: str) -> None:
    """Compare sums of `terms` products of order one, which a coupling may have scaled."""
    assert_close(got, want, terms=terms, scale=GROWTH * terms**0.5, name=name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("net_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "layout"), CONV1X1_CASES, ids=str)
def test_conv1x1(shape, layout, net_dtype, dtype):
    c = shape[1]
    scale = ScaleFunction("tanh")
    x, params, *_ = sample(shape, layout, dtype)
    weight, bias = rotation(c, dtype=dtype)[None], normal(1, c, dtype=dtype)
    x = dense_pixels(x)
    y, net, ledger = cpu.conv1x1(x, weight, bias, net_dtype)
    want = conv1x1_ref(x.double(), weight[0].double(), bias[0].double())
    assert_sums(y, want, c, "y")
    assert y.stride() == torch.empty_like(x).stride()
    assert not len(ledger)
    if net_dtype is not None:
        assert torch.equal(net, y[:, : c // 2].to(net_dtype))
    if c < 2:
        return
    for inverse in (False, True):
        y, net, ledger = cpu.conv1x1(x, weight, bias, net_dtype, params, scale, inverse)
        want, sums = coupling_conv1x1_ref(*exact(x, params, weight[0], bias[0]), scale, inverse)
        assert_sums(y, want, c, "y")
        assert_close(ledger, sums, terms=x[:1].numel(), scale=1.0, name="ledger")
        assert y.dtype == ledger.dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("shape", "layout"), [c for c in CONV1X1_CASES if c[0][1] > 1], ids=str)
def test_coupling_conv1x1_backward(shape, layout, bare, inverse, dtype):
    n, c, *spatial = shape
    scale = ScaleFunction("tanh")
    x, params, dy, dlogdet = sample(shape, layout, dtype)
    dnet = None if bare else normal(n, c // 2, *spatial, dtype=dtype)
    weight = rotation(c, dtype=dtype)[None]
    x, params = dense_pixels(x), dense_pixels(params)
    got = cpu.coupling_conv1x1_backward(
        dy, dnet, dlogdet[:, None], x, params, weight, scale, inverse
    )
    x, params, dy, dlogdet, weight = exact(x, params, dy, dlogdet, weight)
    z, _ = affine_coupling_ref(x, params, scale, inverse)
    dy = add_to_first_half(dy, None if dnet is None else dnet.double())
    dz, dweight, dbias = conv1x1_backward_ref(dy, z, weight[0])
    wants = (
        *coupling_backward_ref(dz, dlogdet[:, None], x, params, scale, inverse),
        dweight[None],
        dbias[None],
    )
    columns = max(1, x.numel() // c)
    for name, a, b in zip(("dx", "dparams", "dweight", "dbias"), got, wants, strict=True):
        assert_sums(a, b, c if name in ("dx", "dparams") else columns, name)
        assert a.dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rebuild", [True, False])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("shape", "layout"), CONV1X1_CASES, ids=str)
def test_conv1x1_backward(shape, layout, bare, rebuild, dtype):
    n, c, *spatial = shape
    c_a = c // 2
    y, _, dy, _ = sample(shape, layout, dtype)
    dnet = None if bare else normal(n, c_a, *spatial, dtype=dtype)
    # One half is a view and the other its own tensor, as in the reversible backward pass.
    halves = (y[:, :c_a], y[:, c_a:].clone()), (dy[:, :c_a], dy[:, c_a:].clone())
    weight, bias = rotation(c, dtype=dtype), normal(c, dtype=dtype)
    inverse = torch.linalg.inv(weight.double()).to(dtype) if rebuild else None
    dx = empty_state(y, c, "channels_last" in layout)
    sums = cpu.sums(dx, weight[None])
    x, net = cpu.conv1x1_backward(*halves, dnet, weight, inverse, bias, dx, *sums, dtype)
    want = rebuild_conv1x1_ref(
        tuple(exact(*halves[0])), tuple(exact(*halves[1])), None if bare else dnet.double(),
        weight.double(), torch.linalg.inv(weight.double()), bias.double(), None, False,
    )  # fmt: skip
    want_x, want_dx = want.whole
    assert_sums(dx, want_dx, c, "dx")
    assert (x is None) == (not rebuild)
    if x is not None:
        assert_sums(x, want_x, c, "x")
        assert x.stride() == dx.stride()
        assert torch.equal(net, x[:, :c_a])
    for name, a, b in zip(("outer_sum", "dbias"), sums, (want.outer_sum, want.dbias), strict=True):
        assert_sums(a, b, max(1, y.numel() // c), name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_with_any_number_of_threads(layout):
    """The state is large enough for several threads."""
    shape = (3, 6, 320, 160)
    x, params, dy, dlogdet = sample(shape, layout)
    weight, scale = rotation(6)[None], ScaleFunction("tanh")
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = empty_state(x, 6, layout == "channels_last")
            halves = (x[:, :3], x[:, 3:]), (dy[:, :3], dy[:, 3:])
            sums = cpu.sums(out, weight)
            results.append([
                *cpu.couple(x, params, scale, False),
                *cpu.couple_backward(dy, dlogdet, x, params, scale, False),
                *cpu.rebuild_coupling(x[:, 3:], dy[:, 3:], dlogdet, params, scale, False),
                *cpu.conv1x1(x, weight, weight[:, 0], torch.float32, params, scale, False),
                *cpu.coupling_conv1x1_backward(
                    dy, None, dlogdet[:, None], x, params, weight, scale, False
                ),
                *cpu.conv1x1_backward(
                    *halves, None, weight[0], weight[0], weight[0, 0], out, *sums
                ),
                *(out, *sums),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_the_extension_references_stand_in(layout, monkeypatch):
    x, params, dy, dlogdet = sample((2, 6, 5, 4), layout)
    weight, dledger = rotation(6)[None], dlogdet[:, None]
    options = "tf32x3", *ScaleFunction("tanh").args, False

    def everything() -> list[Tensor]:
        y, logdet = ops.coupling_conv1x1(x, params, weight[0])
        z, _ = ops.affine_coupling(x, params)
        backward = coupling_conv1x1_backward(dy, dy[:, :3], dledger, x, params, weight, *options)
        return [y, z, logdet, *backward]

    native = everything()
    monkeypatch.setattr(import_module("mflow_kernels.ops.cpu"), "_C", None)
    assert not cpu.serves(x)
    for a, b in zip(native, everything(), strict=True):
        assert_close(a, b.double(), terms=120, scale=GROWTH)
        assert a.stride() == b.stride()


def test_serves_what_the_loops_can_read():
    assert cpu.serves(normal(2, 4))
    assert not cpu.serves(normal(2, 4, dtype=torch.bfloat16))
    assert not cpu.serves(torch.empty(2, 4, device="meta"))
    seen = []
    torch.func.vmap(lambda x: seen.append(cpu.serves(x)) or x)(normal(2, 4))
    assert seen == [False]


def test_loops_refuse_what_they_would_misread():
    x, params, dy, dlogdet = sample((2, 6, 5, 4), "contiguous")
    scale = ScaleFunction("tanh")
    with pytest.raises(ValueError, match="twice the half's channels"):
        cpu.couple(x, params[:, :4], scale, False)
    with pytest.raises(ValueError, match="one shape"):
        cpu.couple_backward(dy[:1], dlogdet, x, params, scale, False)
    halves, weight = ((x[:, :3], x[:, 3:]),) * 2, rotation(6)
    sums = cpu.sums(x, weight[None])
    with pytest.raises(ValueError, match="one stride for all pixels"):
        cpu.conv1x1_backward(*halves, None, weight, None, None, x.transpose(2, 3), *sums)
    with pytest.raises(ValueError, match="one shape, and halves"):
        cpu.conv1x1_backward(*halves, x, weight, None, None, torch.empty_like(x), *sums)
    with pytest.raises(ValueError, match="weights of the state's channels"):
        cpu.conv1x1(x, weight[None, 1:], normal(1, 6), None)
    with pytest.raises(ValueError, match="weights of the state's dtype"):
        cpu.conv1x1(x, weight[None].double(), normal(1, 6), None)
    with pytest.raises(ValueError, match="1 to 128 channels"):
        cpu.conv1x1(normal(2, 129), rotation(129)[None], normal(1, 129), None)
    ledger, y = x.new_empty(2, 1), torch.empty_like(x, dtype=torch.float64)
    with pytest.raises(ValueError, match="state's dtype"):
        cpu._C.couple(1, x, params, y, ledger, scale.args, False)
    with pytest.raises(ValueError, match="float32 or float64"):
        cpu.couple(x.half(), params, scale, False)
    bare = torch.empty(2, 0, 5, 4)
    with pytest.raises(ValueError, match="1 to 128 channels"):
        cpu.conv1x1(bare, rotation(0)[None], normal(1, 0), None)
    with pytest.raises(ValueError, match="unknown scale function relu"):
        cpu._C.couple(1, x, params, torch.empty_like(x), ledger,
                          ("relu", *scale.args[1:]), False)  # fmt: skip


# Views of a state of (N, C, H, W), each in a layout that torch allows and no model uses.
ODD_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "samples expanded": lambda x: x[:1].expand(x.shape),
    "channels expanded": lambda x: x[:, :1].expand(x.shape),
    "pixels expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
    "one number": lambda x: x.new_tensor(0.5).expand(x.shape),
    "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 3)[::2, :, :, ::2],
    "negated lazily": lambda x: torch.complex(x, x).conj().imag,
    "strides of no use": lambda x: x.as_strided(x.shape, no_use(x)),
}


def no_use(x: Tensor) -> list[int]:
    """The strides of x, with arbitrary ones for axes of length 1, which nothing uses."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return [stride if length > 1 else 1000 + axis for axis, (length, stride) in enumerate(sizes)]


ODD_SHAPES = [(2, 1, 16, 7), (2, 4, 3, 5), (1, 3, 1, 6), (3, 2, 1, 1), (0, 3, 4, 5)]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("of_gradient", ODD_VIEWS)
@pytest.mark.parametrize("of_state", ODD_VIEWS)
def test_any_layout_of_states_and_gradients(of_state, of_gradient, shape):
    """The calls bypass the dispatcher, as layers do, so that nothing resolves the view first."""
    c = shape[1]
    x = dense_pixels(ODD_VIEWS[of_state](normal(*shape))).requires_grad_()
    weight, bias = rotation(c).requires_grad_(), normal(c).requires_grad_()
    calls = [(conv1x1_eager, (x, weight[None], bias[None], "tf32x3", None), conv1x1_ref)]
    if c > 1:
        params = ODD_VIEWS[of_gradient](normal(*params_shape(shape))).requires_grad_()
        calls.append((coupling_eager, (x, params, *ScaleFunction("exp").args, False), None))
    for call, arguments, reference in calls:
        y, other = call(*arguments)
        leaves = [t for t in arguments if isinstance(t, Tensor)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        if reference is None:
            want = affine_coupling_ref(*exact, ScaleFunction("exp"), False)
        else:
            want = (conv1x1_ref(exact[0], exact[1][0], exact[2][0]),)
        outputs = (y, other)[: len(want)]
        gradients = [ODD_VIEWS[of_gradient](normal(*shape)), normal(shape[0], 1)][: len(want)]
        got = torch.autograd.grad(outputs, leaves, gradients)
        wants = torch.autograd.grad(want, exact, [g.double() for g in gradients])
        for a, b in zip((*outputs, *got), (*want, *wants), strict=True):
            assert_close(a, b, terms=max(1, c * x.numel()), scale=GROWTH)


def test_an_error_in_a_worker_is_an_error_of_the_call(tmp_path):
    """An error in any share of the work, such as a failed allocation, reaches the caller after all
    shares have ended, because they write to the caller's memory."""
    source = tmp_path / "main.cpp"
    source.write_text(r"""
        #include <atomic>
        #include <cstdio>
        #include <new>
        #include "common/loops.h"
        int main() {
            for (int failing = 1; failing < 16; ++failing) {
                std::atomic<int> ran{0};
                bool thrown = false;
                try {
                    mflow::share_out(4, 1 << 20, 4, [&](int64_t first, int64_t) {
                        ++ran;
                        if (failing >> first & 1) throw std::bad_alloc();
                    });
                } catch (const std::bad_alloc&) {
                    thrown = true;
                }
                if (!thrown || ran != 4) return 1;
            }
            std::puts("caught");
        }
    """)
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-pthread", f"-I{csrc}", "-o", str(tmp_path / "main")]
    subprocess.run([*compiler, *flags, str(source)], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "caught\n"), done.stderr
