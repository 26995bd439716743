"""Chooses an operator's implementation, and launches kernels on their tensors' device."""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from mflow_kernels.ops.compiler import KERNELS, TRITON_INSTALLED, Kernels, triton
from mflow_kernels.ops.written import written_arguments

# Whether kernels run on CPU tensors, in Triton's interpreter or in the PTX machine of tests/ptx.
KERNELS_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"

# Arguments that depend on the batch size. Triton must not compile a kernel again for their values.
RUN_TIME = ("N", "TILES", "SPLITS")


class _Mode(threading.local):
    references_run = False


_mode = _Mode()  # of each thread, because a backward pass of another one may end in between


@contextmanager
def use_kernels(which: Kernels) -> Iterator[None]:
    """Within this context, compute by the references ("torch") or by the kernels ("auto").

    The references are torch's own operators. Autograd differentiates them, so a chain stores its
    states. `MFLOW_KERNELS=torch` turns the kernels off for a whole process, and then a chain still
    rebuilds its states; "auto" does not turn them on again.

    Raises:
        ValueError: `which` is neither "auto" nor "torch".
    """
    if which not in ("auto", "torch"):
        raise ValueError(f"which: expected auto or torch, got {which!r}")
    before, _mode.references_run = _mode.references_run, which == "torch"
    try:
        yield
    finally:
        _mode.references_run = before


def transformed() -> bool:
    """Whether the references run: in forward-mode differentiation, transforms of torch.func and
    `use_kernels("torch")`.

    No kernel carries tangents or batches of gradients. The references run instead, and autograd
    differentiates them to any order.
    """
    return (
        _mode.references_run
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def uses_triton(x: Tensor) -> bool:
    """Whether an operator on x runs its Triton kernels; otherwise its CPU loop or reference runs.

    Kernels run on CUDA and ROCm, and on a CPU if KERNELS_ON_CPU. They need Triton, a card that it
    supports, and no transform.
    """
    device = x.device
    served = on_gpu(device) or (KERNELS_ON_CPU and device.type == "cpu")
    if not served or KERNELS == "torch" or transformed():
        return False
    return _walk is not None or (TRITON_INSTALLED and _is_supported(device))


OLDEST = 80  # the first compute capability that Triton supports (its README)


@torch.compiler.assume_constant_result  # Dynamo does not trace properties of devices
def _is_supported(device: torch.device) -> bool:
    return device.type != "cuda" or _supports(device)


@cache
def _supports(device: torch.device) -> bool:
    """Whether Triton supports a card. If not, this warns once."""
    capability = _capability(device)
    if capability == AMD or capability >= OLDEST:
        return True
    warnings.warn(
        f"{torch.cuda.get_device_name(device)} has compute capability {capability / 10:.1f}. "
        "Triton supports 8.0 and later, so plain torch computes all operators on this card",
        stacklevel=2,
    )
    return False


class Walk(NamedTuple):
    """A walk through code on meta tensors, which have no memory.

    Attributes:
        gpu: whether these tensors stand for a GPU's. Code then takes the paths that it takes there.
        note: called as note(kernel, read, written, flops) for each launch, with the kernel's name,
            the tensors that it reads and writes, and the operations of its products.
        launched: called as launched(kernel, grid, arguments, options) before that, with what Triton
            would be given.
        card: the device whose architecture and multiprocessors a launch asks for; None for a
            Hopper card.
    """

    gpu: bool
    note: Callable[[str, list[Tensor], list[Tensor], int], object]
    launched: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], object] | None = (
        None
    )
    card: torch.device | None = None


_walk: Walk | None = None


@contextmanager
def walking(walk: Walk) -> Iterator[None]:
    """Within this context, launches and loops of csrc are noted and compute nothing."""
    global _walk
    before, _walk = _walk, walk
    try:
        yield
    finally:
        _walk = before


def is_walked() -> bool:
    return _walk is not None


def noted(kernel: str, read: Iterable[Tensor | None], written: Iterable[Tensor | None]) -> bool:
    """Note a launch of csrc if a walk is on; False if it must run."""
    if _walk is None:
        return False
    given, results = ([t for t in group if t is not None] for group in (read, written))
    _walk.note(kernel, given, results, 0)
    return True


def card_of(device: torch.device) -> torch.device:
    """The device that answers for `device`, which a walk may only stand for."""
    return device if _walk is None or _walk.card is None else _walk.card


