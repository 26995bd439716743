"""Memory layouts of flow states as Triton kernels see them, and the launch of a kernel.

A kernel sees a flow state (N, C, *spatial) as N samples of C channels by P pixels with one stride
each, so that contiguous and channels_last tensors and views of their halves need no copy. It works
on *columns*: the pixels of all samples, cut into tiles. If a sample has fewer pixels than a tile,
tiles run across samples (`Columns.flat`), so that (N, C) vectors fill the lanes too.

One compiled kernel serves every batch size, and every image size whose P and strides are multiples
of the same power of two. N, P and the strides are therefore arguments at run time. The compiler
needs three facts for 16-byte accesses, and the launch states them: the stride that is 1, a divisor
of the other strides (both `strided`), and a divisor of P (`Columns.unit`).
"""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from mflow_kernels.ops.checks import check_state

TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
# Whether kernels take CPU tensors: in Triton's interpreter, or compiled and run by tests/ptx.
KERNELS_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"


def transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is on.

    No kernel carries tangents or batches of gradients. The references run instead, and autograd
    differentiates them to any order.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def uses_triton(x: Tensor) -> bool:
    """Whether an operator on x runs its Triton kernels: on CUDA, and on the CPU if KERNELS_ON_CPU.
    Otherwise its CPU loop or its reference runs."""
    kind = x.device.type
    return (kind == "cuda" or (KERNELS_ON_CPU and kind == "cpu")) and not transformed()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured; nothing may be read from the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and log-determinants of a state of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(on: Tensor | torch.device) -> AbstractContextManager[Any]:
    """A context that turns autocast off: products of states always keep their precision."""
    device = on if isinstance(on, torch.device) else on.device
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """`y` with the strides of `torch.empty_like(x)`, which the operator's fake promises."""
    if y.stride() == x.stride() or y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x, dtype=y.dtype, device=y.device).copy_(y)


