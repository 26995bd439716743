"""Tests of the CPU loops alone. `test_values.py` and `test_rebuild.py` compare their results
with the references."""

import math
import os
import random
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, FLOW_OPERATORS, REBUILDING, learned, normal, options, sample
from torch import Tensor
from views import VIEWS

from benchmarks.harness.inputs import params_shape, rotation
from benchmarks.harness.table import Operator
from mflow_kernels.ops import cpu
from mflow_kernels.ops.conv1x1 import conv1x1_eager, conv1x1_ref
from mflow_kernels.ops.coupling import affine_coupling_ref, coupling_eager
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.layouts import dense_pixels
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close

if cpu._C is None:
    pytest.skip("csrc is not built", allow_module_level=True)
if KERNELS_ON_CPU:
    pytest.skip("the loops launch no Triton kernel", allow_module_level=True)

# The default scale bounds s and 1 / s by e, so a rounding error grows at most by this factor.
GROWTH = math.e


OPERATORS = [*FLOW_OPERATORS.values(), *REBUILDING]
every = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.id)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def results(op: Operator, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All results and gradients."""
    found = op.call(*inputs.values(), **options(op))
    leaves = learned(inputs)
    cotangents = [torch.ones_like(y) for y in found]
    return [*found, *(torch.autograd.grad(found, leaves, cotangents) if leaves else ())]


@layouts
@pytest.mark.parametrize("op", [*OPERATORS, DIFFERENTIABLE["masked_penalty"]], ids=lambda op: op.id)
def test_same_bits_with_any_number_of_threads(op, layout):
    """The state is large enough for three threads; an element of a spline counts for many."""
    inputs = sample(op, (3, 6, 64, 40) if op.adjust else (3, 6, 160, 160), layout=layout)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(op, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@layouts
@every
def test_without_the_extension_references_stand_in(op, layout, monkeypatch):
    inputs = sample(op, (2, 6, 5, 4), layout=layout)
    native = results(op, inputs)
    monkeypatch.setattr(cpu, "_C", None)
    assert not cpu.serves(inputs.get("x", native[0]))
    for a, b in zip(native, results(op, inputs), strict=True):
        assert_close(a, b.double(), terms=120, scale=GROWTH)
        assert a.stride() == b.stride()


def test_serves_what_the_loops_can_read():
    assert cpu.serves(normal(2, 4))
    assert not cpu.serves(normal(2, 4, dtype=torch.bfloat16))
    assert not cpu.serves(torch.empty(2, 4, device="meta"))
    seen = []
    torch.func.vmap(lambda x: seen.append(cpu.serves(x)) or x)(normal(2, 4))
    assert seen == [False]


X, PARAMS, DY, WEIGHT, BIAS = *(torch.zeros(2, 6, 5, 4),) * 3, torch.eye(6)[None], torch.zeros(1, 6)
HALVES, TANH = (X[:, :3], X[:, 3:]), ScaleFunction("tanh")
HOW = TANH.args, 3, False


def conv1x1_backward(net: Tensor | None, dx: Tensor) -> object:
    return cpu.conv1x1_backward(HALVES, HALVES, net, WEIGHT, dx)


def couple(y: Tensor, options: tuple[Any, ...]) -> object:
    return cpu._C.coupling(1, 3, X, PARAMS, y, X.new_empty(2, 1), options, False)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cpu.change_half("coupling", X, PARAMS[:, :4], *HOW), "one shape"),
        (lambda: cpu.change_half_backward("coupling", DY[:1], X[:, 0, 0, 0], X, PARAMS, *HOW),
         "one shape"),
        (lambda: cpu.change_half("coupling", X.half(), PARAMS, *HOW), "float32 or float64"),
        (lambda: cpu.change_half("coupling", X, PARAMS, TANH.args, 4, False), "no larger"),
        (lambda: couple(X.double(), TANH.args), "state's dtype"),
        (lambda: couple(X, ("relu", *TANH.args[1:])), "unknown scale function relu"),
        (lambda: conv1x1_backward(None, X.transpose(2, 3)), "one stride for all pixels"),
        (lambda: conv1x1_backward(X, torch.empty_like(X)), "one shape, and halves"),
        (lambda: cpu.conv1x1(X, WEIGHT[:, 1:], BIAS, None), "weights of the state's channels"),
        (lambda: cpu.conv1x1(X, WEIGHT.double(), BIAS, None), "weights of the state's dtype"),
        (lambda: cpu.conv1x1(X[:, :0], WEIGHT[:, :0, :0], BIAS[:, :0], None), "1 to 128 channels"),
        (lambda: cpu.conv1x1(torch.zeros(2, 129), torch.eye(129)[None], torch.zeros(1, 129), None),
         "1 to 128 channels"),
    ],
)  # fmt: skip
def test_loops_refuse_what_they_would_misread(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


ODD_SHAPES = [(2, 1, 16, 7), (2, 4, 3, 5), (1, 3, 1, 6), (3, 2, 1, 1), (0, 3, 4, 5)]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("of_gradient", dict.fromkeys(VIEWS), ids=lambda view: view.__name__)
@pytest.mark.parametrize("of_state", dict.fromkeys(VIEWS), ids=lambda view: view.__name__)
def test_any_layout_of_states_and_gradients(of_state, of_gradient, shape):
    """The calls bypass the dispatcher, as layers do, so that nothing resolves the view first."""
    c, rng = shape[1], random.Random(0)
    x = dense_pixels(of_state(normal(*shape), rng)).requires_grad_()
    weight, bias = rotation(c).requires_grad_(), normal(c).requires_grad_()
    calls = [(conv1x1_eager, (x, weight[None], bias[None], "tf32x3", None), conv1x1_ref)]
    if c > 1:
        params = of_gradient(normal(*params_shape(shape)), rng).requires_grad_()
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
        gradients = [of_gradient(normal(*shape), rng), normal(shape[0], 1)][: len(want)]
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
