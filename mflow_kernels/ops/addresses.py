"""Addresses of a flow state's elements in a Triton kernel.

One compiled kernel serves every batch size, and every image size whose P and strides are multiples
of the same power of two. Strides are therefore arguments at run time. For 16-byte accesses the
compiler must also know which stride is 1, and a divisor of the others. `strided` states both, and
`at` uses them.
"""

import math
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.layouts import check_span, strides


class _Unit(tl.constexpr):
    # Triton hashes these at every launch. Each value has one object, so its identity is its hash.
    __hash__ = object.__hash__


_UNITS = {unit: _Unit(unit) for unit in (1, 2, 4, 8)}

KernelStrides = tuple[int, int | None, int | None, tl.constexpr]

# Stands for the strides of a second half that equal those of the first. It is not None, because
# kernels of Triton 3.5 and 3.6 cannot compare strides, which hold None, with None.
_SAME = (None,)


def strided(x: Tensor | None) -> tuple[Tensor | None, KernelStrides | None]:
    """Return `x` and its strides (sample, channel, pixel, unit), as `at` takes them.

    A channel or pixel stride of 1 is None, so that the compiler knows it. The others are multiples
    of `unit`, a power of two up to 8 elements, which is 16 bytes of the narrowest dtype. They are a
    plain tuple, because Triton takes twice as long to bind a NamedTuple.

    Raises:
        ValueError: an offset within a sample does not fit the 32 bits that kernels use.
    """
    if x is None:
        return None, None
    n, c, p = strides(x)
    if (x.shape[1] - 1) * c + (x.shape[2:].numel() - 1) * p >= 2**31:
        check_span("state", x)
    first = 0 if isinstance(x, FakeTensor) else x.data_ptr() // x.element_size()
    unit = _UNITS[math.gcd(8, first, n, 0 if c == 1 else c, 0 if p == 1 else p)]
    return x, (n, None if c == 1 else c, None if p == 1 else p, unit)


def strided_halves(a: Tensor | None, b: Tensor | None) -> tuple[Any, ...]:
    """Return both halves of a state and their strides, as `at_halves` takes them."""
    (a, a_strides), (b, b_strides) = strided(a), strided(b)
    if a_strides is None or b_strides is None:
        return a, a_strides, b, b_strides
    if a_strides[:3] != b_strides[:3]:
        return a, a_strides, b, b_strides
    unit = min(a_strides[3], b_strides[3], key=lambda unit: unit.value)
    return a, (*a_strides[:3], unit), b, _SAME


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
    # A step of 1 is added last, because each address before it is a multiple of UNIT elements. The
    # compiler takes this hint only from the result of an operation, not from an argument.
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
    """Addresses of channels c at columns (n, p), columns by channels.

    A channel lies in the half `a` where `is_a`, otherwise in the half `b`. b_strides[0] is None if
    b has the strides of a, which saves half of the arithmetic.
    """
    if b_strides[0] is None:
        UNIT: tl.constexpr = a_strides[3]
        half = tl.where(is_a, a, b)
        half = tl.multiple_of(half, UNIT * half.dtype.element_ty.primitive_bitwidth // 8)
        half += step(c, a_strides[1], UNIT)
        column = step(n, a_strides[0], UNIT) + step(p, a_strides[2], UNIT)
        return half[None, :] + column[:, None]
    else:
        at_a = at(a, a_strides, n, c, p, PIXELS_FIRST=True)
        at_b = at(b, b_strides, n, c, p, PIXELS_FIRST=True)
        UNIT: tl.constexpr = a_strides[3] if a_strides[3] < b_strides[3] else b_strides[3]
        SIZE: tl.constexpr = UNIT * a.dtype.element_ty.primitive_bitwidth // 8
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
