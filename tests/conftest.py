import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from ptx.launch import Device, installed
from triton.runtime import interpreter

from mflow_kernels.ops import launch

# The tensors of the tests are small, and a second thread only slows them down.
torch.set_num_threads(1)

# tf32 rounds the factors of convolutions to 10 bits, too few to compare with references.
torch.backends.cudnn.allow_tf32 = False

_convert_float = interpreter._convert_float


def _convert_as_a_gpu(values, from_dtype, to_dtype, rounding_mode):
    """Round float32 to bfloat16 to the nearest even, as a GPU does; the interpreter truncates."""
    if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
        return _convert_float(values, from_dtype, to_dtype, rounding_mode)
    rounded = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = _convert_as_a_gpu

_create_dot = interpreter.InterpreterBuilder.create_dot


def _wide(handle):
    """Convert bfloat16 to float32; the interpreter would multiply the integers that store it."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _create_dot(
    self, _wide(a), _wide(b), *rest
)

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor_and_index(tensor, *scope):
    """Convert an index to an int: in Triton 3.5 and 3.6 it is an array, which numpy 2.4 refuses."""
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = _patch_lang_tensor_and_index

# With MFLOW_PTX=sm_90 or MFLOW_PTX=sm_90,late, the PTX interpreter of tests/ptx runs all kernels,
# compiled for that architecture.
ARCH, *FLAGS = os.environ.get("MFLOW_PTX", "").split(",")
if ARCH:
    if launch.KERNELS_ON_CPU:
        raise pytest.UsageError("MFLOW_PTX runs compiled kernels: unset TRITON_INTERPRET")
    if set(FLAGS) - {"late"}:
        raise pytest.UsageError(
            f"MFLOW_PTX: expected an architecture, optionally followed by ,late, got {FLAGS}"
        )
    launch.KERNELS_ON_CPU = True

# A machine without a GPU does not list its tests.
GPUS = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *GPUS])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[*(["cpu"] if launch.KERNELS_ON_CPU else []), *GPUS])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """A device with Triton kernels: a GPU, or the CPU under TRITON_INTERPRET=1 or MFLOW_PTX."""
    return torch.device(request.param)


LONG = ("test_notebooks.py", "test_build.py", "test_gpu_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that none runs alone while other processes have ended."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed torch, so that a test draws the same numbers alone and in the suite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every result of torch.empty and similar functions with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    assert torch.ones(2).new_empty(2, dtype=torch.float64).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", autouse=True)
def compiled() -> Iterator[Device | None]:
    """The interpreter of compiled kernels, under MFLOW_PTX."""
    if not ARCH:
        yield None
        return
    with installed(Device(ARCH, late="late" in FLAGS)) as device:
        yield device


@pytest.fixture(autouse=True)
def _apart(compiled: Device | None) -> Iterator[None]:
    """Make the PTX interpreter forget the memory of each test when it ends."""
    yield
    if compiled is not None:
        compiled.forget()
