"""The instructions of a whole warp: moving 8 x 8 tiles to and from shared memory, and products on the tensor cores.

A fragment is a small matrix spread over a warp: register i of lane l holds two 16-bit elements of one row (``A``, tiles), of
one column (``B``), or one float32 (``C``, ``D``), at places that the ISA fixes. Products are exact in float32, sums are made in
float32 in an order that the hardware does not promise.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution: ``ldmatrix``, ``stmatrix``, ``mma.m16n8k16``,
``wgmma.mma_async`` (fragments, matrix descriptors, swizzling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import bfloat16_values
from .memory import WARP
from .program import PtxError

__all__ = [
    "Descriptor", "a_fragment", "b_fragment", "c_fragment", "c_registers", "floats", "tile_registers", "tile_rows",
]  # fmt: skip

Array = NDArray[Any]


def halves(registers: Sequence[Array]) -> Array:
    """Registers [N, 32] of two 16-bit elements each -> uint16 [N, lane, register, element], the low half first."""
    return np.ascontiguousarray(np.stack(registers, axis=-1)).view(np.uint16).reshape(len(registers[0]), WARP, -1, 2)


def floats(bits: Array, kind: str) -> Array:
    """uint16 -> float32; ``kind`` is ``f16`` or ``bf16``."""
    return bfloat16_values(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def a_fragment(registers: Sequence[Array]) -> Array:
    """4 registers [N, 32] -> uint16 [N, 16 rows, 16 columns]

    Lane 4 g + t holds rows g and g + 8 at columns 2 t, 2 t + 1 and, in its last two registers, 8 further.
    """
    parts = halves(registers).reshape(-1, 8, 4, 2, 2, 2)  # g, t, column half, row half, element
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)


def b_fragment(registers: Sequence[Array]) -> Array:
    """2 registers [N, 32] -> uint16 [N, 16 rows, 8 columns]: lane 4 g + t holds column g at rows 2 t, 2 t + 1 (+ 8)."""
    parts = halves(registers).reshape(-1, 8, 4, 2, 2)  # g, t, row half, element
    return parts.transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)


def c_fragment(registers: Sequence[Array]) -> Array:
    """4 m registers [N, 32] -> float32 [N, 16 rows, 8 m columns]: lane 4 g + t holds rows g and g + 8 at columns 2 t, 2 t + 1."""
    parts = np.stack(registers, axis=-1).view(np.float32).reshape(len(registers[0]), 8, 4, -1, 2, 2)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(len(registers[0]), 16, -1)  # g, t, 8 columns, row half, element


def c_registers(matrix: Array) -> list[Array]:
    """The other way."""
    parts = matrix.reshape(len(matrix), 2, 8, -1, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    lanes = np.ascontiguousarray(parts.reshape(len(matrix), WARP, -1), dtype=np.float32).view(np.uint32)
    return [lanes[:, :, index] for index in range(lanes.shape[2])]


def tile_registers(rows: Array, transposed: bool) -> list[Array]:
    """``ldmatrix``: uint16 [N, tiles, 8 rows, 8] -> a register [N, 32] per tile: lane 4 r + t gets elements 2 t, 2 t + 1 of row r."""
    tiles = rows.swapaxes(2, 3) if transposed else rows
    lanes = np.ascontiguousarray(tiles).view(np.uint32).reshape(*tiles.shape[:2], WARP)
    return [lanes[:, index] for index in range(tiles.shape[1])]


def tile_rows(registers: Sequence[Array], transposed: bool) -> Array:
    """``stmatrix``: the other way."""
    tiles = halves(registers).transpose(0, 2, 1, 3).reshape(len(registers[0]), len(registers), 8, 8)
    return tiles.swapaxes(2, 3) if transposed else tiles


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where an operand of ``wgmma`` lies in shared memory.

    ``start``, ``leading`` and ``stride`` in bytes; ``swizzle``: bytes over which 16-byte pieces are permuted, 0 for none.
    """

    start: int
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def parse(cls, bits: int, *, tcgen05: bool) -> Descriptor:
        """From the 64 bits of the register.

        Args:
            tcgen05: whether it is one of ``tcgen05``, which has 0b001 in bits 46 to 48; else of ``wgmma``.

        Raises:
            PtxError: another kind, a base offset, or a way to swizzle that Triton does not use.
        """
        swizzle = {0: 0, 2: 128, 4: 64, 6: 32}.get(bits >> 61)
        stray = bits & ((3 << 14) | (3 << 30) | (0x7FFF << 46))
        if swizzle is None or stray != (1 << 46 if tcgen05 else 0):
            raise PtxError(f"matrix descriptor 0x{bits:x} is not understood")
        return cls((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, swizzle)

    def addresses(self, outer: int, k: int, k_is_contiguous: bool) -> Array:
        """Of the element (i, j) of a matrix of ``outer`` (M or N) by ``k`` 16-bit elements: int64 [outer, k].

        Rows of ``swizzle`` bytes (16 without) run along the contiguous axis; 8 of them make an atom. ``stride`` leads from
        atom to atom along the other axis, ``leading`` along the contiguous one; without swizzle and with i contiguous it is
        the other way round.
        """
        i, j = np.arange(outer)[:, None], np.arange(k)[None, :]
        along, across = (j, i) if k_is_contiguous else (i, j)
        row = max(self.swizzle, 16) // 2  # elements
        leading, stride = self.leading, self.stride
        if not self.swizzle and not k_is_contiguous:
            leading, stride = stride, leading
        offset = along // row * leading + across // 8 * stride + across % 8 * row * 2 + along % row * 2
        plain = self.start + offset
        if not self.swizzle:
            return plain
        mask = self.swizzle // 16 - 1  # which of the bits 4.. are turned by the bits 7..
        return plain ^ ((plain >> 7 & mask) << 4)
