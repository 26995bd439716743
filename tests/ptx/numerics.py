"""Arithmetic of PTX that numpy lacks, on arrays with one element per thread."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}


def bf16_bits(x: Array) -> Array:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x).view(u4)
    rounded = ((bits.astype(u8) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def from_bf16(bits: Array) -> Array:
    return (np.asarray(bits).astype(u4) << u4(16)).view(f4)


def same_values(a: Array, b: Array) -> Array:
    """Whether words have the same bits, or are float32 or float64 NaNs. A GPU gives every NaN the
    same bits; numpy does not."""
    if a.dtype.itemsize < 4:
        return a == b
    nan_a, nan_b = (np.isnan(words.view(f"f{a.dtype.itemsize}")) for words in (a, b))
    return (a == b) | (nan_a & nan_b)


def tf32_bits(bits: Array) -> Array:
    """The bits of float32, rounded to tf32: to nearest, ties away from zero."""
    special = (bits & u4(0x7F800000)) == u4(0x7F800000)
    return np.where(special, bits, (bits + u4(0x1000)) & u4(0xFFFFE000))


def as_tf32(bits: Array) -> Array:
    """float32 as a tensor core reads it for tf32: the low 13 bits become zero."""
    return (bits & u4(0xFFFFE000)).view(f4).astype(f8)


def toward_zero(x: Array) -> Array:
    """float64 to float32, rounded toward zero."""
    r = x.astype(f4)
    return np.where(np.abs(r.astype(f8)) > np.abs(x), np.nextafter(r, f4(0)), r)


def to_odd(x: Array) -> Array:
    """float64 to float32, rounded to odd: the last bit of an inexact result is 1. A second
    rounding, to fewer bits, then gives the nearest number."""
    r = np.ascontiguousarray(toward_zero(x))
    return np.where(r.astype(f8) == x, r.view(u4), r.view(u4) | u4(1)).view(f4)


def fma(a: Array, b: Array, c: Array) -> Array:
    wide = f8 if c.dtype == f4 else np.longdouble
    return (np.asarray(a, wide) * np.asarray(b, wide) + np.asarray(c, wide)).astype(c.dtype)


def flushed(x: Array) -> Array:
    """Replaces subnormal numbers by zero (.ftz)."""
    return np.where(np.abs(x) < f4(1.1754944e-38), np.copysign(f4(0), x), x)


def divided(a: Array, b: Array) -> Array:
    """Division, toward zero for integers; an integer divisor of 0 counts as 1."""
    if b.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind != "i":
        return (a // b).astype(a.dtype)
    q = np.abs(a.astype(i8)) // np.abs(b.astype(i8))
    return np.where((a < 0) ^ (b < 0), -q, q).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return a - divided(a, b) * b


def shifted_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << (by.astype(a.dtype) & a.dtype.type(bits - 1)), a.dtype.type(0))


def shifted_right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    r = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return r if a.dtype.kind == "i" else np.where(by < bits, r, a.dtype.type(0))


def field(a: Array, at: Array, length: Array) -> Array:
    """bfe: `length` bits of 32, from bit `at`; a signed field of a signed number."""
    at, length = np.asarray(at, i8) & 255, np.asarray(length, i8) & 255
    if a.dtype.kind == "i":
        wide, top = a.astype(i8), np.minimum(at + length, 32)
        return np.where(length == 0, 0, (wide << (64 - top)) >> (64 - top + at)).astype(i4).view(u4)
    return ((a.astype(i8) >> np.minimum(at, 63)) & ((i8(1) << length) - 1)).astype(u4)


def inserted(a: Array, into: Array, at: Array, length: Array) -> Array:
    """bfi: the low bits of `a` in a field of `into`."""
    mask = ((i8(1) << np.asarray(length, i8)) - 1) << np.asarray(at, i8)
    mask = (mask & 0xFFFFFFFF).astype(u4)
    return (into & ~mask) | ((a.astype(u8) << np.asarray(at, u8)).astype(u4) & mask)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of a pair of words; a selector's bit 3 repeats the byte's sign."""
    both = np.asarray(a).astype(u8) | (np.asarray(b).astype(u8) << u8(32))
    out = u8(0)
    for i in range(4):
        nibble = (np.asarray(selector).astype(u8) >> u8(4 * i)) & u8(15)
        byte = (both >> ((nibble & u8(7)) * u8(8))) & u8(255)
        sign = np.where(byte & u8(128), u8(255), u8(0))
        out = out | (np.where(nibble & u8(8), sign, byte) << u8(8 * i))
    return out.astype(u4)


def narrowed(x: Array, kind: str) -> Array:
    """float64 as the bits of a 16-bit float, to nearest even."""
    return bf16_bits(to_odd(x)) if kind == "bf16" else to_odd(x).astype(f2).view(u2)


def widened(bits: Array, kind: str) -> Array:
    """The bits of a 16-bit float as float64."""
    bits = np.asarray(bits)
    return (from_bf16(bits) if kind == "bf16" else bits.view(f2)).astype(f8)
