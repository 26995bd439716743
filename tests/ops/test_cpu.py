"""The CPU loops alone. Other tests compare their results with the references."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import normal
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.scale import ScaleFunction

if cpu._C is None:
    pytest.skip("csrc is not built", allow_module_level=True)
if KERNELS_ON_CPU:
    pytest.skip("the loops launch no Triton kernel", allow_module_level=True)


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