def on_gpu(device: torch.device) -> bool:
    """Whether `device` is CUDA, or stands for it in a walk."""
    return device.type == "cuda" or (_walk is not None and _walk.gpu)


HOPPER = 90
# The architecture of all AMD cards. ROCm reports capabilities too, but an MI200's (9, 0) is no
# Hopper.
AMD = 0


def architecture(device: torch.device) -> int:
    """An NVIDIA card's compute capability, times ten, or AMD. On other devices, that of the machine
    that stands for a GPU, or Hopper's."""
    device = card_of(device)
    if device.type == "cuda":
        return _capability(device)
    return _machine() if KERNELS_ON_CPU else HOPPER


@torch.compiler.assume_constant_result  # Dynamo does not trace the look for drivers
def _machine() -> int:
    """The architecture for which kernels on CPU tensors are compiled, or Hopper's."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # Triton's interpreter needs no driver
        return HOPPER
    return AMD if target.backend == "hip" else int(target.arch)


def geforce(arch: int) -> bool:
    """Whether a card has the 100 KB of shared memory of a GeForce: sm_86, sm_89 and sm_12x. They
    multiply by mma.sync, as sm_80 does, and ptxas takes more registers for them."""
    return arch in (86, 89) or arch // 10 == 12


@cache  # torch asks the driver again at each call
def _capability(device: torch.device) -> int:
    if not torch.cuda.is_available():  # a fake tensor's device
        return HOPPER
    if torch.version.hip:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured; nothing may be read from the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def cusolver() -> Iterator[None]:
    """Decompose matrices on CUDA by cuSOLVER and cuBLAS.

    For batches of matrices, torch 2.9 prefers MAGMA, and then the host waits for the device. That
    is slow, and not allowed while a CUDA graph is captured.
    """
    global _cusolver_warned
    before = torch.backends.cuda.preferred_linalg_library()
    if _cusolver_warned:
        torch.backends.cuda.preferred_linalg_library("cusolver")
    else:  # torch warns once in a process that this setting is experimental
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.cuda.preferred_linalg_library("cusolver")
        _cusolver_warned = True
    try:
        yield
    finally:
        torch.backends.cuda.preferred_linalg_library(before)


_cusolver_warned = False


class LaunchError(RuntimeError):
    """Triton could not compile or start a kernel."""


def is_guarded(device: torch.device) -> bool:
    """Whether an operator falls back to its reference if a launch on `device` fails.

    The machines that stand for a GPU in tests raise instead.
    """
    return device.type == "cuda"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, flops: int = 0, **options: Any) -> None:
    """Launch `kernel` on the device of its first argument and on that device's current stream.

    Triton itself launches on the current device, which may be another one. A fake tensor has no
    memory, so its launch does nothing.

    Args:
        flops: operations of the kernel's products, two for a multiplication and its addition. Those
            that several programs repeat count each time. Only a walk reads them.
        options: the kernel's constants and Triton's options. AMD's compiler has no `maxnreg`.

    Raises:
        LaunchError: Triton could not compile or start the kernel.
    """
    first = args[0][0] if isinstance(args[0], tuple) else args[0]  # a tuple is from `strided`
    # Kernels were compiled and judged with fused multiply-adds, which Triton 3.10 makes no default.
    options["enable_fp_fusion"] = True
    if "maxnreg" in options and architecture(first.device) == AMD:
        del options["maxnreg"]
    if _walk is not None:
        if _walk.launched is not None:
            _walk.launched(kernel, grid, args, options)
        names = written_arguments(kernel)
        groups: tuple[list[Tensor], list[Tensor]] = [], []
        for written, argument in zip(names, args, strict=False):
            tensor = argument[0] if isinstance(argument, tuple) else argument
            if isinstance(tensor, Tensor):
                groups[written].append(tensor)
        _walk.note(getattr(kernel, "__name__", str(kernel)).strip("_"), *groups, flops)
        return
    if isinstance(first, FakeTensor):
        return
    device = first.device
    # See `strided`, which does so for states.
    args = tuple(a.resolve_neg() if isinstance(a, Tensor) and a.is_neg() else a for a in args)
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](*args, **options)
        else:
            kernel[grid](*args, **options)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or not is_guarded(device):
            raise
        name = getattr(kernel, "__name__", str(kernel)).strip("_")
        raise LaunchError(f"{name}: {type(error).__name__}: {error}") from error
