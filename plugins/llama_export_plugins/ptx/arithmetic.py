"""What each instruction on registers computes: functions of NumPy arrays, one value per thread.

A register is an array of unsigned integers (a predicate: of bool) that broadcasts to [blocks, threads]; each function sees
it as the instruction's type. float32 rounds as IEEE 754 does; ``fma`` once; the ``approx`` instructions are computed
exactly and rounded, which is better than what NVIDIA promises of them (ex2 2 ulp, rsqrt 2^-22.9, div.full 2 ulp). ``ptxas`` may
still make one ``fma`` of a ``mul`` and an ``add``.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution, chapter 9.7.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .program import PtxError

__all__ = [
    "CONVERSIONS", "FUNCTIONS", "SHIFTS", "UNSIGNED", "WIDE", "bfloat16_bits", "bfloat16_values", "comparison", "largest",
    "shifted", "typed", "unset", "widened",
]  # fmt: skip

Array = NDArray[Any]
UNSIGNED: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
"""Bits of a register -> what it is kept as."""
_VIEWS: dict[str, Any] = {
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "pred": np.bool_,
}  # fmt: skip


def unset(width: int) -> Array:
    """What is in a register of so many bits that nothing was put into: all ones, which is NaN."""
    return np.array([[(1 << width) - 1]], np.uint64).astype(UNSIGNED[width])


def bfloat16_values(bits: Array) -> Array:
    """uint16 -> float32"""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_bits(values: Array) -> Array:
    """float32 -> uint16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _pairs(bits: Array, element: str) -> Array:
    """A register of two values -> [.., 2], the one in the low half first."""
    wide = np.ascontiguousarray(bits)[..., None]
    return wide.view(_VIEWS[element])


