"""What the tests of the PTX interpreter share: a kernel around some instructions, bits of numbers, operands in shared memory."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("llama_export_plugins", reason="the plugins are not installed: pip install ./plugins")
from llama_export_plugins.ptx import Buffer, GlobalMemory, Program, Traffic, launch

Array = NDArray[Any]
ALIGNMENT, GAP = 128, 256
"""Bytes: of every buffer, and between two."""


# ---- a kernel around some instructions --------------------------------------------------------------------------


def kernel(body: str, parameters: int = 0, threads: int = 32) -> str:
    """A module whose kernel runs ``body``: ``%rd0`` .. are its parameters, ``%r0`` is the thread."""
    declared = ",\n".join(f"    .param .u64 .ptr .global .align 1 kernel_param_{index}" for index in range(parameters))
    loads = "\n".join(f"    ld.param.b64 %rd{index}, [kernel_param_{index}];" for index in range(parameters))
    return f"""
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{declared}
)
.reqntid {threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<512>;
    .reg .b64 %rd<512>;
{loads}
    mov.u32 %r0, %tid.x;
{body}
    ret;
}}
"""


def run(
    body: str,
    *arrays: Array,
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
    traffic: Traffic | None = None,
) -> list[Array]:
    """What a launch leaves in copies of ``arrays``, which lie apart in memory as ``buffer0``, ``buffer1``, .."""
    begins = np.cumsum([0, *(-(-item.nbytes // ALIGNMENT) * ALIGNMENT + GAP for item in arrays)])
    store = np.zeros(int(begins[-1]) + ALIGNMENT, np.uint8)
    base = -store.ctypes.data % ALIGNMENT
    places = [store[base + int(begin) :][: item.nbytes] for begin, item in zip(begins, arrays, strict=False)]
    for place, item in zip(places, arrays, strict=True):
        place[:] = np.ascontiguousarray(item).reshape(-1).view(np.uint8)
    buffers = [Buffer(f"buffer{index}", item.ctypes.data, item.nbytes) for index, item in enumerate(places)]
    program = Program.parse(kernel(body, len(arrays), threads))
    launch(program, grid, [item.address for item in buffers], GlobalMemory(buffers), shared_bytes, traffic)
    return [place.view(item.dtype).reshape(item.shape) for place, item in zip(places, arrays, strict=True)]


CLASSES = {np.dtype(np.bool_): "p", np.dtype(np.uint16): "rs", np.dtype(np.uint32): "r", np.dtype(np.uint64): "rd"}


def each(
    body: str, *inputs: Array, out: Sequence[type] = (np.uint32,), shared: bytes = b"", traffic: Traffic | None = None
) -> list[Array]:
    """Runs ``body`` once per element of its inputs, a thread each.

    Args:
        body: ``$0`` .. are the registers of the inputs, ``$d0`` .. those of the results.
        inputs: [n] bits; bool for a predicate. Padded to whole warps.
        out: types of the results.
        shared: put into shared memory before, with a barrier after.

    Returns:
        results, [n] each
    """
    count = len(inputs[0])
    threads = -(-count // 32) * 32
    names: dict[str, str] = {}
    free = {"p": 1, "rs": 1, "r": 8, "rd": 200}
    lines: list[str] = []
    arrays = [np.resize(item.astype(np.uint32) if item.dtype == np.bool_ else item, threads) for item in inputs]

    def register(kind: Any) -> str:
        name = CLASSES[np.dtype(kind)]
        free[name] += 1
        return f"%{name}{free[name] - 1}"

    def address(index: int, size: int) -> str:
        lines.append(f"    mad.wide.u32 %rd199, %r0, {size}, %rd{index};")
        return "[%rd199]"

    if shared:
        piece = 16 * threads
        image = np.frombuffer(shared.ljust(-(-len(shared) // piece) * piece, b"\0"), np.uint32)
        place = address(len(inputs) + len(out), 16)[1:-1]
        lines.append("    shl.b32 %r1, %r0, 4;")
        for offset in range(0, image.nbytes, piece):
            lines.append(f"    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [{place}+{offset}];")
            lines.append(f"    st.shared.v4.b32 [%r1+{offset}], {{%r2, %r3, %r4, %r5}};")
        lines.append("    fence.proxy.async.shared::cta;\n    bar.sync 0;")
    for index, item in enumerate(inputs):
        names[f"${index}"] = name = register(item.dtype)
        target = register(np.uint32) if item.dtype == np.bool_ else name
        size = arrays[index].itemsize
        lines.append(f"    ld.global.b{8 * size} {target}, {address(index, size)};")
        if item.dtype == np.bool_:
            lines.append(f"    setp.ne.b32 {name}, {target}, 0;")
    for index, kind in enumerate(out):
        names[f"$d{index}"] = register(kind)
    lines.append(re.sub(r"\$d?\d+", lambda match: names[match[0]], body))
    for index, kind in enumerate(out):
        kept = np.dtype(np.uint32 if kind is np.bool_ else kind)
        source = names[f"$d{index}"]
        if kind is np.bool_:
            lines.append(f"    selp.b32 %r6, 1, 0, {source};")
            source = "%r6"
        lines.append(f"    st.global.b{8 * kept.itemsize} {address(len(inputs) + index, kept.itemsize)}, {source};")
        arrays.append(np.zeros(threads, kept))
    if shared:
        arrays.append(image)
    found = run("\n".join(lines), *arrays, threads=threads, shared_bytes=len(shared) and image.nbytes, traffic=traffic)
    return [item[:count].astype(kind) for item, kind in zip(found[len(inputs) :], out, strict=False)]


# ---- numbers and their bits ------------------------------------------------------------------------------------------


def value_of(bits: int, kind: str) -> float:
    """Exact in Python's float."""
    if kind == "f16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16 if kind == "bf16" else bits))[0])


