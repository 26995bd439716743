"""Addresses of a flow state's elements in a Triton kernel.

One compiled kernel serves every batch size, and every image size whose P and strides are multiples
of the same power of two. Strides are therefore arguments at run time. For 16-byte accesses the
compiler must also know which stride is 1, and a divisor of the others. `strided` states both, and
`at` uses them.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.layouts import check_span, strides


class _Unit(tl.constexpr):
    # Triton hashes these at every launch. Each value has one object, so its identity is its hash.
    __hash__ = object.__hash__


_UNITS = {unit: _Unit(unit) for unit in (1, 2, 4, 8)}

# A state as a kernel takes it: (tensor, sample, channel and pixel stride, unit), or (None,) if the
# state is absent. Kernels test `x[0] is not None`, because Triton 3.5 and 3.6 cannot compare a
# tuple that holds None with None.
KernelState = tuple[Any, ...]


@lru_cache(4096)  # each launch asks for several, and the steps of a flow repeat
def _described(
    shape: torch.Size, stride: tuple[int, ...], first: int
) -> tuple[int, int | None, int | None, _Unit]:
    """The strides and the unit that `strided` returns after the tensor.

    Args:
        first: the address of the first element, in elements.
    """
    check_span("state", shape, stride)
    n, c, p = strides(shape, stride)
    if shape[0] == 1:  # a stride that torch leaves open must not compile a kernel again
        n = max(n, c * shape[1], p * shape[2:].numel())
    unit = _UNITS[math.gcd(8, first, n, 0 if c == 1 else c, 0 if p == 1 else p)]
    return n, None if c == 1 else c, None if p == 1 else p, unit


def strided(x: Tensor | None) -> KernelState:
    """Return `x` as a kernel takes it, for `at`.

    A channel or pixel stride of 1 is None, so that the compiler knows it. The others are multiples
    of `unit`, a power of two up to 8 elements, which is 16 bytes of the narrowest dtype. The tuple
    is a plain one, because Triton takes twice as long to bind a NamedTuple.

    Raises:
        ValueError: an offset within a sample does not fit the 32 bits that kernels use.
    """
    if x is None:
        return (None,)
    if x.is_neg():  # torch negates lazily: memory then holds the opposite of the values
        x = x.resolve_neg()
    first = 0 if isinstance(x, FakeTensor) else x.data_ptr() // x.itemsize % 8
    return x, *_described(x.shape, x.stride(), first)


def strided_halves(a: Tensor | None, b: Tensor | None) -> tuple[KernelState, KernelState]:
    """Return both halves of a state, as `at_halves` takes them.

    The second is (tensor, None) if it has the strides of the first.
    """
    half_a, half_b = strided(a), strided(b)
    if len(half_a) == 1 or len(half_b) == 1 or half_a[1:4] != half_b[1:4]:
        return half_a, half_b
    unit = min(half_a[4], half_b[4], key=lambda unit: unit.value)
    return (*half_a[:4], unit), (b, None)


@triton.jit
def multiple(value, UNIT: tl.constexpr):
    """`value`, written so that the compiler sees that it is a multiple of UNIT."""
    return value // UNIT * UNIT


@triton.jit
def step(index, stride, UNIT: tl.constexpr):
    """Distance in elements to entry `index` along an axis. A stride of None is 1."""
    if stride is None:
        return index
    else:
        return index * multiple(stride, UNIT)


@triton.jit
def at(x, n, c, p, PIXELS_FIRST: tl.constexpr = False):
    """Addresses of channels c (rows) at columns (n, p), or transposed if PIXELS_FIRST.

    x comes from `strided`.
    """
    UNIT: tl.constexpr = x[4]
    if PIXELS_FIRST:
        n, c, p = n[:, None], c[None, :], p[:, None]
    else:
        n, c, p = n[None, :], c[:, None], p[None, :]
    SIZE: tl.constexpr = UNIT * x[0].dtype.element_ty.primitive_bitwidth // 8
    address = x[0] + step(n, x[1], UNIT)
    # A step of 1 is added last, because each address before it is a multiple of UNIT elements. The
    # compiler takes this hint only from the result of an operation, not from an argument.
    if x[2] is None:
        address = tl.multiple_of(address + step(p, x[3], UNIT), [SIZE, SIZE])
        return address + c
    else:
        address += step(c, x[2], UNIT)
        if x[3] is None:
            address = tl.multiple_of(address, [SIZE, SIZE])
        return address + step(p, x[3], UNIT)


@triton.jit
def at_halves(a, b, n, c, p, is_a):
    """Addresses of channels c at columns (n, p), columns by channels.

    A channel lies in the half `a` where `is_a`, otherwise in the half `b`. Both come from
    `strided_halves`. If b has the strides of a, half of the arithmetic suffices.
    """
    if b[1] is None:
        UNIT: tl.constexpr = a[4]
        half = tl.where(is_a, a[0], b[0])
        half = tl.multiple_of(half, UNIT * half.dtype.element_ty.primitive_bitwidth // 8)
        half += step(c, a[2], UNIT)
        column = step(n, a[1], UNIT) + step(p, a[3], UNIT)
        return half[None, :] + column[:, None]
    else:
        at_a = at(a, n, c, p, PIXELS_FIRST=True)
        at_b = at(b, n, c, p, PIXELS_FIRST=True)
        UNIT: tl.constexpr = a[4] if a[4] < b[4] else b[4]
        SIZE: tl.constexpr = UNIT * a[0].dtype.element_ty.primitive_bitwidth // 8
        # `where` loses part of the divisor that the compiler knows of both, so state it again.
        return tl.multiple_of(tl.where(is_a[None, :], at_a, at_b), [SIZE, SIZE])


@triton.jit
def store(pointer, value, mask):
    """`tl.store`. Float64 is converted to 16 bits through float32: Triton 3.6 cannot do it in one
    step."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty.primitive_bitwidth == 16:
        tl.store(pointer, value.to(tl.float32), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)