def typed(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    """``function`` of values -> the same of registers, for a type such as ``s32``, ``bf16`` or ``f16x2``.

    16-bit floating point is computed in float64 and rounded once.

    Raises:
        PtxError: no such type.
    """
    element = kind.removesuffix("x2")
    if element not in _VIEWS:
        raise PtxError(f"type `{kind}` is not understood")
    view = _VIEWS[element]

    def on_values(*values: Array) -> Array:
        if element == "bf16":
            return _bfloat16_of_double(function(*(bfloat16_values(item).astype(np.float64) for item in values)))
        if element == "f16":
            return function(*(item.astype(np.float64) for item in values)).astype(np.float16)
        return function(*values)

    if kind.endswith("x2"):
        register = {2: np.uint32, 4: np.uint64}[np.dtype(view).itemsize]

        def on_pairs(*registers: Array) -> Array:
            result = np.ascontiguousarray(on_values(*(_pairs(item, element) for item in registers)))
            return result.view(register)[..., 0]

        return on_pairs
    if element == "bf16":
        return on_values
    kept = UNSIGNED[1 if element == "pred" else 8 * np.dtype(view).itemsize]

    def on_registers(*registers: Array) -> Array:
        return on_values(*(item.view(view) for item in registers)).view(kept)

    return on_registers


# ---- instructions whose operands and result have one type -----------------------------------------------------------


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once: the product of two float32 is exact in float64, and the sum is rounded to odd there."""
    product, addend = np.broadcast_arrays(a.astype(np.float64) * b, c.astype(np.float64))
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # Knuth's two-sum: exact
    odd = _to_odd(total, error)
    return odd.astype(np.float32) if a.dtype == np.float32 else odd


def _to_odd(rounded: Array, error: Array) -> Array:
    """Of the two neighbours of an exact value the one whose last bit is 1: it may be rounded once more.

    Args:
        rounded: float32 or float64, to nearest.
        error: exact - rounded, at least its sign.
    """
    bits = np.ascontiguousarray(rounded).view({4: np.int32, 8: np.int64}[rounded.dtype.itemsize])
    inexact = np.isfinite(rounded) & (error != 0) & (bits & 1 == 0)
    step = np.where((error > 0) != np.signbit(rounded), 1, -1).astype(bits.dtype)  # away from zero, or back
    return np.where(inexact, bits + step, bits).view(rounded.dtype)


def _bfloat16_of_double(values: Array) -> Array:
    """float64 -> uint16, rounded once."""
    with_float32 = values.astype(np.float32)
    return bfloat16_bits(_to_odd(with_float32, values - with_float32))


def _divided(a: Array, b: Array) -> Array:
    """Towards zero, as C does."""
    if not b.all():
        raise PtxError("division by zero")
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) ^ (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _divided(a, b) * b).astype(a.dtype)


def _flushed(values: Array) -> Array:
    """Subnormal numbers are zero (.ftz), of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _exp2(a: Array) -> Array:
    return _flushed(np.exp2(_flushed(a).astype(np.float64)).astype(np.float32))


def _rsqrt(a: Array) -> Array:
    return _flushed((1 / np.sqrt(_flushed(a).astype(np.float64))).astype(np.float32))


def _shifted_left(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shifted_right(a: Array, count: Array) -> Array:
    return a >> np.minimum(count, 8 * a.dtype.itemsize - 1).astype(a.dtype)


def _shifted_right_unsigned(a: Array, count: Array) -> Array:
    return np.where(count < 8 * a.dtype.itemsize, _shifted_right(a, count), 0).astype(a.dtype)


def _extracted(a: Array, position: Array, length: Array) -> Array:
    """bfe.u32; of both numbers the low 8 bits count."""
    bits = np.minimum(length & np.uint32(0xFF), 32).astype(np.int64)
    shifted = a.astype(np.int64) >> np.minimum(position & np.uint32(0xFF), 63).astype(np.int64)
    return (shifted & ((np.int64(1) << bits) - 1)).astype(np.uint32)


def _extracted_signed(a: Array, position: Array, length: Array) -> Array:
    """bfe.s32: the field's highest bit, 31 at most, is its sign."""
    up = 64 - np.minimum(length & np.uint32(0xFF), 64).astype(np.int64)
    shifted = a.astype(np.int64) >> np.minimum(position & np.uint32(0xFF), 63).astype(np.int64)
    return np.where(up == 64, 0, (shifted << np.minimum(up, 63)) >> np.minimum(up, 63)).astype(np.int32)


def _smallest(*values: Array) -> Array:
    """Of two or more: a number before NaN, -0 before +0."""
    return functools.reduce(_lower, values)


def largest(*values: Array) -> Array:
    """Of two or more: a number before NaN, +0 before -0."""
    return functools.reduce(_higher, values)


def _lower(a: Array, b: Array) -> Array:
    is_float = a.dtype.kind == "f"
    first = np.isnan(b) | (a < b) | ((a == b) & np.signbit(a)) if is_float else a < b
    return np.where(first, a, b)


def _higher(a: Array, b: Array) -> Array:
    is_float = a.dtype.kind == "f"
    first = np.isnan(b) | (a > b) | ((a == b) & ~np.signbit(a)) if is_float else a > b
    return np.where(first, a, b)


_INTEGERS, _FLOATS = ("s16", "u16", "s32", "u32", "s64", "u64"), ("f32", "f32x2", "f16", "f16x2", "bf16", "bf16x2")
_BITS = ("b16", "b32", "b64", "pred")
FUNCTIONS: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "add": (np.add, (*_INTEGERS, *_FLOATS)),
    "sub": (np.subtract, (*_INTEGERS, *_FLOATS)),
    "mul": (np.multiply, _FLOATS),
    "mul.lo": (np.multiply, _INTEGERS),
    "mad.lo": (lambda a, b, c: a * b + c, _INTEGERS),
    "fma.rn": (_fma, _FLOATS),
    "div": (_divided, ("s32", "u32")),
    "rem": (_remainder, ("s32", "u32")),
    "div.full": (np.divide, ("f32",)),
    "min": (_smallest, (*_INTEGERS, "f32")),
    "max": (largest, (*_INTEGERS, "f32")),
    "neg": (np.negative, ("s16", "s32", "s64", *_FLOATS)),
    "abs": (np.abs, ("s16", "s32", "s64", *_FLOATS)),
    "and": (np.bitwise_and, _BITS),
    "or": (np.bitwise_or, _BITS),
    "xor": (np.bitwise_xor, _BITS),
    "not": (np.invert, _BITS),
    "ex2.approx.ftz": (_exp2, ("f32",)),
    "rsqrt.approx.ftz": (_rsqrt, ("f32",)),
    "mov": (lambda a: a, (*_BITS, *_INTEGERS, "f32")),
}
"""Instruction without its type -> values to value, and the types it is taken for."""
SHIFTS: dict[str, tuple[str, Callable[..., Array]]] = {
    "shl.b16": ("b16", _shifted_left),
    "shl.b32": ("b32", _shifted_left),
    "shl.b64": ("b64", _shifted_left),
    "shr.u32": ("u32", _shifted_right_unsigned),
    "shr.u64": ("u64", _shifted_right_unsigned),
    "shr.s32": ("s32", _shifted_right),
    "shr.s64": ("s64", _shifted_right),
    "bfe.u32": ("u32", _extracted),
    "bfe.s32": ("s32", _extracted_signed),
}
"""Instruction -> type of what is shifted, and how; the other operands are u32."""


def shifted(opcode: str) -> Callable[..., Array]:
    """Of :data:`SHIFTS`: the first operand is seen as its type, the others are numbers."""
    kind, function = SHIFTS[opcode]
    view = _VIEWS[kind]
    return lambda a, *rest: function(a.view(view), *rest).view(UNSIGNED[8 * np.dtype(view).itemsize])


WIDE: dict[str, Any] = {"mul.wide.s32": np.int32, "mul.wide.u32": np.uint32, "mad.wide.s32": np.int32, "mad.wide.u32": np.uint32}  # fmt: skip
"""32 times 32 bits give 64; ``mad`` adds a third operand of 64."""


def widened(opcode: str) -> Callable[..., Array]:
    """Of ``mul.wide`` and ``mad.wide``."""
    view = WIDE[opcode]
    wide = np.int64 if view is np.int32 else np.uint64

    def product(a: Array, b: Array, *addend: Array) -> Array:
        result = (a.view(view).astype(wide) * b.view(view)).view(np.uint64)
        return result + addend[0] if addend else result

    return product


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def comparison(operator: str, kind: str) -> Callable[[Array, Array], Array]:
    """Of ``setp.<operator>.<kind>``. One with NaN is false, ``ne`` too, as PTX has it for the ordered ones.

    Raises:
        PtxError: not understood.
    """
    if operator not in _COMPARISONS or kind not in _VIEWS or kind in ("bf16", "f16"):
        raise PtxError(f"comparison `{operator}` of `{kind}` is not understood")
    function, view = _COMPARISONS[operator], _VIEWS[kind]
    if (operator, kind) == ("ne", "f32"):
        return lambda a, b: (a.view(view) < b.view(view)) | (a.view(view) > b.view(view))
    return lambda a, b: function(a.view(view), b.view(view))


def _integers(source: Any, result: Any) -> Callable[[Array], Array]:
    """Cut off, or extended by the sign of the source."""
    return lambda a: a.view(source).astype(result).view(UNSIGNED[8 * np.dtype(result).itemsize])


def _two(rounded: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Of ``cvt.rn.<T>x2.f32 d, a, b``: a into the high half, b into the low."""

    def packed(a: Array, b: Array) -> Array:
        high, low = (rounded(item.view(np.float32)).astype(np.uint32) for item in (a, b))
        return (high << np.uint32(16)) | low

    return packed


def _fma_of(widen: Callable[[Array], Array]) -> Callable[[Array, Array, Array], Array]:
    """Of ``fma.rn.f32.<T>``: a and b are of the smaller type, c and the result float32."""
    return lambda a, b, c: _fma(widen(a), widen(b), c.view(np.float32)).view(np.uint32)


def _half_bits(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16)


CONVERSIONS: dict[str, Callable[..., Array]] = {
    "cvt.s64.s32": _integers(np.int32, np.int64),
    "cvt.u64.u32": _integers(np.uint32, np.uint64),
    "cvt.u32.u64": _integers(np.uint64, np.uint32),
    "cvt.u16.u32": _integers(np.uint32, np.uint16),
    "cvt.u32.u16": _integers(np.uint16, np.uint32),
    "cvt.rn.f32.s32": lambda a: a.view(np.int32).astype(np.float32).view(np.uint32),
    "cvt.f32.f16": lambda a: a.view(np.float16).astype(np.float32).view(np.uint32),
    "cvt.f32.bf16": lambda a: bfloat16_values(a).view(np.uint32),
    "cvt.rn.f16.f32": lambda a: _half_bits(a.view(np.float32)),
    "cvt.rn.bf16.f32": lambda a: bfloat16_bits(a.view(np.float32)),
    "cvt.rn.f16x2.f32": _two(_half_bits),
    "cvt.rn.bf16x2.f32": _two(bfloat16_bits),
    "fma.rn.f32.f16": _fma_of(lambda a: a.view(np.float16).astype(np.float32)),
    "fma.rn.f32.bf16": _fma_of(bfloat16_values),
}
"""Instructions between types, in full -> registers to register."""