def bits_of(value: float, kind: str) -> int:
    """Of a number that the type has, an infinity or NaN."""
    if kind == "f16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return bits >> 16 if kind == "bf16" else bits


def encoded(matrix: Array, kind: str) -> Array:
    """Small integers -> bits [same shape]"""
    return np.vectorize(lambda item: bits_of(float(item), kind), otypes=[np.uint16])(matrix)


def small(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(-4, 5, shape)


# ---- operands of matrix products in shared memory --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """How an operand of ``wgmma`` lies in shared memory, from the ISA's canonical layouts (units of 16 bytes: "pieces").

    Swizzled atoms are 8 lines of ``swizzle`` bytes; the piece p of line r lies at p ^ r (128 bytes), p ^ (r / 2) (64),
    p ^ (r / 4) (32). K-major: a line is a row of the matrix and ``stride`` leads to the next 8 rows. MN-major: a line is one
    k, ``stride`` leads to the next 8 k and ``leading`` to the next ``swizzle`` bytes of rows. Without swizzle a line is one
    piece: K-major has ``leading`` to the next 8 k and ``stride`` to the next 8 rows, and so has MN-major.
    """

    swizzle: int
    k_major: bool
    leading: int
    stride: int

    def offset(self, row: int, k: int) -> int:
        """Byte of an element, from the beginning."""
        if not self.swizzle:
            inner, line = (k, row) if self.k_major else (row, k)
            return row // 8 * self.stride + k // 8 * self.leading + line % 8 * 16 + inner % 8 * 2
        along, line = (k, row) if self.k_major else (row, k)
        per_line = self.swizzle // 2
        turn = line % 8 // {128: 1, 64: 2, 32: 4}[self.swizzle]
        piece = along % per_line // 8 ^ turn
        atom = line // 8 * self.stride + (0 if self.k_major else along // per_line * self.leading)
        return atom + line % 8 * self.swizzle + piece * 16 + along % 8 * 2

    def write(self, image: bytearray, begin: int, bits: Array) -> None:
        """``bits``: uint16 [rows, k]"""
        for (row, k), item in np.ndenumerate(bits):
            struct.pack_into("<H", image, begin + self.offset(row, k), int(item))

    def descriptor(self, begin: int) -> int:
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        return begin >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | mode << 62


def k_major(swizzle: int) -> Layout:
    """With gaps, so that no two distances are the same."""
    return Layout(swizzle, True, 16, 16 * swizzle) if swizzle else Layout(0, True, 128, 384)


def mn_major(swizzle: int) -> Layout:
    return Layout(swizzle, False, 24 * swizzle, 8 * swizzle) if swizzle else Layout(0, False, 128, 384)