RUN_TIME = (
    "N",
    "TILES",
    "SPLITS",
)  # arguments that follow the batch size: Triton compiles for no value


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch `kernel` on the device of its first argument and on that device's current stream.

    Triton itself launches on the current device, which may be another one. A fake tensor has no
    memory, so its launch does nothing.
    """
    if isinstance(args[0], FakeTensor):
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


class Strides(NamedTuple):
    """Steps, in elements, to the next sample, channel and pixel."""

    n: int
    c: int
    p: int


def pixels(x: Tensor) -> int:
    """P, the number of pixels of a sample: 1 for (N, C)."""
    return math.prod(x.shape[2:])


def dense_pixels(x: Tensor) -> Tensor:
    """`x` itself if one stride reaches all its pixels in order, else a contiguous copy."""
    if x.dim() == 4:  # the usual case, decided without a loop
        _, _, height, width = x.shape
        *_, down, right = x.stride()
        return x if height == 1 or width == 1 or down == width * right else x.contiguous()
    size = 1
    for length, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if length == 1:
            continue
        if size == 1:
            step = stride
        if stride != step * size:
            return x.contiguous()
        size *= length
    return x


def flow_state(name: str, value: object) -> Tensor:
    """`value` as a flow state for kernels, copied only if one stride does not reach its pixels.

    Call this before the operator: its registered output layout follows its input layout.
    """
    return dense_pixels(check_state(name, value))


def strides(x: Tensor) -> Strides:
    """The strides of a tensor that `dense_pixels` returned."""
    if x.dim() == 4:
        n, c, down, right = x.stride()
        _, _, height, width = x.shape
        return Strides(n, c, right if width > 1 else down if height > 1 else 1)
    p = next((s for n, s in zip(x.shape[:1:-1], x.stride()[:1:-1], strict=True) if n > 1), 1)
    return Strides(x.stride(0), x.stride(1), p)


class _Unit(tl.constexpr):
    # Triton hashes these at every launch. Each value has one object, so its identity will do.
    __hash__ = object.__hash__


_UNITS = {unit: _Unit(unit) for unit in (1, 2, 4, 8)}
KernelStrides = tuple[int, int | None, int | None, tl.constexpr]


def strided(x: Tensor | None) -> tuple[Tensor | None, KernelStrides | None]:
    """`x` and its strides as a kernel takes them, for `at`: (sample, channel, pixel, unit).

    A channel or pixel stride of 1 is None, so that the compiler knows it. The others are multiples
    of `unit`, a power of two up to 8 elements, which is 16 bytes of the narrowest dtype. A plain
    tuple: Triton binds it in half the time that a NamedTuple takes.

    Raises:
        ValueError: an offset within a sample does not fit the 32 bits that kernels hold it in.
    """
    if x is None:
        return None, None
    n, c, p = strides(x)
    last = (x.shape[1] - 1) * c + (x.shape[2:].numel() - 1) * p
    if last >= 2**31:
        raise ValueError(
            f"expected samples that span at most 2^31 elements, got one of shape "
            f"{tuple(x.shape[1:])} that spans {last + 1}"
        )
    first = 0 if isinstance(x, FakeTensor) else x.data_ptr() // x.element_size()
    unit = _UNITS[math.gcd(8, first, n, 0 if c == 1 else c, 0 if p == 1 else p)]
    return x, (n, None if c == 1 else c, None if p == 1 else p, unit)


def strided_halves(a: Tensor | None, b: Tensor | None) -> tuple[Any, ...]:
    """Both halves of a state and their strides, for `at_halves`."""
    (a, a_strides), (b, b_strides) = strided(a), strided(b)
    if a_strides is None or b_strides is None:
        return a, a_strides, b, b_strides
    if a_strides[:3] != b_strides[:3]:
        return a, a_strides, b, b_strides
    unit = min(a_strides[3], b_strides[3], key=lambda unit: unit.value)
    return a, (*a_strides[:3], unit), b, None


def net_input(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An empty tensor for the network input y_a, dense and in y's order of axes; (0,) without a
    dtype."""
    return (
        y.new_empty(0) if dtype is None else torch.empty_like(y[:, : y.shape[1] // 2], dtype=dtype)
    )


def cut_net_input(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`net_input`, filled from y."""
    net = net_input(y, dtype)
    return net if dtype is None else net.copy_(y[:, : net.shape[1]])


def channels_first(x: Tensor) -> bool:
    """Whether neighbours in memory are pixels of one channel rather than channels of one pixel."""
    return pixels(x) > 1 and strides(x).p == 1


def is_channels_last(x: Tensor) -> bool:
    """Whether the strides of a state (N, C, *spatial) are in channels_last order.

    A state of one channel or one pixel has the order that its strides state, as for torch's
    convolutions. `Tensor.is_contiguous` would accept either order for it.
    """
    return x.dim() > 2 and 0 < x.stride(1) * x.shape[1] <= x.stride(-1)


def elementwise_tile(x: Tensor) -> tuple[int, int]:
    """Channels and columns of an elementwise program's tile.

    A tile has 1,024 elements (512 of float64, which needs twice the registers) and is longest along
    the axis that is contiguous in memory.
    """
    elements = 512 if x.dtype == torch.float64 else 1024
    if channels_first(x):
        return 4, elements // 4
    block_c = min(64, triton.next_power_of_2(x.shape[1]))
    return block_c, max(16, elements // block_c)


class Columns(NamedTuple):
    """The compile-time constants of a kernel's tiles of columns.

    Attributes:
        block: columns of a tile.
        flat: whether tiles run across samples.
        unit: a power of two that P is a multiple of, up to 8.
    """

    block: int
    flat: bool
    unit: int


class Tiles(NamedTuple):
    """The tiles of N x P columns.

    Attributes:
        programs: number of tiles, one program each.
        ledger: columns of a sample's row in the ledger.
        columns: the compile-time constants.
    """

    programs: int
    ledger: int
    columns: Columns


def tile_columns(n: int, p: int, block: int) -> Tiles:
    columns = Columns(block, p < block, math.gcd(p, 8))
    if columns.flat:
        return Tiles(triton.cdiv(n * p, block), p, columns)
    per_sample = triton.cdiv(p, block)
    return Tiles(n * per_sample, per_sample, columns)


def ledger_columns(x: Tensor, block: int) -> int:
    """T of the ledger (N, T) that a launch on x with tiles of `block` columns writes."""
    if not uses_triton(x):
        return 1
    return tile_columns(x.shape[0], pixels(x), block).ledger


@triton.jit
def multiple(value, UNIT: tl.constexpr):
    """`value`, written so that the compiler sees that it is a multiple of UNIT."""
    return value // UNIT * UNIT


@triton.jit
def step(index, stride, UNIT: tl.constexpr):
    if stride is None:
        return index
    else:
        return index * multiple(stride, UNIT)


@triton.jit
def at(x, strides, n, c, p, PIXELS_FIRST: tl.constexpr = False):
    """Addresses in x of channels c (rows) at columns (n, p), or transposed if PIXELS_FIRST.

    The strides come from `strided`.
    """
    UNIT: tl.constexpr = strides[3]
    if PIXELS_FIRST:
        n, c, p = n[:, None], c[None, :], p[:, None]
    else:
        n, c, p = n[None, :], c[:, None], p[None, :]
    SIZE: tl.constexpr = UNIT * x.dtype.element_ty.primitive_bitwidth // 8
    x += step(n, strides[0], UNIT)
    # A step of 1 is added last: before it each address is a multiple of UNIT elements. The compiler
    # takes this hint only from the result of an operation, not from an argument.
    if strides[1] is None:
        x = tl.multiple_of(x + step(p, strides[2], UNIT), [SIZE, SIZE])
        return x + c
    else:
        x += step(c, strides[1], UNIT)
        if strides[2] is None:
            x = tl.multiple_of(x, [SIZE, SIZE])
        return x + step(p, strides[2], UNIT)


@triton.jit
def at_halves(a, a_strides, b, b_strides, n, c, p, is_a):
    """Addresses, columns by channels, of channels c of a half: in `a` where `is_a`, else in `b`.

    b_strides is None if b has the strides of a, which saves half of the arithmetic.
    """
    if b_strides is None:
        UNIT: tl.constexpr = a_strides[3]
        half = tl.where(is_a, a, b)
        half = tl.multiple_of(half, UNIT * half.dtype.element_ty.primitive_bitwidth // 8)
        half += step(c, a_strides[1], UNIT)
        column = step(n, a_strides[0], UNIT) + step(p, a_strides[2], UNIT)
        return half[None, :] + column[:, None]
    else:
        at_a = at(a, a_strides, n, c, p, PIXELS_FIRST=True)
        at_b = at(b, b_strides, n, c, p, PIXELS_FIRST=True)
        UNIT: tl.constexpr = min(a_strides[3], b_strides[3])
        SIZE: tl.constexpr = UNIT * a.dtype.element_ty.primitive_bitwidth // 8
        # A choice between pointers keeps too small a divisor.
        return tl.multiple_of(tl.where(is_a[None, :], at_a, at_b), [SIZE, SIZE])


@triton.jit
def store(pointer, value, mask):
    """`tl.store`. Float64 is converted to 16 bits through float32: Triton 3.6 cannot do it in one
    step."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty.primitive_bitwidth == 16:
        tl.store(pointer, value.to(tl.float32), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def columns(tile, N, P, COLUMNS: tl.constexpr):
    """Sample and pixel of each column of a tile, and whether the column exists."""
    BLOCK: tl.constexpr = COLUMNS.block
    P = multiple(P, COLUMNS.unit)
    if COLUMNS.flat:
        j = tile * BLOCK + tl.arange(0, BLOCK)
        return (j // P).to(tl.int64), j % P, j < N * P
    else:
        tiles = tl.cdiv(P, BLOCK)
        p = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
        n = tl.full([BLOCK], tile // tiles, tl.int64)
        return n, p, p < P


@triton.jit
def write_ledger(ledger, log_s, tile, N, P, COLUMNS: tl.constexpr):
    """Store the sum of a tile's log s (channels by columns) in the tile's ledger entry."""
    if COLUMNS.flat:
        j = tile * COLUMNS.block + tl.arange(0, COLUMNS.block)
        tl.store(ledger + j, tl.sum(log_s, axis=0), mask=j < N * P)
    else:
        tl.store(ledger + tile, tl.sum(log_s))


@triton.jit
def read_ledger(dledger, dledger_strides, n, p, valid, COLUMNS: tl.constexpr):
    """For each column, the gradient of the ledger entry that holds its log s."""
    if COLUMNS.flat:
        t = p
    else:
        t = p // COLUMNS.block
    at_t = dledger + n * dledger_strides[0] + t * dledger_strides[1]
    return tl.load(at_t, mask=valid, other=0.0)
