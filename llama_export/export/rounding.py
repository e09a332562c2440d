"""Rounding rows of weights to 4 and 8 bits in blocks, as onnxruntime's MatMulNBits reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
UInt8Array = NDArray[np.uint8]
CANDIDATES = (14.25, 14.85, 15.45, 16.05, 16.65, 17.25, 17.85, 18.45)
"""How many steps of its scale a 4-bit block spans before it is rounded to 0..15 and clipped."""
_SMALLEST = np.float32(2.0**-100)
_BLOCK_ELEMENTS = 1 << 19
"""Quantised at a time by a thread. With fewer, NumPy's calls are so short that two threads wait for the interpreter's lock: 2^16 in
each of two took as long as in one, 2^19 half as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How weights are rounded, and how onnxruntime computes with them."""

    bits: int
    block_size: int
    """B, weights of one row that share a scale: a power of two, 16 to 256."""
    accuracy_level: int
    """Of MatMulNBits: 4 rounds each block of the activations to int8 and multiplies integers; 1 computes in float32."""
    pack: bool = True
    """Products of one input are one product."""

    @property
    def symmetric(self) -> bool:
        """Zero is the same integer in every block."""
        return self.bits == 8


SCHEMES: Mapping[str, Scheme] = {
    "int4": Scheme(bits=4, block_size=64, accuracy_level=4),
    "int8": Scheme(bits=8, block_size=128, accuracy_level=4),
}
"""Type -> what was measured best: docs/quantization.md."""


# ---- the arithmetic ---------------------------------------------------------------------------------------------


class QuantizedRows(NamedTuple):
    """Some rows of a matrix; shapes are in the module."""

    packed: UInt8Array
    scales: Float32Array
    """Not finite where a weight of the block is not."""
    zeros: UInt8Array
    """Of int8 empty."""


def quantize_rows(weight: Float32Array, scheme: Scheme) -> QuantizedRows:
    """Rounds the blocks of some rows.

    Args:
        weight: [n, K].
    """
    rows, columns = weight.shape
    size = scheme.block_size
    blocks = -(-columns // size)
    if columns % size:
        weight = np.pad(weight, ((0, 0), (0, blocks * size - columns)))
    flat = np.ascontiguousarray(weight).reshape(-1, size)
    packed = np.empty((len(flat), size * scheme.bits // 8), np.uint8)
    scales, zeros = np.empty(len(flat), np.float32), np.zeros(len(flat), np.uint8)
    for begin in range(0, len(flat), _BLOCK_ELEMENTS // size):
        some = slice(begin, begin + _BLOCK_ELEMENTS // size)
        # Blocks side by side: a sum over a block is then a few sums of long rows.
        w = np.ascontiguousarray(flat[some].T)
        with np.errstate(all="ignore"):  # a weight that is not finite is told by its scale
            if scheme.bits == 4:
                packed[some], scales[some], zeros[some] = _quantize_int4(w)
            else:
                packed[some], scales[some] = _quantize_int8(w)
    if scheme.symmetric:
        return QuantizedRows(packed.reshape(rows, blocks, -1), scales.reshape(rows, blocks), zeros[:0])
    nibbles = np.pad(zeros.reshape(rows, blocks), ((0, 0), (0, blocks % 2)))
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4)
    return QuantizedRows(packed.reshape(rows, blocks, -1), scales.reshape(rows, blocks), pairs)


def _quantize_int8(w: Float32Array) -> tuple[UInt8Array, Float32Array]:
    """[B, n] -> packed [n, B], scales [n]"""
    largest: Float32Array = np.abs(w).max(0)
    largest[largest < _SMALLEST] = 0
    ratio = np.where(largest == 0, np.float32(0), np.float32(127) / largest)
    q = np.rint(w * ratio)
    scale: Float32Array = np.divide(largest, np.float32(127))
    return (q + np.float32(128)).astype(np.uint8).T, scale


def _quantize_int4(w: Float32Array) -> tuple[UInt8Array, Float32Array, UInt8Array]:
    """[B, n] -> packed [n, B / 2], scales [n], zeros [n]"""
    high, low = np.maximum(w.max(0), np.float32(0)), np.minimum(w.min(0), np.float32(0))
    span = high - low
    best = np.full(len(span), -1, np.float32)
    best_ratio, best_zero = np.zeros_like(span), np.zeros_like(span)
    scale = np.where(np.isfinite(span), np.float32(0), np.float32(np.nan))
    q, terms = np.empty_like(w), np.empty_like(w)
    for candidate in CANDIDATES:
        ratio = np.where(span < _SMALLEST, np.float32(0), np.float32(candidate) / span)
        zero = np.clip(np.rint(-low * ratio), 0, 15)
        _round(w, ratio, zero, q)
        along = _sum(np.multiply(w, q, out=terms))
        length = _sum(np.multiply(q, q, out=terms))
        score = along * along / length
        better = score > best  # false for NaN: of a block of zeros, or one that is not finite
        best, best_ratio = np.where(better, score, best), np.where(better, ratio, best_ratio)
        best_zero, scale = np.where(better, zero, best_zero), np.where(better, along / length, scale)
    _round(w, best_ratio, best_zero, q)
    q += best_zero
    u = q.astype(np.uint8)
    return (u[0::2] | u[1::2] << np.uint8(4)).T, scale, best_zero.astype(np.uint8)


def _round(w: Float32Array, ratio: Float32Array, zero: Float32Array, q: Float32Array) -> None:
    """Writes round(w * ratio), clipped to -zero..15 - zero, into ``q``."""
    np.multiply(w, ratio, out=q)
    np.rint(q, out=q)
    np.maximum(q, -zero, out=q)
    np.minimum(q, np.float32(15) - zero, out=q)


def _sum(terms: Float32Array) -> Float32Array:
    """[B, n] -> [n], by halves; ``terms`` is overwritten."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = np.add(terms[:half], terms[half:], out=terms[:half])
    total: Float32Array = terms[0].copy()
    return total
